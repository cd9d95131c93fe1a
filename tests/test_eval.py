"""eval.py: its metrics against enumeration, and the script as its user runs it."""
import itertools
import json
import math
import random
import shutil
import time
import types

import numpy as np
import pytest
import torch
from conftest import complaint, metrics, run, some_problems, started

from cli import BUILTIN_MODEL, InputError
from data import BOXED_SUFFIX, Problem
from engines import Response, fingerprint, sample_tokens
from eval import (
    BENCHMARKS,
    EvalConfig,
    RolloutFile,
    benchmark_metrics,
    bootstrap_interval,
    evaluate_policy,
    load_benchmark,
    load_eval_benchmarks,
    majority_at_k,
    pass_at_k,
    per_problem,
    read_rollouts,
    run_evaluation,
)
from machine import load_tokenizer
from rollout import Batch

ENGINES = ["vllm", "transformers"]
FIELDS = types.SimpleNamespace(prompt_field=None, answer_field=None, suffix=BOXED_SUFFIX, answer="boxed", reward=None)


def has(engine):
    import importlib.util
    return importlib.util.find_spec(engine) is not None


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_against_every_way_to_draw(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        draws = list(itertools.combinations([1] * c + [0] * (n - c), k))
        assert math.isclose(pass_at_k(n, c, k), sum(any(d) for d in draws) / len(draws), abs_tol=1e-12)


def test_majority_counts_values_not_spellings():
    halves = ["1/2", "0.5", "\\frac12"]
    assert majority_at_k([*halves, "3", "3"], "\\frac{1}{2}") == 1.0  # three against two, though 3 is the commonest text
    assert majority_at_k([*halves, "3", "3"], "3") == 0.0
    assert majority_at_k(["3", "1/2", "0.50", "3.0"], "0.5") == 0.5  # a tie is shared
    assert majority_at_k(["1", "2", "3"], "3") == pytest.approx(1 / 3)
    assert majority_at_k([None, None, "4"], "4") == 1.0  # who has no answer has no vote
    assert majority_at_k([None, None], "4") == 0.0 and majority_at_k([], "4") == 0.0
    assert majority_at_k(["x+1", "1+x", "x"], "1 + x") == 1.0


def line(problem, sample, reward, answer, tokens=10, finished=True):
    return {"benchmark": "b", "problem": problem, "sample": sample, "reward": reward, "gold": "1", "answer": answer,
            "tokens": tokens, "finished": finished, "question": f"question {problem}", "response": ""}


def test_per_problem():
    records = [line(0, 0, 1.0, "1"), line(0, 1, 1.0, "1.0"), line(0, 2, 0.0, "2", 30), line(0, 3, 0.0, None, 50, False),
               line(7, 1, 0.0, "3"), line(7, 0, 0.0, "3"), line(7, 3, 1.0, "1"), line(7, 2, 0.0, None)]
    values = {name: array.tolist() for name, array in per_problem(records).items()}
    assert values["avg@4"] == [0.5, 0.25] and values["maj@4"] == [1.0, 0.0]
    assert values["pass@1"] == [0.5, 0.25] and values["pass@4"] == [1.0, 1.0]
    assert values["pass@2"] == pytest.approx([1 - 1 / 6, 1 - 3 / 6])
    assert values["tokens"] == [25, 10] and values["cut off"] == [0.25, 0]


def test_interval():
    """For the mean of many independent values, the bootstrap agrees with the normal approximation."""
    values = np.random.default_rng(1).random(400)
    low, high = bootstrap_interval(values)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.004) and high == pytest.approx(values.mean() + half, abs=0.004)
    low, high = bootstrap_interval([values, values + 1])  # the mean of two benchmarks: half the variance
    assert (high - low) / 2 == pytest.approx(half / math.sqrt(2), rel=0.1)


@pytest.mark.parametrize("temperature, top_p, top_k", [(1.0, 1.0, 0), (0.5, 1.0, 0), (1.0, 0.8, 0), (0.0, 1.0, 0), (1.0, 1.0, 3),
                                                       (1.0, 0.5, 4)])
