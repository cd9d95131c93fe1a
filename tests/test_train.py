"""sppo.py as its user runs it."""
import dataclasses
import importlib
import importlib.util
import json
import math
import re
import shutil

import pytest
from conftest import complaint, metrics, run

from cli import BUILTIN_MODEL
from sppo import SPPO, TrainConfig, train

QUICK = ["--steps", "2", "--prompts-per-step", "16", "--minibatch", "8", "--eval-problems", "8", "--dataset", "chain:100",
         "--max-response-tokens", "64"]
needs_vllm = pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="vLLM is not installed")


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    output = tmp_path_factory.mktemp("demo")
    done = run("sppo.py", "--steps", "15", "--lr-decay", "0", "--eval-every", "15", "--eval-problems", "192", "--output", output)
    assert done.returncode == 0, done.stderr
    return done.stdout, output


@pytest.mark.xdist_group("demo")
def test_the_demo_learns(demo):
    printed, output = demo
    lines = metrics(output)

    assert [m["step"] for m in lines] == list(range(lines[-1]["step"] + 1))
    assert 0.25 <= lines[0]["eval_accuracy"] <= 0.50
    assert lines[-1]["eval_accuracy"] >= 0.60
    for m in lines[1:]:
        assert {"seconds", "reward", "response_tokens", "policy/entropy", "critic/bce", "critic/explained_variance",
                *(f"time/{phase}" for phase in ("rollout", "reward", "logprobs", "update", "critic", "sync"))} <= m.keys()
        assert m["policy/rollout_gap"] < 1e-3  # the engine really samples from the weights that are trained
    # The critic learned which problems are hard: it ranks prompts that it has not seen, and knows more of them
    # than a constant would.
    for key, least in (("critic/auc", 0.7), ("critic/skill", 0.1)):
        late = [m[key] for m in lines[-10:] if m[key] is not None]
        assert sum(late) / len(late) > least, key


@pytest.mark.xdist_group("demo")
def test_what_the_demo_says(demo):
    printed, output = demo
    steps = [line for line in printed.splitlines() if re.match(r"step +\d+/\d+ ", line)]
    assert len(steps) == len(metrics(output))
    for part in ("reward", "length", "clip", "critic", "seconds"):
        assert part in steps[1]
    assert "accuracy" in steps[0] and "accuracy" in steps[-1]
    assert "Before training:" in printed and "After training:" in printed and printed.count("\\boxed{") >= 12
    accuracy, error = map(float, re.search(r"accuracy went from [\d.]+ to ([\d.]+) ± ([\d.]+) ", " ".join(printed.split())).groups())
    assert accuracy == pytest.approx(metrics(output)[-1]["eval_accuracy"], abs=5e-4)
    assert error == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / 192), abs=1e-3)
    assert {path.name for path in output.iterdir()} >= {"metrics.jsonl", "samples.jsonl", "curves.png", "held_out.jsonl", "model"}
    assert f"{output}/model" in printed.replace("\n", "")


@pytest.mark.xdist_group("demo")
@needs_vllm
def test_the_trained_model_is_a_model_that_can_be_trained_on(demo, tmp_path):
    """transformers and vLLM load it, and it is as good as it was; its run's options are the defaults. On two ranks, each
    with an engine that must take the weights of the first step."""
    done = run("sppo.py", "--model", demo[1], *QUICK, "--dataset", "chain", "--max-response-tokens", "112", "--lr", "1e-3",
               "--eval-problems", "128", "--output", tmp_path, ranks=2)
    assert done.returncode == 0, done.stderr
    assert metrics(tmp_path)[0]["eval_accuracy"] > 0.55
    assert max(m["policy/rollout_gap"] for m in metrics(tmp_path)[1:]) < 1e-4


