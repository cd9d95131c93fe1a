"""What happens when a run is killed, starved, told to stop, or fed garbage: nothing is lost, and nothing lies."""
import errno
import importlib.util
import json
import math
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, metrics, run, started, torchrun, wait_for
from safetensors.torch import load_file, save_file

from checkpoint import _is_complete, existing, models_of
from cli import BUILTIN_MODEL, InputError, replace_file
from critic import PromptCritic
from log import Log
from machine import load_tokenizer
from sppo import TrainConfig

SMALL = ["--engine", "transformers", "--prompts-per-step", "8", "--minibatch", "4", "--eval-problems", "8", "--eval-every", "3",
         "--dataset", "chain:100", "--max-response-tokens", "48"]


def but_for_times(folder):
    return [{k: v for k, v in m.items() if k != "seconds" and not k.startswith("time/")} for m in metrics(folder)]


def checkpoints(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


# ---- killed ---------------------------------------------------------------------------------------------------------

def test_killed_at_four_random_instants(tmp_path):
    """Also while it saves. Every step is in metrics.jsonl once, with the numbers of a run that nobody killed."""
    command = [*SMALL, "--deterministic", "--steps", "10", "--save-every", "1"]
    undisturbed = run("tests/killing.py", tmp_path / "a", 0, *command)
    assert undisturbed.returncode == 0, undisturbed.stderr
    killed = run("tests/killing.py", tmp_path / "b", 4, *command)
    assert killed.returncode == 0, killed.stderr
    report = json.loads(killed.stdout.splitlines()[-1])
    print(f"\n{report}")
    assert report["kills"] == 4 and report["while saving"] >= 2 and len(set(report["steps"])) > 2
    assert [m["step"] for m in metrics(tmp_path / "b")] == list(range(11))
    assert but_for_times(tmp_path / "b") == but_for_times(tmp_path / "a")
    assert checkpoints(tmp_path / "b") == ["step-00000009", "step-00000010"]  # --keep 2, and no leftovers


@pytest.mark.parametrize("command", [
    pytest.param(["sppo.py", "--engine", "auto", "--oversample", "1", "--old-logprobs", "rollout"],
                 marks=pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="vLLM is not installed")),
    ["sppo.py", "--offload", "between"], ["grpo.py"], ["ppo.py"], ["spo.py", "--init-samples", "1"]])
