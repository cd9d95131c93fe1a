"""Options: what is given, what a model brings along, and what is refused."""
import dataclasses
import json
import re
from pathlib import Path

import pytest
from conftest import complaint

from checkpoint import check_output
from cli import BUILTIN_MODEL, CommandLine, InputError, option
from eval import EvalConfig
from grpo import GRPOConfig
from ppo import PPOConfig
from sppo import TrainConfig


def finished_run(folder, **options):
    (folder / "model").mkdir(parents=True)
    (folder / "model/config.json").write_text("{}")
    (folder / "metrics.jsonl").write_text("")
    (folder / "held_out.jsonl").write_text("")
    (folder / "config.json").write_text(json.dumps({**dataclasses.asdict(TrainConfig(model="no/such")), **options}))
    return str(folder)


def test_defaults_are_the_same_from_python_and_on_the_command_line():
    assert TrainConfig() == TrainConfig.parse("", []) and TrainConfig().steps == 70 and TrainConfig().dtype == "float32"
    assert TrainConfig(lr=0.0, model=BUILTIN_MODEL) == TrainConfig.parse("", ["--lr", "0"])
    assert TrainConfig(model="no/such").steps == TrainConfig.defaults()["steps"] == TrainConfig.parse("", ["--model", "no/such"]).steps
    assert GRPOConfig(baseline="rloo").output == "runs/rloo" and GRPOConfig().steps == 20
    papers, ours = PPOConfig(model="no/such"), PPOConfig()
    assert (papers.critic_warmup, papers.critic_lr, papers.lr) == (50, 1e-5, 1e-6)
    assert (ours.critic_warmup, ours.critic_lr) == (0, 1e-3)
    assert TrainConfig(checkpoint_activations=True).checkpoint_activations and not TrainConfig().checkpoint_activations


def test_a_trained_model_brings_its_runs_options_and_what_is_typed_has_precedence(tmp_path, capsys):
    run = finished_run(tmp_path / "run", max_response_tokens=77, temperature=0.9, dataset="my.csv", prompt_field="q", samples="all",
                       trust_remote_code=True, lr=1e-5)
    for model in (run, f"{run}/model"):
        config = TrainConfig(model=model, temperature=0.8, output=str(tmp_path / "next"))
        assert (config.model, config.max_response_tokens, config.temperature, config.lr) == (f"{run}/model", 77, 0.8, 1e-5)
        assert config.samples == "8" and not config.trust_remote_code and config.steps == TrainConfig.defaults()["steps"]
        CommandLine.check(config)
        told = capsys.readouterr().out
        assert told.startswith(f"{run}: was trained with") and "--max-response-tokens 77" in told and "--temperature" not in told
        assert told.count("\n") == 1
        evaluated = EvalConfig(model=model)
        assert (evaluated.benchmarks, evaluated.max_response_tokens, evaluated.prompt_field) == ((f"{run}/held_out.jsonl",), 77, "q")
        assert EvalConfig(model=model, benchmarks=("aime24",)).benchmarks == ("aime24",)
    chain = EvalConfig(model=finished_run(tmp_path / "chain", dataset="chain:1280", dtype="float32", temperature=1.0))
    assert (chain.benchmarks, chain.top_p, chain.temperature) == (("chain",), 1.0, 1.0)
    own = EvalConfig(model=finished_run(tmp_path / "own", model=BUILTIN_MODEL, dataset="my.csv"))
    assert own.top_p == 1.0  # the built-in model on other problems
    Path(chain.model, "step").write_text("20")
    for step, older in (20, False), (30, True):  # the run was resumed, and has not ended yet
        Path(chain.model).with_name("metrics.jsonl").write_text(f'{{"step": 0}}\n{{"step": {step}}}\n')
        capsys.readouterr()
        CommandLine.check(chain)
        assert ("its model is of step 20, but the run has gone on to step 30; --resume" in capsys.readouterr().out) == older
    coded = finished_run(tmp_path / "coded", reward="mine.py:score")
    with pytest.raises(InputError, match="was trained with --reward mine.py:score; type it again, because it runs code"):
        EvalConfig(model=coded)
    assert EvalConfig(model=coded, reward="mine.py:score").reward and not EvalConfig(model=coded, reward="").reward
    (tmp_path / "run/model/config.json").unlink()
    with pytest.raises(InputError, match="is a run that has not ended"):
        TrainConfig(model=run)