def test_the_learning_rate_falls_over_the_last_steps(tmp_path):
    done = run("sppo.py", *QUICK, "--steps", "4", "--lr", "1e-3", "--lr-decay", "0.75", "--engine", "transformers",
               "--max-response-tokens", "24", "--eval-every", "0", "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    assert [m["policy/lr"] for m in metrics(tmp_path) if "reward" in m] == pytest.approx([1e-3, 1e-3, 2e-3 / 3, 1e-3 / 3])
    assert "step 0/4" not in done.stdout  # it has nothing to tell
    assert {m["critic/lr"] for m in metrics(tmp_path) if "reward" in m} == {TrainConfig.BUILTIN["critic_lr"]}


def test_the_fallback_engine_runs_the_same_loop(tmp_path):
    """With what is for larger models switched on: a critic of its own, bfloat16, checkpointing, offload, warm-up."""
    done = run("sppo.py", *QUICK, "--engine", "transformers", "--output", tmp_path, "--critic-model", BUILTIN_MODEL,
               "--dtype", "bfloat16", "--checkpoint-activations", "--offload", "all",
               "--max-response-tokens", "24", "--eval-every", "0")
    assert done.returncode == 0, done.stderr
    assert "engine transformers" in done.stdout
    assert max(m["policy/rollout_gap"] for m in metrics(tmp_path)[1:]) < 0.1  # bfloat16


@needs_vllm
def test_oversampling_on_two_ranks(tmp_path):
    """Twice as many prompts in flight as a step trains on; whatever was started is trained on in the end."""
    done = run("sppo.py", *QUICK, "--steps", "4", "--oversample", "1", "--old-logprobs", "rollout", "--output", tmp_path,
               ranks=2)
    assert done.returncode == 0, done.stderr
    lines = metrics(tmp_path)[1:]
    assert lines[0]["rollout/in_flight"] == 16 and lines[-1]["rollout/in_flight"] == 0
    assert max(m["rollout/age"] for m in lines) > 0
    trained = sum(16 * m["response_tokens"] for m in lines)
    assert trained == sum(m["rollout/generated_tokens"] for m in lines)
    first = lines[0]  # 32 responses in flight, and none begun before
    assert first["rollout/idle"] == pytest.approx(1 - first["rollout/generated_tokens"] / (32 * first["rollout/longest"]))
    assert all(m["policy/kl"] < 0.1 for m in lines)  # pi_old is that of each token, not of another


def test_the_same_command_gives_the_same_numbers(tmp_path):
    runs = []
    for name in ("a", "b"):
        done = run("sppo.py", *QUICK, "--engine", "transformers", "--deterministic", "--output", tmp_path / name)
        assert done.returncode == 0, done.stderr
        runs.append([{k: v for k, v in m.items() if k != "seconds" and not k.startswith("time/")}
                     for m in metrics(tmp_path / name)])
    assert runs[0] == runs[1]


def test_files_and_single_minibatch(tmp_path):
    """A .jsonl of one's own; with one mini-batch a step no old log-probabilities are computed, and the ratio is 1."""
    rows = [{"question": f"Compute {i}+{j} modulo 10.", "answer": str((i + j) % 10)} for i in range(10) for j in range(10)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + json.dumps(
        {"question": "1+" * 200 + "1=?", "answer": "1"}) + "\n")
    done = run("sppo.py", *QUICK, "--engine", "transformers", "--minibatch", "16", "--dataset", tmp_path / "x.jsonl", "--output",
               tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "dropped 1 of 101 problems" in done.stdout
    last = metrics(tmp_path / "out")[-1]
    assert last["rollout/idle"] == pytest.approx(1 - last["response_tokens"] / last["rollout/longest"])
    assert last["policy/clip_fraction"] == 0 and last["policy/kl"] == 0 and last["policy/rollout_gap"] < 1e-3


def broken_model(folder, **changes):
    shutil.copytree(BUILTIN_MODEL, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


@pytest.mark.parametrize("case, message", [
    ("minibatch", "--minibatch 7 does not divide --prompts-per-step 128"),
    ("critic minibatch", "--critic-minibatch -4: must be 0 or more"),
    ("critic divisor", "--critic-minibatch 100 does not divide --prompts-per-step 128"),
    ("model", "is no folder with a usable config.json and no model on the hub"),
    ("critic", "is no folder with a usable config.json and no model on the hub"),
    ("vocabulary", "tokenizer has 265 tokens and its weights only 200"),
    ("context", "reads at most 512 tokens"),
    ("empty", "has no problems"),
    ("prompts", "every prompt to train on is longer than --max-prompt-tokens"),
    ("gold", "row 2: the answer '\\\\frac{' cannot be read as mathematics"),
    ("absent", "no such file"),
    ("oversample", "--oversample 1.0: also give --old-logprobs rollout"),
    ("temperature", "--temperature 0.0: must be greater than 0"),
    ("parallel", "--tensor-parallel 3 does not divide the 1 ranks"),
    ("steps", "argument --steps: invalid int value")])
def test_bad_input_is_one_clear_sentence(tmp_path, case, message, capsys):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "gold.jsonl").write_text('{"problem": "1?", "answer": "1"}\n{"problem": "2?", "answer": "\\\\frac{"}\n')
    arguments = {
        "minibatch": ["--minibatch", "7"], "critic minibatch": ["--critic-minibatch", "-4"],
        "critic divisor": ["--critic-minibatch", "100"], "model": ["--model", tmp_path / "nope"], "critic": ["--critic-model", "no/such"],
        "vocabulary": ["--model", broken_model(tmp_path / "v", vocab_size=200)],
        "context": ["--max-response-tokens", "5000"], "empty": ["--dataset", tmp_path / "empty.jsonl"],
        "prompts": ["--max-prompt-tokens", "5"], "gold": ["--dataset", tmp_path / "gold.jsonl"],
        "absent": ["--dataset", tmp_path / "absent.jsonl"], "steps": ["--steps", "many"],
        "temperature": ["--temperature", "0"], "oversample": ["--oversample", "1"],
        "parallel": ["--tensor-parallel", "3"]}[case]
    if case in ("empty", "prompts", "absent", "gold", "parallel", "critic divisor"):  # seen only when the process group exists, of which a process has one
        done = run("sppo.py", *arguments, "--output", tmp_path / "out")
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    else:
        arguments += ["--output", tmp_path / "out"]
        assert message in complaint(lambda a: train(TrainConfig.parse("", a), SPPO), arguments, capsys)
    assert not (tmp_path / "out").exists()  # nothing was begun


def test_help_explains_every_option():
    printed = run("sppo.py", "--help").stdout
    for field in dataclasses.fields(TrainConfig):
        assert f"--{field.name.replace('_', '-')}" in printed
        assert len(field.metadata["help"].splitlines()) == 1
