"""What a run writes and draws: metrics and their glossary, samples, curves, the page of samples, warnings, boards."""
import json
import re
import sys
import types

import numpy as np
import pytest
import torch
from conftest import ROOT, complaint, metrics, run

import curves
from cli import BUILTIN_MODEL, InputError
from data import Problem, load_tokenizer
from engines import Response
from log import Lines, Log, shown
from reward import verify
from sppo import SPPO, TrainConfig, train
from tools.curves import main, write_page

QUICK = ["--engine", "transformers", "--steps", "2", "--prompts-per-step", "8", "--minibatch", "4", "--eval-problems", "8",
         "--dataset", "chain:100", "--samples", "3", "--max-response-tokens", "64"]
SCRIPTS = {"sppo": [], "grpo": ["--group-size", "2"], "ppo": [], "spo": ["--init-samples", "0"]}


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """{name: folder} of a short run of each script, and what the first printed."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "b.jsonl").write_text('{"problem": "Compute 1+1 modulo 10 from left to right.", "answer": "2"}\n')
    done = {name: run(f"{name}.py", *QUICK, *options, "--output", folder / name,
                      "--eval-benchmarks", folder / "b.jsonl") for name, options in SCRIPTS.items()}
    for part in done.values():
        assert part.returncode == 0, part.stderr
    return {name: folder / name for name in SCRIPTS}, done["sppo"].stdout


@pytest.mark.xdist_group("log")
def test_the_glossary_has_every_metric_that_runs_write_and_no_other(runs):
    section = (ROOT / "docs/running.md").read_text().partition("\n### Metrics\n")[2].partition("\n## ")[0]
    rows = re.findall(r"(?m)^\| (`.*?) \|", section)
    explained = {name for row in rows for name in re.findall(r"`(.*?)`", row)}
    explained |= {f"critic/auc_tenth_{k}" for k in range(1, 11)}
    written = {name for folder in runs[0].values() for line in metrics(folder) for name in line}
    written = {re.sub(r"eval/b/(\w+).*", r"eval/NAME/\1", name) for name in written}
    written |= {"rollout/age", "rollout/overdue", "rollout/in_flight"}  # of --oversample, which needs vLLM
    written |= {"policy/rollout_truncated", "greedy_reward"}  # of --rollout-correction, of ReMax
    assert written == {name.removesuffix("@N") for name in explained}


@pytest.mark.xdist_group("log")
def test_samples(runs):
    folders, printed = runs
    for name, folder in folders.items():
        samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        assert [s["step"] for s in samples] == [1, 1, 1, 2, 2, 2]
        for s in samples:
            assert s["reward"] == (verify(s["response"], s["answer"]) if s["finished"] else 0)
            assert s["prompt"].startswith("Compute") and 0 < s["tokens"] <= 64
            assert (s["value"] is None) == (name == "grpo")
            if name == "sppo":
                assert s["advantage"] == pytest.approx(s["reward"] - s["value"], abs=1e-3)
        last = samples[3]  # shown on the terminal, where the step was evaluated
        assert name != "sppo" or f"{last['prompt']}\n" in printed and f"A {last['advantage']:+.2f}]" in printed


@pytest.mark.xdist_group("log")
def test_a_run_draws_itself_and_others_are_drawn_together(runs, tmp_path, capsys):
    folders, printed = runs
    assert printed.strip().splitlines()[-1] == f"Curves: {folders['sppo']}/curves.png"
    main([str(folders["sppo"]), str(folders["ppo"]), "--output", str(tmp_path / "both.png")])
    for picture in (folders["sppo"] / "curves.png", tmp_path / "both.png"):
        assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000
    assert capsys.readouterr().out == f"{tmp_path}/both.png\n"
    assert "give the --output folder of a run" in complaint(main, [tmp_path], capsys)


def test_smoothing_and_series():
    assert curves.smoothed([1, 2, 3, 6], 2) == [1, 1.5, 2.5, 4.5]
    steps = [{"step": 0, "x": 1}, {"step": 1, "x": None}, {"step": 2, "y": 1}, {"step": 3, "x": 4}]
    assert curves.series(steps, "x") == [[0, 3], [1, 4]] and curves.series(steps, "z") == [[], []]
    steps = [{"step": 0, "x": 1}, *({"step": n, "x": n, "rollout/generated_tokens": 10 * n} for n in (1, 2, 3))]
    assert curves.series(steps, "x", "tokens") == [[0, 10, 30, 60], [1, 1, 2, 3]]
    steps[1] |= {"tracker/init_samples": 4, "response_tokens": 25.0}  # SPO's first samples cost as much as others
    assert curves.series(steps, "x", "tokens")[0] == [0, 110, 130, 160]


def test_the_page_holds_the_samples_and_what_they_say_is_no_part_of_it(tmp_path, capsys):
    samples = [{"step": 1, "response": "</script><b>&", "prompt": "DATA", "reward": 1.0}]
    (tmp_path / "samples.jsonl").write_text(json.dumps(samples[0]) + '\n{"step": 2, "resp')  # one is being written
    page = write_page(tmp_path).read_text()
    assert json.loads(re.search(r"samples = (.*), most", page)[1]) == samples
    assert page.count("</script>") == 1 and "http" not in page
    (tmp_path / "samples.jsonl").write_text("")
    assert "has no sample" in complaint(main, [tmp_path, "--html"], capsys)
    assert "--output is for the picture" in complaint(main, [tmp_path, "--html", "--output", "x.html"], capsys)


def config(folder, **options):
    return TrainConfig(output=str(folder), steps=20, **options)


def test_what_is_not_a_number_is_null_in_both_files(tmp_path):
    batch = types.SimpleNamespace(responses=[Response([1], [-1.0], True)], rewards=torch.ones(1), prompts=[[1]], problems=[
        Problem(0, ({"role": "user", "content": "?"},), "1")])
    log = Log(config(tmp_path))
    log.add({"reward": 1.0, "critic/bce": float("nan")})
    log.sampled(batch, torch.tensor([float("inf")]), torch.tensor([float("nan")]), load_tokenizer(BUILTIN_MODEL))
    log.write(1, 0.5)
    [line], [sample] = ([json.loads(text, parse_constant=lambda name: pytest.fail(name)) for text in
                         (tmp_path / name).read_text().splitlines()] for name in ("metrics.jsonl", "samples.jsonl"))
    assert line["critic/bce"] is None and sample["advantage"] is None and sample["value"] is None


@pytest.mark.parametrize("reward, sentence", [(0.0, "no response of the last 5 steps"), (1.0, "every response of the last 5 steps")])
def test_a_hopeless_run_says_so_once(tmp_path, capsys, reward, sentence):
    log = Log(config(tmp_path))
    for step in range(1, 9):
        log.add({"reward": reward, "critic/bce": 0.1, "critic/auc": None, "policy/rollout_gap": 2e-7})
        log.write(step, 1.0)
        assert log.line.get("critic/skill") is None
        assert (sentence in " ".join(capsys.readouterr().out.split())) == (step == 5)
    log.add({"reward": 0.5})
    log.write(9, 1.0)
    assert log.warned == set()


def test_a_baselines_metrics_may_be_tensors_or_none(tmp_path):
    log = Log(config(tmp_path))
    log.add({"reward": 0.5}, None, {"tensor": torch.tensor(0.25), "numpy": np.float32(0.75)})
    log.write(1, 1.0)
    assert (log.line["tensor"], log.line["numpy"]) == (0.25, 0.75)
    with pytest.raises(InputError, match=r"the metric mine has shape \(2,\); give one number"):
        log.add({"mine": torch.zeros(2)})


def test_what_a_sample_earned_is_shown():
    s = {"prompt": "1+1?", "response": "2", "answer": "3", "finished": True, "value": None, "advantage": None}
    for reward, math, own in (1.0, "right", "reward 1.00"), (0.0, "wrong: it is 3", "reward 0.00"):
        assert f"[{math}]" in shown({**s, "reward": reward}, None) and f"[{own}]" in shown({**s, "reward": reward}, "f.py:f")
    assert "[cut off]" in shown({**s, "reward": 0.0, "finished": False}, "f.py:f")


@pytest.mark.parametrize("metric", ["reward/errors", "reward/timeouts", "reward/crashes"])
def test_verifications_that_fail_are_said(tmp_path, capsys, metric):
    log = Log(config(tmp_path))
    log.responses = 8  # in a step
    for step, failed in enumerate((0, 4, 5, 8, 1), 1):
        log.add({"reward": 0.5, metric: failed})
        log.write(step, 1.0)
        assert ("most verifications of a step failed" in capsys.readouterr().out) == (step == 3)


def test_the_first_line_has_the_gap_of_engine_and_trainer(tmp_path, capsys):
    log = Log(config(tmp_path))
    for step in range(3):
        log.add({"reward": 0.5, "policy/rollout_gap": 2e-7} if step else {"eval_accuracy": 0.5})
        log.write(step, 1.0)
    zero, one, two = capsys.readouterr().out.strip().splitlines()
    assert "gap 2e-07" in one and "gap" not in zero + two


@pytest.mark.parametrize("reward, name", [(None, "accuracy 0.460"), ("mine.py:reward", "mean reward 0.460")])
def test_shares_of_a_reward_of_ones_own_are_not_called_accuracy(tmp_path, capsys, reward, name):
    log = Log(config(tmp_path, reward=reward))
    log.add({"eval_accuracy": 0.46})
    log.write(0, 1.0)
    assert capsys.readouterr().out.strip().endswith(f"  {name}")


def test_lines_of_steps_that_are_trained_again_are_removed(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("".join(f'{{"step": {step}}}\n' for step in (1, 1, 2, 2, 3)) + '{"step": 4')
    lines = Lines(path, 2)
    assert [line["step"] for line in lines.read()] == [1, 1, 2, 2] and lines.last_step == 3
    lines.write({"step": 3})
    assert len(lines.read()) == 5
    assert Lines(path, 0).read() == []  # a new run


def test_boards_get_each_step_once(tmp_path, monkeypatch):
    """Killed after step 3 and resumed after step 2: step 3 is trained again, and not sent again."""
    sent = {"tensorboard": [], "wandb": []}

    class Writer:
        def __init__(self, folder, purge_step):
            self.add_scalar = lambda name, value, step: sent["tensorboard"].append((step, name, value))
            self.add_text = lambda name, text, step: sent["tensorboard"].append((step, name, text))
            self.flush = self.close = lambda: None

    ids = []
    board = types.SimpleNamespace(log=lambda numbers, step: sent["wandb"].append((step, numbers)), finish=lambda: None)
    wandb = types.SimpleNamespace(init=lambda id, **options: ids.append(id) or board, Table=lambda columns, data: (columns, data))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for first, last in ((0, 3), (2, 5)):  # resumed after, and trained until
        log = Log(config(tmp_path, tensorboard=True, wandb="project"), first)
        for step in range(first + 1, last + 1):
            log.add({"reward": step / 10})
            log.samples = [{"response": f"a|b\n{step}"}]
            log.write(step, 1.0)
    assert [step for step, numbers in sent["wandb"]] == [1, 2, 3, 4, 5] and len(set(ids)) == 1
    assert sent["wandb"][0][1] == {"seconds": 1.0, "reward": 0.1, "samples": (["step", "response"], [[1, "a|b\n1"]])}
    assert [entry for entry in sent["tensorboard"] if entry[1] == "reward"] == [(step, "reward", step / 10) for step in range(1, 6)]
    assert "| 5 | a\\|b<br>5 |" in sent["tensorboard"][-1][2]
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_board_that_fails_ends_no_run(tmp_path, capsys):
    log = Log(config(tmp_path))
    log.boards = [types.SimpleNamespace(send=lambda *_: 1 / 0)]
    for step in (1, 2):
        log.write(step, 1.0)
    assert capsys.readouterr().out.count("takes no more (division by zero)") == 1


@pytest.mark.parametrize("options, sentence", [
    (["--tensorboard"], "--tensorboard: is not installed; pip install tensorboard"),
    (["--wandb", "p"], "--wandb: is not installed; pip install wandb"), (["--samples", "some"], "must be a number, or all")])
def test_boards_that_are_not_installed(tmp_path, monkeypatch, capsys, options, sentence):
    import importlib.util
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    error = complaint(lambda a: train(TrainConfig.parse("", a), SPPO), [*options, "--output", tmp_path / "out"], capsys)
    assert sentence in error and not (tmp_path / "out").exists()
