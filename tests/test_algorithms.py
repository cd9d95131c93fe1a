"""grpo.py, ppo.py and spo.py as their users run them, on the loop of sppo.py."""
import dataclasses
import importlib
import re

import pytest
from conftest import ROOT, complaint, metrics, run

from grpo import GRPOConfig
from spo import SPOConfig
from sppo import TrainConfig, train

QUICK = ["--engine", "transformers", "--steps", "2", "--prompts-per-step", "8", "--minibatch", "4", "--eval-problems", "8",
         "--dataset", "chain:100", "--max-response-tokens", "64"]


@pytest.mark.parametrize("command, reports", [
    (["grpo.py", "--steps", "5", "--prompts-per-step", "32", "--group-size", "4", "--minibatch", "8", "--lr-decay", "0", "--loss-mean", "token"], {"group/all_equal"}),
    (["ppo.py", "--steps", "6", "--prompts-per-step", "64", "--minibatch", "16"],
     {"critic/loss", "critic/auc", *(f"critic/auc_tenth_{k}" for k in range(1, 11))}),
    (["spo.py", "--steps", "6", "--prompts-per-step", "64", "--minibatch", "16", "--init-samples", "1"],
     {"critic/auc", "tracker/rho", "tracker/distance"})])
def test_they_learn_on_two_ranks(tmp_path, command, reports):
    """On chains of 3 to 7 operations, which the model half knows: there a few steps show."""
    lines = (ROOT / "builtin/chain.jsonl").read_text().splitlines(keepends=True)
    middle = [line for line in lines if 3 <= sum(map(line.count, "+-*")) <= 7]
    (tmp_path / "middle.jsonl").write_text("".join(middle[:528]))
    done = run(*command, "--engine", "transformers", "--dataset", tmp_path / "middle.jsonl", "--eval-every", "6", "--eval-problems", "128",
               "--max-response-tokens", "64", "--output", tmp_path, ranks=2)
    assert done.returncode == 0, done.stderr
    lines = metrics(tmp_path)
    assert all(reports <= m.keys() for m in lines[1:])
    assert all(m["policy/rollout_gap"] < 1e-3 for m in lines[1:])
    assert lines[-1]["eval_accuracy"] >= lines[0]["eval_accuracy"] + 0.15
    if command[0] == "spo.py":  # what is remembered is compared: the policy moved, and the tracker forgets in bounds
        assert 0 < lines[-1]["tracker/distance"] < 1 and 0.875 <= lines[-1]["tracker/rho"] <= 0.96


@pytest.mark.parametrize("command, reports", [
    # The critic's mini-batch of 16 does not divide 24, and there is none.
    (["grpo.py", "--no-normalize", "--group-size", "3", "--prompts-per-step", "24", "--minibatch", "12"], "group/all_equal"),
    (["grpo.py", "--baseline", "rloo"], "group/all_equal"), (["grpo.py", "--baseline", "remax"], "greedy_reward"),
    (["ppo.py", "--value-loss", "bce", "--lam", "0.95"], "critic/auc_tenth_10"),
    (["spo.py", "--init-samples", "0", "--minibatch", "8"], "tracker/rho")])