def test_the_transformers_sampler_draws_from_the_distribution_that_it_reports(temperature, top_p, top_k):
    torch.manual_seed(0)
    logits, count = torch.randn(1, 12) * 2, 20_000
    if temperature:
        p = (logits / temperature).softmax(-1)[0]
        order = p.argsort(descending=True).tolist()[: top_k or None]
        p /= sum(p[i].item() for i in order)
        kept = next(n for n in range(1, len(order) + 1) if sum(p[i].item() for i in order[:n]) >= top_p - 1e-6)
        expected = torch.tensor([p[i].item() if i in order[:kept] else 0.0 for i in range(12)])
        expected /= expected.sum()
    else:
        expected = torch.nn.functional.one_hot(logits.argmax(), 12).float()
    uniform, temperatures = torch.rand(count), torch.full((count,), temperature)
    tokens, logprobs = sample_tokens(logits.expand(count, -1), temperatures, top_p, top_k, uniform)
    assert (torch.bincount(tokens, minlength=12) / count - expected).abs().max() < 0.015
    if temperature:
        assert torch.allclose(logprobs.exp(), expected[tokens], atol=1e-5)
    again, _ = sample_tokens(logits.expand(3, -1), temperatures[:3], top_p, top_k, uniform[[5, 2, 9]])
    assert again.tolist() == tokens[[5, 2, 9]].tolist()  # a row depends on its own random number alone


# ---- benchmarks -----------------------------------------------------------------------------------------------------

def test_benchmarks_of_a_file_and_missing_ones(tmp_path):
    (tmp_path / "aime24.jsonl").write_text('{"problem": "2+2?", "answer": "4"}\n')
    assert [p.answer for p in load_benchmark(str(tmp_path / "aime24.jsonl"), FIELDS)] == ["4"]
    with pytest.raises(InputError, match=r"math-ai/amc23.*without a network, give a file"):
        load_benchmark("amc23", FIELDS)
    with pytest.raises(InputError, match="mathematics: no such benchmark; give one of aime24"):
        load_benchmark("mathematics", FIELDS)
    assert {"aime24", "aime25", "amc23", "math500", "minerva", "brumo25", "hmmt25", "gsm8k"} <= set(BENCHMARKS)


def test_the_built_in_benchmark_was_never_trained_on():
    from data import load_problems
    problems = load_benchmark("chain", FIELDS)
    trained = {p.messages[0]["content"] for p in load_problems("chain")}
    assert len(problems) == 256 and isinstance(problems[0], Problem)
    assert not trained & {p.messages[0]["content"] for p in problems}


# ---- the script -----------------------------------------------------------------------------------------------------

def rewards(file):
    return {key: (r["reward"], r["response"]) for key, r in read_rollouts(file)[1].items()}


@pytest.mark.parametrize("engine", ENGINES)
def test_stopped_and_resumed_is_as_if_never_stopped(tmp_path, engine):
    """Killed in the middle, its last line cut in two, and taken up again by two ranks: the same responses, each once."""
    if not has(engine):
        pytest.skip(f"{engine} is not installed")
    problems = some_problems(tmp_path / "some.jsonl", 48)
    command = ["eval.py", "--engine", engine, "--benchmarks", problems, "--samples", "2", "--output"]
    whole = run(*command, tmp_path / "whole.jsonl")
    assert whole.returncode == 0, whole.stderr
    stopped = tmp_path / "stopped.jsonl"
    text = ""
    while not 20 < text.count("\n") < 94:  # until it was caught in the middle: on a busy machine it may be over first
        stopped.unlink(missing_ok=True)
        with started(*command, stopped) as ([process], _):  # and killed when the block ends
            while process.is_alive() and (not stopped.exists() or stopped.read_text().count("\n") < 30):
                time.sleep(0.02)
            assert process.exitcode in (None, 0)
        text = stopped.read_text()
    stopped.write_text(text[:-20])
    resumed = run(*command, stopped, ranks=2)
    assert resumed.returncode == 0, resumed.stderr
    assert "of 96 responses are there already" in resumed.stdout
    assert rewards(stopped) == rewards(tmp_path / "whole.jsonl")
    assert stopped.read_text().count("\n") == 1 + 96
    table = [[text for text in done.stdout.splitlines() if text.startswith("some ")] for done in (whole, resumed)]
    assert table[0] == table[1] and len(table[0]) == 1
    if engine == "transformers":
        again = run(*command, stopped)  # nothing is left to sample: no engine is started
        assert "96 of 96" in again.stdout and table[0][0] in again.stdout