def test_a_finished_run_is_not_overwritten(tmp_path):
    run = finished_run(tmp_path / "run")
    check_output(tmp_path / "new", resume=False)
    for resume in (False, True):
        with pytest.raises(InputError, match="holds a finished run without checkpoints; give another --output .* --model"):
            check_output(run, resume)
    killed = tmp_path / "killed"
    killed.mkdir()
    (killed / "metrics.jsonl").write_text('{"step": 0, "eval_accuracy": 0.3}\n')
    check_output(killed, resume=False)  # there is nothing to lose yet
    (killed / "metrics.jsonl").write_text('{"step": 0, "eval_accuracy": 0.3}\n{"step": 1, "reward": 0.5}\n')
    check_output(killed, resume=True)
    with pytest.raises(InputError, match="was stopped before its first checkpoint; give another --output, or --resume"):
        check_output(killed, resume=False)
    (tmp_path / "run/checkpoints/step-00000001").mkdir(parents=True)
    check_output(run, resume=True)
    with pytest.raises(InputError, match="holds checkpoints of a run; give --resume or another --output .*more --steps"):
        check_output(run, resume=False)


@dataclasses.dataclass
class Config(CommandLine):
    model: str = option("m", "a model")
    gpus: int = option(1, "cards", positive=True)
    names: tuple[str, ...] = option(("a",), "names")


@pytest.mark.parametrize("arguments", [["x", "--gpus", "4"], ["--gpus", "4", "x"], ["--gpus", "4", "--model", "x"]])
def test_the_positional_may_stand_anywhere(arguments):
    assert Config.parse("", arguments, "model") == Config("x", 4, ("a",))


@pytest.mark.parametrize("arguments, message", [
    (["--stpes", "5"], "--stpes: there is no such option; did you mean --steps?"),
    (["--max-tokens=5"], "--max-tokens: there is no such option; did you mean --max-prompt-tokens?"),
    (["--qqq"], "--qqq: there is no such option; --help lists all of them"), (["chain"], "chain: there is no such option"),
    (["--eval-benchmarks", "nope", "--eval-every", "0"], "--eval-benchmarks nope: --eval-every 0 never evaluates"),
    (["--dual-clip", "0.5"], "--dual-clip 0.5: would also bind where the policy has not moved; give more than 1"),
    (["--rollout-correction", "1"], "--rollout-correction 1.0: would also bind"),
    (["--clip-low", "1.5"], "--clip-low 1.5: must be 0 or more and at most 1"),
    (["--lr", "inf"], "--lr inf: must be 0 or more and finite"), (["--lr", "nan"], "--lr nan: must be 0 or more and finite")])
def test_bad_options_are_one_clear_sentence(arguments, message, capsys):
    assert message in complaint(lambda a: TrainConfig.parse("", a).check(), arguments, capsys)


@pytest.mark.parametrize("options, message", [
    (dict(engine="vlm"), "--engine vlm: must be one of auto, vllm, transformers"), (dict(steps="2"), "--steps '2': must be a whole number"),
    (dict(steps=2.0), "--steps 2.0: must be a whole number"), (dict(lr="1e-4"), "--lr '1e-4': must be a number"),
    (dict(resume=1), "--resume 1: must be True or False"), (dict(lr=True), "--lr True: must be a number"),
    (dict(eval_benchmarks="chain"), "--eval-benchmarks 'chain': must be a list of texts"), (dict(output=""), "--output: is empty"),
    (dict(seed=2**70), "must be 0 or more and at most 9223372036854775807")])
def test_bad_values_from_python(options, message):
    with pytest.raises(InputError) as error:
        CommandLine.check(TrainConfig(**options))
    assert message in str(error.value)


def test_natural_values_from_python(tmp_path):
    config = TrainConfig(output=tmp_path, dataset=tmp_path / "x.csv", eval_benchmarks=["chain"], samples=4, lr=1, suffix="", reward="",
                         critic_model=finished_run(tmp_path / "critic"))
    CommandLine.check(config)
    assert (config.output, config.eval_benchmarks, config.samples) == (str(tmp_path), ("chain",), "4")
    assert (config.suffix, config.reward, config.critic_model) == ("", None, f"{tmp_path}/critic/model")
    json.dumps(dataclasses.asdict(config))


@pytest.mark.parametrize("width", [70, 140])
def test_help_is_as_wide_as_the_terminal(monkeypatch, capsys, width):
    import sppo
    monkeypatch.setenv("COLUMNS", str(width))
    with pytest.raises(SystemExit):
        TrainConfig.parse(sppo.__doc__, ["--help"])
    printed = capsys.readouterr().out
    prose = [line for line in printed.splitlines() if not re.match("    ", line)]
    assert width - 40 < max(map(len, prose)) <= width
    assert "--dataset FILE.jsonl" in printed