def test_their_variants_run(tmp_path, command, reports):
    done = run(command[0], *QUICK, *command[1:], "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(metrics(tmp_path)) == 3 and metrics(tmp_path)[-1][reports] is not None


def test_in_the_critics_warm_up_the_policy_stays(tmp_path):
    done = run("ppo.py", *QUICK, "--critic-warmup", "1", "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    _, first, second = metrics(tmp_path)
    assert "policy/loss" not in first and first["critic/loss"] > 0
    assert second["policy/loss"] != 0 and second["critic/loss"] > 0


@pytest.mark.parametrize("script", ["grpo", "ppo", "spo"])
def test_help_explains_every_option(script):
    printed = run(f"{script}.py", "--help").stdout
    for field in dataclasses.fields(getattr(importlib.import_module(script), f"{script.upper()}Config")):
        assert f"--{field.name.replace('_', '-')}" in printed
        assert len(field.metadata["help"].splitlines()) == 1


@pytest.mark.parametrize("config, options, told", [
    (GRPOConfig, dict(baseline="remax", critic_model=str(ROOT / "builtin")), "--critic-model {} changes nothing: remax has no critic"),
    (GRPOConfig, dict(critic_lr=0.01), "--critic-lr 0.01 changes nothing: grpo has no critic"),
    (GRPOConfig, dict(baseline="remax", group_size=4), "--group-size 4 changes nothing: remax has one response per prompt"),
    (GRPOConfig, dict(baseline="rloo", normalize=False), "--no-normalize changes nothing: only grpo divides"),
    (SPOConfig, dict(critic_warmup=3), "--critic-warmup 3 changes nothing: spo has no critic"),
    (TrainConfig, dict(eval_samples=4), "--eval-samples 4 changes nothing: it is for --eval-benchmarks"), (GRPOConfig, {}, None)])
def test_options_that_change_nothing_are_told(config, options, told, tmp_path, capsys):
    c = config(output=str(tmp_path / "out"), **options)
    c.check()
    assert not c.critic_warmup  # or the policy would wait for a critic that there is not
    printed = capsys.readouterr().out
    assert printed == (f"warning: {told.format(ROOT / 'builtin')}\n" if told else "")


@pytest.mark.parametrize("command, message", [
    (["grpo.py", "--group-size", "1"], "--group-size 1: the samples are compared; give 2 or more"),
    (["grpo.py", "--oversample", "1", "--old-logprobs", "rollout"], "--oversample 1.0: grpo compares the responses"),
    (["spo.py", "--init-samples", "-1"], "--init-samples -1: must be 0 or more"),
    (["ppo.py", "--oversample", "1", "--old-logprobs", "rollout"], "--oversample 1.0: PPO needs finished responses"),
    (["ppo.py", "--critic-warmup", "3", "--steps", "3"], "--critic-warmup 3: with --steps 3 the policy would never be trained"),
    (["ppo.py", "--lam", "1.5"], "--lam 1.5: must be 0 or more and at most 1"),
    (["ppo.py", "--critic-model", "OTHER"], "reads other tokens than")])
def test_bad_input_is_one_clear_sentence(tmp_path, command, message, capsys):
    if "OTHER" in command:
        command = [*command[:-1], other_tokens(tmp_path / "other")]
    module = importlib.import_module(command[0].removesuffix(".py"))
    assert message in complaint(lambda a: train(getattr(module, f"{module.__name__.upper()}Config").parse("", a), None), [*command[1:], "--output", tmp_path / "out"],
                                capsys)
    assert not (tmp_path / "out").exists()


def other_tokens(folder):
    """The built-in model, but two of its tokens have changed places."""
    import json
    import shutil
    shutil.copytree(ROOT / "builtin", folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    (a, i), (b, j), *_ = vocabulary.items()
    vocabulary[a], vocabulary[b] = j, i
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def test_the_readmes_toy_baseline_is_a_whole_algorithm(tmp_path):
    """The README promises that a new algorithm is one file of at most 30 lines; this is that file."""
    toy, = re.findall(r"(?ms)^    (\"\"\"A running mean.*?RunningMean\)\n)", (ROOT / "README.md").read_text())
    lines = [line.removeprefix("    ") for line in toy.splitlines()]
    assert len(lines) <= 30
    (tmp_path / "running_mean.py").write_text("\n".join(lines))
    done = run(tmp_path / "running_mean.py", *QUICK, "--save-every", "2", "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    first, second = metrics(tmp_path / "out")[1:]
    assert first["baseline/mean"] == pytest.approx(first["reward"])
    assert second["baseline/mean"] == pytest.approx(first["reward"] + (second["reward"] - first["reward"]) / 4)
    done = run(tmp_path / "running_mean.py", *QUICK, "--steps", "3", "--resume", "--output", tmp_path / "out")
    assert "warning: RunningMean has no `state_dict`, so what `update` had learned is lost" in done.stdout, done.stderr


def test_a_state_that_begins_as_none_is_resumed(tmp_path):
    """Tensors and numpy's numbers, which the new run's baseline does not have yet."""
    (tmp_path / "mean.py").write_text("""
import numpy
from cli import clear_errors
from sppo import Baseline, TrainConfig, train

class Mean(Baseline):
    mean = count = None
    def advantages(self, batch):
        return batch.rewards - (0 if self.mean is None else self.mean)
    def update(self, batch):
        self.mean, self.count = batch.rewards.mean(), numpy.float32(len(batch.rewards) + (self.count or 0))
        return {"baseline/count": self.count}
    def state_dict(self):
        return {"mean": self.mean, "count": self.count}
    def load_state_dict(self, state):
        self.mean, self.count = state["mean"], state["count"]

with clear_errors():
    train(TrainConfig.parse(__doc__), Mean)
""")
    for options in ["--save-every", "2"], ["--steps", "3", "--resume"]:
        done = run(tmp_path / "mean.py", *QUICK, *options, "--output", tmp_path / "out")
        assert done.returncode == 0, done.stderr
    counts = [step["baseline/count"] for step in metrics(tmp_path / "out")[1:]]
    assert len(counts) == 3 and counts == [counts[0], 2 * counts[0], 3 * counts[0]]
    variance, mean = (metrics(tmp_path / "out")[3][name] for name in ("advantage/variance", "reward"))
    before = metrics(tmp_path / "out")[2]["reward"]
    assert variance == pytest.approx(mean * (1 - mean) + (mean - before) ** 2, abs=1e-4)