def test_other_settings_or_problems_are_not_mixed(tmp_path):
    file = tmp_path / "e.jsonl"
    (tmp_path / "p.jsonl").write_text('{"problem": "Compute 1+1 modulo 10.", "answer": "2"}\n')
    command = ["eval.py", "--benchmarks", tmp_path / "p.jsonl", "--output", file, "--engine", "transformers", "--samples", "2"]
    assert run(*command).returncode == 0
    assert len(read_rollouts(file)[1]) == 2
    assert len(json.loads((tmp_path / "e.json").read_text())[str(tmp_path / "p.jsonl")]["pass@2"]) == 3
    done = run(*command, "--temperature", "0.5")
    assert done.returncode == 2 and "holds an evaluation with temperature 1.0, and this one has 0.5" in done.stderr
    done = run(*command[:-1], "1")
    assert done.returncode == 2 and "has 2 samples per problem, and its table would become one of 1; give --samples 2" in done.stderr
    (tmp_path / "p.jsonl").write_text('{"problem": "Compute 1+2 modulo 10.", "answer": "3"}\n')
    done = run(*command)
    assert done.returncode == 2 and "has another text or answer" in done.stderr and "Traceback" not in done.stderr
    assert len(read_rollouts(file)[1]) == 2  # nothing was lost


def test_another_template_or_end_is_another_model(tmp_path):
    tokenizer, marks = load_tokenizer(BUILTIN_MODEL), []
    for template, end in ((tokenizer.chat_template, 2), (tokenizer.chat_template, 3), ("{{ messages }}", 2)):
        shutil.copytree(BUILTIN_MODEL, tmp_path / "model", dirs_exist_ok=True)
        (tmp_path / "model/generation_config.json").write_text(json.dumps({"eos_token_id": end}))
        tokenizer.chat_template = template
        marks.append(fingerprint(tmp_path / "model", tokenizer, False))
        assert marks[-1] == fingerprint(tmp_path / "model", tokenizer, False)
    assert len({*marks}) == 3


def test_benchmarks_whose_metrics_would_have_one_name_are_refused(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "test.jsonl").write_text('{"problem": "1+1?", "answer": "2"}\n')
    names = tuple(f"{tmp_path}/{folder}/test.jsonl" for folder in "ab")
    c = types.SimpleNamespace(**vars(FIELDS), eval_benchmarks=names, max_prompt_tokens=64)
    with pytest.raises(InputError, match="two are the same; rename one"):
        load_eval_benchmarks(c, load_tokenizer(BUILTIN_MODEL))


@pytest.mark.parametrize("name, text, message", [
    ("e.jsonl", '{"problem": "1?", "answer": "1"}\n{"problem": "2?"', "cannot be read"),
    ("e.jsonl", '{"problem": "1?", "answer": "1"}', "was not written by eval.py"), ("e.json", "[]", "would be overwritten")])