def test_two_steps_a_kill_and_two_more_equal_four(tmp_path, command):
    """The kill came when step 4 was logged, and its checkpoint was not yet written."""
    command = [command[0], *SMALL, *command[1:], "--deterministic", "--steps", "4", "--save-every", "2", "--output"]
    done = run(*command, tmp_path / "a")
    assert done.returncode == 0, done.stderr
    assert checkpoints(tmp_path / "a") == ["step-00000002", "step-00000004"]
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b/checkpoints/step-00000004").rename(tmp_path / "b/checkpoints/partial-00000004")
    with (tmp_path / "b/metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "se')  # a line that was being written
    done = run(*command, tmp_path / "b", "--resume")
    assert done.returncode == 0, done.stderr
    assert "Resuming after step 2\n" in done.stdout
    assert "warning: " not in done.stdout  # who learns nothing needs no state
    assert but_for_times(tmp_path / "b") == but_for_times(tmp_path / "a")
    a, b = ((tmp_path / name / "samples.jsonl").read_text() for name in "ab")
    assert a == b and a.count("\n") == 4 * 8
    seconds = [m["seconds"] for m in metrics(tmp_path / "b")]
    assert seconds == sorted(seconds)  # the clock went on, too


@pytest.fixture(scope="session")
def two_checkpoints(tmp_path_factory):
    """A run of sppo.py on two ranks that was saved after steps 1 and 2."""
    folder = tmp_path_factory.mktemp("run") / "run"
    done = run("sppo.py", *SMALL, "--deterministic", "--steps", "2", "--save-every", "1", "--output", folder, ranks=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 2/2") == 1  # one rank speaks
    return folder


@pytest.mark.xdist_group("checkpoints")
def test_on_another_number_of_ranks(two_checkpoints, tmp_path):
    lines = []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        shutil.copytree(two_checkpoints, folder)
        done = run("sppo.py", *SMALL, "--deterministic", "--steps", "3", "--save-every", "1", "--resume", "--output", folder,
                   ranks=ranks)
        assert done.returncode == 0, done.stderr
        assert "Resuming after step 2, with --steps 3 (was 2)" in done.stdout
        lines.append(metrics(folder)[3])
    first, n = metrics(two_checkpoints)[1], 8  # the critic began with the mean of the first rewards, on both ranks
    mean, value = first["reward"], (first["reward"] * n + 0.5) / (n + 1)
    assert first["critic/bce"] == pytest.approx(-mean * math.log(value) - (1 - mean) * math.log(1 - value), abs=1e-5)
    one, two = lines
    assert one["reward"] == two["reward"]
    for name in ("critic/bce", "critic/loss", "policy/loss", "policy/grad_norm"):
        assert one[name] == pytest.approx(two[name], rel=1e-3, abs=1e-5)


def test_from_two_replicas_of_two_shards_to_one_process(tmp_path):
    command = ["sppo.py", *SMALL, "--deterministic", "--save-every", "1", "--eval-every", "0", "--output", tmp_path / "run"]
    done = run(*command, "--steps", "1", "--replicas", "2", ranks=4)
    assert done.returncode == 0, done.stderr
    shards = list((tmp_path / "run/checkpoints/step-00000001").glob("*.safetensors"))
    assert sum(path.stat().st_size for path in shards) < 3 * 4 * 2 * 364_000 * 1.1  # each shard once, not once a replica
    done = run(*command, "--steps", "2", "--resume")
    assert done.returncode == 0, done.stderr
    whole = [*command[:-1], tmp_path / "whole"]
    done = run(*whole, "--steps", "2")
    assert done.returncode == 0, done.stderr
    ours, theirs = metrics(tmp_path / "run")[-1], metrics(tmp_path / "whole")[-1]
    assert ours["reward"] == theirs["reward"]
    assert ours["policy/grad_norm"] == pytest.approx(theirs["policy/grad_norm"], rel=1e-3)


@pytest.mark.xdist_group("checkpoints")
def test_a_broken_checkpoint_is_passed_over_and_a_foreign_one_refused(two_checkpoints, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(two_checkpoints, folder)
    assert {path.suffix for path in folder.glob("checkpoints/*/*")} == {".safetensors", ".json"}  # nothing is pickled
    resume = ["sppo.py", *SMALL, "--steps", "3", "--save-every", "0", "--resume", "--output", folder]
    shard = next(folder.glob("checkpoints/step-00000002/*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1000])
    done = run(*resume)
    assert done.returncode == 0, done.stderr
    assert f"step-00000002 is passed over: {shard.name} is not as long as it was written" in done.stdout
    assert "Resuming after step 1" in done.stdout
    assert [m["step"] for m in metrics(folder)] == [0, 1, 2, 3]

    before = (folder / "metrics.jsonl").read_bytes()
    (folder / "checkpoints/step-00000002/state.json").unlink()
    foreign = variant(tmp_path / "small")
    config = json.loads((foreign / "config.json").read_text())
    layers = config["num_hidden_layers"] - 1
    (foreign / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers, "layer_types": None}))
    weights = load_file(foreign / "model.safetensors")
    save_file({name: w for name, w in weights.items() if f"layers.{layers}." not in name}, foreign / "model.safetensors",
              {"format": "pt"})
    sibling = variant(tmp_path / "sibling")  # its weights have the same shapes
    (sibling / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    for command, sentence in (
            ([*resume, "--model", sibling, *SETTINGS], "belongs to another --model (rms_norm_eps differs)"),
            (["ppo.py", *resume[1:]], "is of a run of SPPO, and this is PPO"),
            ([*resume, "--model", foreign, *SETTINGS], "belongs to another --model (layer_types differs)"),
            ([*resume, "--steps", "0"], "--steps 0: must be"),
            (resume, "has no complete checkpoint; delete its folder checkpoints to start anew")):
        if command is resume:
            (folder / "checkpoints/step-00000001/state.json").write_text('{"format": "somebody else\'s"}')
        done = run(*command)
        assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr
    done = run(*[option for option in resume if option != "--resume"])
    assert done.returncode == 2 and "holds checkpoints of a run; give --resume or another --output" in done.stderr
    assert (folder / "metrics.jsonl").read_bytes() == before  # nothing was lost


# ---- told to stop ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_saves(tmp_path, number):
    command = ["sppo.py", *SMALL, "--save-every", "0", "--output", tmp_path / "run"]
    with started(*command, "--steps", "1000") as ([process], [printed, error]):
        wait_for("^step +1/", printed, process)
        os.kill(process.pid, number)
        process.join(600)
        assert process.exitcode == 0, error.read_text()
        last = metrics(tmp_path / "run")[-1]["step"]
        assert f"Stopped after step {last}, as asked. To continue, run the same command with --resume" in printed.read_text()
    assert checkpoints(tmp_path / "run") == [f"step-{last:08d}"]
    if number == signal.SIGTERM:  # nothing is left to train: the model is saved
        done = run(*command, "--steps", last, "--resume")
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "run/model/model.safetensors").exists() and metrics(tmp_path / "run")[-1]["step"] == last


def test_a_second_signal_ends_it_at_once(tmp_path):
    """But not if it comes with the first, as schedulers send them. Meanwhile nobody else may write into the folder."""
    (tmp_path / "slow.py").write_text("""
import time
from cli import clear_errors
from sppo import Baseline, TrainConfig, train
class Slow(Baseline):
    def advantages(self, batch):
        print("step 1 takes long", flush=True)
        for _ in range(6000):  # a signal that comes just before a sleep is only handled after it
            time.sleep(0.1)
with clear_errors():
    train(TrainConfig.parse(""), Slow)
""")
    with started(tmp_path / "slow.py", *SMALL, "--output", tmp_path / "run") as ([process], [printed, error]):
        wait_for("^step 1 takes long", printed, process)
        os.kill(process.pid, signal.SIGINT)
        os.kill(process.pid, signal.SIGTERM)
        wait_for("Stopping after this step", error, process)
        other = run("sppo.py", *SMALL, "--output", tmp_path / "run")
        assert other.returncode == 2 and "another run is writing into" in other.stderr
        assert process.is_alive()
        time.sleep(2.1)  # by then the second comes later than with the first
        os.kill(process.pid, signal.SIGINT)
        process.join(600)
        assert process.exitcode == 128 + signal.SIGINT  # as a shell counts it


DYING = """
import os
from sppo import Baseline, TrainConfig, train
class Dying(Baseline):
    def advantages(self, batch):
        if os.environ["RANK"] == "1":
            print("dies", flush=True)
            DEATH
        return batch.rewards
train(TrainConfig.parse(""), Dying)
"""


def test_a_rank_that_fails_ends_the_others_and_its_error_is_told(tmp_path):
    (tmp_path / "dying.py").write_text(DYING.replace("DEATH", "raise RuntimeError('the first error')"))
    done = torchrun(tmp_path / "dying.py", *SMALL, "--output", tmp_path / "run", ranks=2)  # a hang would last two hours
    assert done.returncode != 0 and "dies" in done.stdout
    assert "the first error" in done.stderr.split("Root Cause (first observed failure)")[1]


def test_a_rank_whose_neighbour_is_killed_ends_too(tmp_path):
    (tmp_path / "dying.py").write_text(DYING.replace("DEATH", "os.kill(os.getpid(), 9)"))
    with started(tmp_path / "dying.py", *SMALL, "--output", tmp_path / "run", ranks=2) as (processes, [printed, error]):
        for process in processes:
            process.join(300)  # a hang would last two hours
        assert processes[1].exitcode == -signal.SIGKILL and processes[0].exitcode == 1, error.read_text()
        assert "dies" in printed.read_text()


# ---- numbers --------------------------------------------------------------------------------------------------------

def test_an_update_that_is_not_finite_is_skipped(device):
    """Weights and moments stay as they were, and good updates go on as if the bad one had not been."""
    def critic():
        torch.manual_seed(0)
        return PromptCritic(BUILTIN_MODEL, device, minibatch=2, lr=1e-2, dtype="float32", checkpoint_activations=False)

    def values(c):
        return [t.full_tensor().clone() for name, t in c.state_dict().items() if name.endswith(("weight", "avg", "avg_sq"))]
    clean, hurt = critic(), critic()
    prompts, rewards = [[5, 6, 7], [8, 9]], torch.tensor([1.0, 0.0])
    for c in (clean, hurt):
        c.update(prompts, rewards)
    before = values(hurt)
    for bad in (float("nan"), float("inf")):
        done = hurt.update(prompts, torch.tensor([1.0, bad]))
        assert done["critic/skipped"] == 1
        assert all(torch.equal(a, b) for a, b in zip(before, values(hurt), strict=True))
    for c in (clean, hurt):
        assert c.update(prompts, rewards)["critic/skipped"] == 0
    assert all(torch.equal(a, b) for a, b in zip(values(clean), values(hurt), strict=True))
    with pytest.raises(InputError, match="ten updates in a row were not finite"):
        for _ in range(10):
            hurt.update(prompts, torch.tensor([1.0, float("nan")]))


def test_ten_bad_updates_stop_the_run(tmp_path):
    (tmp_path / "bad.py").write_text("""
from cli import clear_errors
from sppo import Baseline, TrainConfig, train
class Bad(Baseline):
    def advantages(self, batch):
        return batch.rewards * float("nan")
with clear_errors():
    train(TrainConfig.parse(""), Bad)
""")
    done = run(tmp_path / "bad.py", *SMALL, "--output", tmp_path / "run")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "ten updates in a row were not finite" in done.stderr and "--resume" in done.stderr
    assert done.stdout.count("warning: an update was not finite and was skipped") == 1  # once for as long as it lasts
    lines = metrics(tmp_path / "run")
    assert lines[-1]["step"] == 4 and lines[-1]["policy/skipped"] == 1 and lines[-1]["policy/loss"] is None  # strict JSON


# ---- inputs ---------------------------------------------------------------------------------------------------------

def variant(folder, tokenizer=None, generation=None):
    """The built-in model with another tokenizer or generation config."""
    shutil.copytree(BUILTIN_MODEL, folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    for name, changes in (("tokenizer_config.json", tokenizer), ("generation_config.json", generation)):
        if changes is not None:
            path = folder / name
            before = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(json.dumps({k: v for k, v in {**before, **changes}.items() if v is not None}))
    return folder


SETTINGS = ["--temperature", "1", "--max-prompt-tokens", "64", "--max-response-tokens", "64", "--dtype", "float32",
            "--no-checkpoint-activations", "--save-every", "0"]


def test_a_checkpoint_that_cannot_be_read_now_is_not_taken_for_broken(two_checkpoints, tmp_path, monkeypatch):
    """Or the run would go on from the one before, and delete it."""
    def fails(path, *arguments):
        raise OSError(errno.EIO, "Input/output error")
    newest = existing(two_checkpoints)[-1]
    assert _is_complete(newest)
    monkeypatch.setattr(Path, "read_text", fails)
    with pytest.raises(InputError, match="step-00000002: cannot be read now .*Input/output error.*; try again, or delete it"):
        _is_complete(newest)


def test_a_critic_of_ones_own_may_be_no_transformer():
    policy = SimpleNamespace(module=SimpleNamespace(lm=AutoConfigured()))
    run = SimpleNamespace(policy=policy, tokenizer=load_tokenizer(BUILTIN_MODEL))
    for module, described in ((torch.nn.Linear(1, 1), {"model"}), (SimpleNamespace(backbone=AutoConfigured()), {"model", "critic_model"})):
        assert {*models_of(run, SimpleNamespace(critic=SimpleNamespace(module=module)))} == described


class AutoConfigured:
    config = SimpleNamespace(to_json_string=lambda: "{}")


def test_a_file_is_replaced_whole(tmp_path):
    for text in "one", "two":
        replace_file(tmp_path / "x.json", text)
        assert [file.read_text() for file in tmp_path.iterdir()] == [text]
    with pytest.raises(TypeError):
        replace_file(tmp_path / "x.json", None)
    assert (tmp_path / "x.json").read_text() == "two"


def test_odd_rows_and_an_odd_tokenizer(tmp_path):
    """Base model: no chat template, no pad token, several end tokens. Rows with what a crawl brings."""
    model = variant(tmp_path / "model", {"chat_template": None, "pad_token": None}, {"eos_token_id": [2, 3]})
    rows = [{"problem": p, "answer": a} for p, a in (
        ("1\x00\x07\x1b[31m2", "3"), ("lone \ud800 surrogate \udfff", "4"), ("\u202eright to left", "5"),
        ("x" * 100_000, "6"), ("\n\n\n", "7"), ("🦜" * 5, "\\left( 3, \\frac{\\pi}{2} \\right)"), ("z", "$\\dfrac12$"),
        ("z2", "10\\%"), ("z3", "\\text{(C)}"), ("z4", "x \\in [-2,7]"), ("z5", "1,000,000"), ("z6", "11\\text{ cm}^2"),
        ("z7", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}"))]
    (tmp_path / "odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run("sppo.py", "--model", model, *SETTINGS, "--engine", "transformers", "--steps", "2", "--prompts-per-step", "12",
               "--minibatch", "6", "--eval-problems", "2", "--dataset", tmp_path / "odd.jsonl", "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "dropped 1 of 13 problems" in done.stdout
    assert len(metrics(tmp_path / "run")) == 3


@pytest.mark.parametrize("collapse, engine", [("endless", "vllm"), ("empty", "transformers")])
def test_a_collapsed_policy_keeps_running_and_says_so(tmp_path, collapse, engine):
    """Endless: no response ends within the limit. Empty: every token ends a response, so all are one token long."""
    if not importlib.util.find_spec(engine):
        pytest.skip(f"{engine} is not installed")
    size = json.loads((ROOT / "builtin/config.json").read_text())["vocab_size"]
    model = BUILTIN_MODEL
    if collapse == "empty":
        model = variant(tmp_path / "model", generation={"eos_token_id": list(range(size))})
    done = run("sppo.py", "--model", model, *SMALL, *SETTINGS, "--engine", engine, "--steps", "2", "--output", tmp_path / "run",
               *(["--max-response-tokens", "1"] if collapse == "endless" else []))
    assert done.returncode == 0, done.stderr
    warning = "responses were cut off by --max-response-tokens 1" if collapse == "endless" else "nearly all responses are empty"
    assert done.stdout.count(f"{warning}") == 1
    assert metrics(tmp_path / "run")[-1]["response_tokens"] == 1


# ---- disk -----------------------------------------------------------------------------------------------------------

def test_a_full_disk_while_saving(tmp_path):
    """No file may grow beyond 1 MB: neither checkpoints nor the model fit, and metrics do."""
    (tmp_path / "limited.py").write_text(f"""
import resource, runpy
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
runpy.run_path({str(ROOT / "sppo.py")!r}, run_name="__main__")
""")
    done = run(tmp_path / "limited.py", *SMALL, "--steps", "4", "--save-every", "2", "--output", tmp_path / "run")
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "warning: no checkpoint of step 2" in done.stdout and "earlier ones are untouched" in done.stdout
    assert "the trained model could not be saved" in done.stderr
    assert [m["step"] for m in metrics(tmp_path / "run")] == [0, 1, 2, 3, 4]  # it went on
    assert checkpoints(tmp_path / "run") == []
    assert "this training is lost" in done.stderr and "The model is in" not in done.stdout


def test_a_full_disk_for_what_it_prints(tmp_path):
    (tmp_path / "full.py").write_text(f"""
import os, runpy
os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
runpy.run_path({str(ROOT / "sppo.py")!r}, run_name="__main__")
""")
    done = run(tmp_path / "full.py", *SMALL, "--steps", "2", "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert [m["step"] for m in metrics(tmp_path / "run")] == [0, 1, 2]


def test_a_full_disk_while_logging(tmp_path, capsys):
    """Lines that could not be written are written later, each once, even if the disk took half of one."""
    log = Log(TrainConfig(output=str(tmp_path), steps=4))
    file, room = log.lines.file, [10**6]  # bytes

    class Disk:
        def write(self, data):
            if not room[0]:
                raise OSError(28, "No space left on device")
            room[0] -= (count := min(len(data), room[0]))
            return file.write(data[:count])

        def close(self):
            file.close()

    log.lines.file = Disk()
    for step, left in ((1, 10**6), (2, 7), (3, 0), (4, 10**6)):
        room[0] = left
        log.add({"reward": 0.5})
        log.write(step, 1.0)
    assert [m["step"] for m in metrics(tmp_path)] == [1, 2, 3, 4]
    assert capsys.readouterr().out.count("metrics.jsonl cannot be written") == 2


# ---- whom it trusts -------------------------------------------------------------------------------------------------

def test_no_code_comes_with_a_model_unless_asked(tmp_path):
    model = variant(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "foreign", "auto_map": {"AutoConfig": "foreign.F", "AutoModelForCausalLM": "foreign.F"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "foreign.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    done = run("sppo.py", "--model", model, *SMALL, *SETTINGS, "--output", tmp_path / "run")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert not (tmp_path / "ran").exists()
    shutil.rmtree(model)
    model = variant(model)
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    done = run("sppo.py", "--model", model, *SMALL, *SETTINGS, "--output", tmp_path / "run")
    assert done.returncode == 2 and "has no model.safetensors" in done.stderr