def test_a_file_that_is_no_evaluation_is_not_touched(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    done = run("eval.py", "--benchmarks", "chain", "--output", tmp_path / "e.jsonl", "--engine", "transformers")
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {name: text}


def test_a_disk_that_takes_a_part_of_a_line_is_asked_again(tmp_path):
    class Slow:
        def write(self, data):
            written.extend(data[:7])
            return len(data[:7])

    file, written = RolloutFile.__new__(RolloutFile), bytearray()
    file.file = Slow()
    file.write({"problem": "a long line"})
    assert json.loads(written) == {"problem": "a long line"} and written.endswith(b"\n")


def test_benchmarks_while_training_by_hand():
    """Two problems, of which one was solved once in two samples; one of four responses was cut off."""
    responses = [Response([1] * n, [-1.0] * n, n < 6) for n in (2, 6, 3, 5)]
    batch = Batch([None] * 4, [[1]] * 4, responses, torch.tensor([0.0, 0.0, 1.0, 0.0]))
    assert benchmark_metrics("some/file.jsonl", batch, 2) == {
        "eval/file/avg@2": 0.25, "eval/file/pass@2": 0.5, "eval/file/tokens": 4.0, "eval/file/cut_off": 0.25}


@pytest.mark.parametrize("arguments, message", [
    (["--samples", "0"], "--samples 0: must be greater than 0"), (["--top-p", "1.5"], "--top-p 1.5: must be greater than 0 and at most 1"),
    (["--temperature", "0"], "greedy responses are all the same; give --samples 1"),
    (["--benchmarks", "nothing"], "nothing: no such benchmark"), (["--model", "no/such"], "no/such: its tokenizer cannot be"),
    (["--output", "a.json"], "give it a name that ends with .jsonl")])
def test_bad_input_is_one_clear_sentence(arguments, message, capsys):
    error = complaint(lambda given: run_evaluation(EvalConfig.parse("", given)), arguments, capsys)
    assert message in error and error.count("\n") == 1


def test_benchmarks_while_training_and_a_runs_folder_as_model(tmp_path):
    (tmp_path / "p.jsonl").write_text("".join(f'{{"problem": "Compute {i}+1 modulo 10.", "answer": "{(i + 1) % 10}"}}\n'
                                              for i in range(8)))
    done = run("sppo.py", "--engine", "transformers", "--steps", "2", "--prompts-per-step", "8", "--minibatch", "8", "--eval-every",
               "2", "--eval-samples", "2", "--dataset", "chain:100", "--eval-problems", "8", "--eval-benchmarks", tmp_path / "p.jsonl", "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    for m in metrics(tmp_path / "run")[::2]:
        assert {"eval/p/avg@2", "eval/p/pass@2", "eval/p/tokens", "eval/p/cut_off"} <= m.keys()
    done = run("eval.py", "--model", tmp_path / "run", "--benchmarks", tmp_path / "p.jsonl", "--samples", "2", "--dtype",
               "float32", "--max-response-tokens", "64", "--engine", "transformers", "--output", tmp_path / "e.jsonl")
    assert done.returncode == 0, done.stderr
    assert "p                           8" in done.stdout
    (tmp_path / "long.jsonl").write_text('{"problem": "Compute ' + "1+" * 50 + '1.", "answer": "51"}\n')
    done = run("sppo.py", "--eval-benchmarks", tmp_path / "long.jsonl")
    assert done.returncode == 2 and "has a prompt of" in done.stderr


@pytest.mark.parametrize("failed", [2, 3])
def test_an_evaluation_whose_verifications_fail_says_so(failed, capsys):
    batch, shown = types.SimpleNamespace(responses=[None] * 4), []
    sampler = types.SimpleNamespace(sample=lambda problems: batch, random=random.Random(), metrics={
        "reward/timeouts": failed, "reward/errors": 0, "rollout/idle": 9.0})
    a_run = types.SimpleNamespace(config=types.SimpleNamespace(seed=0), benchmarks={}, held_out=[1], sampler=sampler, tokenizer=None)
    evaluate_policy(a_run, types.SimpleNamespace(evaluated=lambda *arguments: shown.append(arguments)), 1)
    assert shown == [(1, batch, None)]
    assert ("3 verifications of an evaluation of 4 responses failed" in capsys.readouterr().out) == (failed == 3)
