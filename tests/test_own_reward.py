"""A reward of the user's own: good ones, bad ones, the two examples, and what each metric makes of rewards in between."""
import itertools
import json
import math
import os
import resource
import signal
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, metrics, run, some_problems, started
from test_eval import line

from cli import BUILTIN_MODEL
from critic import auc, value_metrics
from data import BOXED_SUFFIX, load_problems, load_tokenizer, training_problems
from eval import EvalConfig, best_of_k, load_benchmark, pass_at_k, per_problem
from grpo import group_advantages
from log import skill
from reward import Verifier, decode
from spo import ValueTracker
from sppo import TrainConfig

REWARDS = '''
import os, time
calls = 0

def half(response, answer):
    return 0.5 * (str(answer) in response) + 0.5 * response.endswith("!")

def one(response):
    return 1.0

def bad(response, answer):
    global calls
    calls += 1
    if response == "raises":
        raise KeyError("no such key")
    if response == "cuda" and os.environ["CUDA_VISIBLE_DEVICES"] == "":  # a worker takes no memory of the trainer's GPUs
        raise RuntimeError("No CUDA GPUs are available")
    if response == "ends":
        os._exit(3)
    while response == "never":
        pass
    print("0.123")
    return {"none": None, "nan": float("nan"), "two": 2.0, "text": "1", "calls": calls / 10, "yes": True}[response]
'''


@pytest.fixture
def module(tmp_path):
    (tmp_path / "own.py").write_text(REWARDS)
    return tmp_path / "own.py"


def test_a_function_decides(module):
    verifier = Verifier(2, reward=f"{module}:half")
    verifier.check()
    assert verifier.score(["it is 5!", "5", "no", ""], ["5"] * 4) == [1.0, 0.5, 0.0, 0.0]
    assert verifier.unverifiable(['{"any": "thing"}', ""]) == [] and not verifier.errors
    verifier.close()


def test_a_bad_function_costs_its_reward_and_is_counted(module, capfd):
    verifier = Verifier(1, timeout=0.3, reward=f"{module}:bad")
    responses = ["raises", "none", "nan", "two", "text", "cuda", "ends", "never", "yes", "calls", "calls"]
    # The last two: each call is in a new process, which no earlier response has changed.
    assert verifier.score(responses, [""] * len(responses)) == [0.0] * 8 + [1.0, 0.1, 0.1]
    verifier.close()
    assert (verifier.errors, verifier.timeouts, verifier.crashes) == (6, 1, 1)
    said = capfd.readouterr().err
    assert "own.py:bad: KeyError: 'no such key'; the reward is 0 (see reward/timeouts, " in said and said.count("\n") == 1


def test_it_may_import_a_neighbour_called_reward_and_have_data_classes(tmp_path):
    (tmp_path / "reward.py").write_text("def share(text):\n    return len(text) / 10\n")
    (tmp_path / "own.py").write_text("""from __future__ import annotations
import pickle
from dataclasses import dataclass
from reward import share
import os
assert os.path.isabs(__file__)  # it may read a file beside it

@dataclass
class Verdict:
    share: float

def half(response, answer):
    return pickle.loads(pickle.dumps(Verdict(share(response)))).share
""")
    verifier = Verifier(1, reward=f"{tmp_path}/own.py:half")
    assert verifier.score(["12345"], [""]) == [0.5] and not verifier.errors
    verifier.close()


def test_many_open_files_change_nothing(module):
    """`select` takes none above the 1,024th."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most[1], most[1]))
    if 0 < most[1] < 1200:
        pytest.skip("this machine allows too few")
    files = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        verifier = Verifier(1, reward=f"{module}:half")
        assert verifier.score(["5!"], ["5"]) == [1.0]
        verifier.close()
    finally:
        for file in files:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, most)


def test_it_may_stop_the_timers_but_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr("reward.GRACE", 0)
    (tmp_path / "own.py").write_text("""import signal, time
def half(response, answer):
    signal.alarm(9)
    signal.alarm(0)
    time.sleep(600 if response == "waits" else 0)
    return 0.5
""")
    verifier = Verifier(1, timeout=0.1, reward=f"{tmp_path}/own.py:half")
    assert verifier.score(["here", "waits", "here"], [""] * 3) == [0.5, 0.0, 0.5]
    assert (verifier.timeouts, verifier.crashes, verifier.errors) == (1, 0, 0)
    verifier.close()


def test_a_file_that_is_edited_or_lost_while_it_is_used_stays_as_it_was(module):
    text = "# coding: latin-1\ndef half(response, answer):\n    return {} * (response == 'Möbius')\n"
    module.write_text(text.format(0.5), encoding="latin-1")
    verifier, mark = Verifier(1, reward=f"{module}:half"), Verifier(1, reward=f"{module}:half").code
    assert verifier.score(["Möbius"], [""]) == [0.5] and verifier.code == mark != f"{module}:half"
    module.write_text(text.format(0.25), encoding="latin-1")
    assert Verifier(1, reward=f"{module}:half").code != mark == verifier.code
    module.unlink()
    worker = verifier._idle.get()
    worker.kill()
    verifier._idle.put(worker)
    scores = verifier.score(["Möbius"] * 3, [""] * 3)  # its child may answer once more; then a new process does
    assert scores[2] == 0.5 and {*scores} == {0.0, 0.5} and verifier.crashes == 1
    verifier.close()


def test_the_first_that_takes_too_long_is_said(module, capfd):
    verifier = Verifier(1, timeout=0.2, reward=f"{module}:bad")
    assert verifier.score(["never", "never"], ["", ""]) == [0.0, 0.0]
    verifier.close()
    said = capfd.readouterr().err
    assert "own.py:bad: it took more than 0.2 s; the reward is 0" in said and said.count("\n") == 1


@pytest.mark.parametrize("reward, message", [
    ("no.py:f", "there is no file 'no.py'"), ("f", "it names no function"), ("{own}:one", "too many positional"), ("{own}:absent", "own.py has no function 'absent'"), ("{own}", "give FILE.py:FUNCTION"),
    ("{broken}:f", "ZeroDivisionError"), ("{exits}:f", "SystemExit")])
def test_what_cannot_be_imported_is_one_sentence(module, reward, message):
    (module.parent / "broken.py").write_text("1 / 0")
    (module.parent / "exits.py").write_text("import sys; sys.exit(3)")
    verifier = Verifier(1, reward=reward.format(own=module, **{n: module.with_name(f"{n}.py") for n in ("broken", "exits")}))
    with pytest.raises(ValueError, match="cannot be used") as error:
        verifier.check()
    assert message in str(error.value) and "\n" not in str(error.value)


# ---- rewards in between --------------------------------------------------------------------------------------------

def test_best_of_k_is_pass_at_k_and_the_mean_of_the_best_of_every_draw():
    for n, k in itertools.product(range(1, 7), range(1, 7)):
        if k <= n:
            assert best_of_k([1.0] * 2 + [0.0] * (n - 2) if n > 2 else [0.0] * n, k) == pytest.approx(
                pass_at_k(n, 2 if n > 2 else 0, k))
            rewards = [random_reward(n, i) for i in range(n)]
            every = [max(draw) for draw in itertools.combinations(rewards, k)]
            assert best_of_k(rewards, k) == pytest.approx(sum(every) / len(every))


def random_reward(n, i):
    return (7 * n + 5 * i) % 11 / 10


def test_the_table_of_partial_rewards():
    records = [line(0, 0, 0.5, None), line(0, 1, 1.0, None), line(1, 0, 0.25, None), line(1, 1, 0.0, None)]
    values = {name: array.tolist() for name, array in per_problem(records, None).items()}
    assert values["avg@2"] == [0.75, 0.125] and values["pass@2"] == [1.0, 0.25] and values["pass@1"] == [0.75, 0.125]
    assert not any(name.startswith("maj") for name in values)  # only the built-in reward says what a response's answer is


def test_metrics_of_training():
    values, rewards = np.array([0.2, 0.6, 0.4, 0.4]), np.array([0.0, 0.5, 1.0, 0.5])
    pairs = [(i, j) for i, j in itertools.product(range(4), repeat=2) if rewards[i] > rewards[j]]
    naive = sum((values[i] > values[j]) + 0.5 * (values[i] == values[j]) for i, j in pairs) / len(pairs)
    assert auc(values, rewards) == pytest.approx(naive)
    assert auc(values, np.full(4, 0.5)) is None
    surprise = [-r * math.log(v) - (1 - r) * math.log(1 - v) for v, r in zip(values, rewards, strict=True)]
    known = value_metrics(torch.tensor(values), torch.tensor(rewards))
    assert known["critic/bce"] == pytest.approx(sum(surprise) / 4)
    constant = -sum(r * math.log(0.4) + (1 - r) * math.log(0.6) for r in rewards) / 4
    assert skill(known["critic/bce"], rewards.mean(), [0.3, 0.5]) == pytest.approx(1 - known["critic/bce"] / constant)
    assert group_advantages(torch.tensor([0.5, 0.5, 0.5, 1.0]), 2)[:2].tolist() == [0, 0]
    tracker = ValueTracker(1)
    before = tracker.values([0])[0]
    tracker.update([0], [0.75], np.array([0.0]))
    assert before == 0.5 < tracker.values([0])[0] < 0.75


# ---- from the command line -----------------------------------------------------------------------------------------

def test_two_ranks_train_are_killed_go_on_and_are_evaluated(tmp_path):
    """With a reward for short answers too: neither 0 nor 1."""
    (tmp_path / "short.py").write_text("from reward import verify\n\n\ndef short(response, answer):\n"
                                       "    return 0.5 * verify(response, answer) + 0.5 * 0.9 ** (len(response) / 10)\n")
    problems = some_problems(tmp_path / "some.jsonl", 16)
    own = ["--reward", f"{tmp_path / 'short.py'}:short"]
    command = ["sppo.py", *own, "--steps", "4", "--prompts-per-step", "16", "--minibatch", "8", "--eval-problems", "8",
               "--eval-every", "4", "--save-every", "1", "--output", tmp_path / "run", "--engine", "transformers",
               "--dataset", "chain:200", "--max-response-tokens", "64"]
    with started(*command, ranks=2) as (processes, _):
        until = time.monotonic() + 300
        while not (tmp_path / "run/checkpoints/step-00000001").exists():
            assert all(process.is_alive() for process in processes) and time.monotonic() < until
            time.sleep(0.05)
        for process in processes:
            os.kill(process.pid, signal.SIGKILL)
    done = run(*command, "--resume", ranks=2)
    assert done.returncode == 0, done.stderr
    assert "Resuming after step" in done.stdout and "[reward 0." in done.stdout
    steps = metrics(tmp_path / "run")
    assert [m["step"] for m in steps] == [0, 1, 2, 3, 4]
    assert all(0.1 < m["reward"] < 0.9 and m["reward/errors"] == 0 and m["critic/auc"] for m in steps[1:])
    done = run("eval.py", *own, "--model", tmp_path / "run", "--benchmarks", problems, "--samples", "2", "--dtype", "float32",
               "--max-response-tokens", "64", "--output", tmp_path / "e.jsonl", "--engine", "transformers", ranks=2)
    assert done.returncode == 0, done.stderr
    rewards = [json.loads(text)["reward"] for text in (tmp_path / "e.jsonl").read_text().splitlines()[1:]]
    table = json.loads((tmp_path / "e.json").read_text())[str(problems)]
    assert len(rewards) == 32 and table["avg@2"][0] == pytest.approx(np.mean(rewards)) and "maj@2" not in table
    with (tmp_path / "short.py").open("a") as file:
        file.write("# edited\n")
    again = run("eval.py", *own, "--model", tmp_path / "run", "--benchmarks", problems, "--samples", "2", "--dtype", "float32",
                "--max-response-tokens", "64", "--output", tmp_path / "e.jsonl", "--engine", "transformers")
    assert again.returncode == 2 and "short.py:short (" in again.stderr  # with a mark of the file's content
    again = run("eval.py", "--reward", "", "--model", tmp_path / "run", "--benchmarks", problems, "--samples", "2", "--dtype", "float32",
                "--max-response-tokens", "64", "--output", tmp_path / "e.jsonl", "--engine", "transformers")
    assert again.returncode == 2 and "holds an evaluation with reward " in again.stderr


def test_a_reward_that_cannot_be_used_stops_a_run_at_once(tmp_path):
    done = run("sppo.py", "--reward", "no.py:f", "--output", tmp_path)
    assert done.returncode == 2 and "--reward no.py:f: cannot be used" in done.stderr and "Traceback" not in done.stderr


def test_an_evaluation_tells_how_many_verifications_failed(module, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"problem": "Compute 1+1 modulo 10.", "answer": "raise"}\n')
    done = run("eval.py", "--reward", f"{module}:bad", "--benchmarks", tmp_path / "p.jsonl", "--samples", "2", "--output",
               tmp_path / "e.jsonl", "--engine", "transformers")
    assert done.returncode == 0 and "warning: 2 verifications took too long or failed" in done.stdout, done.stderr
    again = run("eval.py", "--reward", f"{module}:bad", "--benchmarks", tmp_path / "p.jsonl", "--samples", "2", "--output",
                tmp_path / "e.jsonl", "--engine", "transformers")  # all responses are there already
    assert "warning: 2 verifications took too long or failed" in again.stdout, again.stderr


def test_suffix_and_answers_of_any_kind(tmp_path):
    rows = [{"prompt": "Who?", "answer": '{"a": "\\\\boxed{1}"}'}, {"prompt": "What?", "answer": {"b": [1]}}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    problems = load_problems(str(tmp_path / "x.jsonl"), suffix="In JSON.", own_reward=True)
    assert [p.answer for p in problems] == ['{"a": "\\\\boxed{1}"}', '{"b": [1]}']
    assert [p.messages[-1]["content"] for p in problems] == ["Who? In JSON.", "What? In JSON."]
    assert load_problems(str(tmp_path / "x.jsonl"), suffix="", own_reward=True)[0].messages[-1]["content"] == "Who?"
    (tmp_path / "y.jsonl").write_text(json.dumps({"prompt": 'A "boxed" end? Then put the answer after "####".', "answer": "5"}))
    problem, = load_problems(str(tmp_path / "y.jsonl"))
    assert problem.messages[-1]["content"] == f'A "boxed" end? {BOXED_SUFFIX}'


@pytest.mark.parametrize("options, warned", [
    ({}, False), ({"suffix": ""}, True), ({"suffix": "", "answer": "any"}, False), ({"suffix": "", "reward": "f.py:f"}, False)])
def test_answers_in_boxes_that_no_prompt_asks_for_are_warned_of(options, warned, tmp_path, capsys):
    """As in eval.py on a benchmark after a run with a reward of one's own, whose --suffix "" comes along."""
    load_benchmark("chain", EvalConfig(**options))
    (tmp_path / "p.jsonl").write_text('{"problem": "1 + 1?", "answer": "2"}\n')
    training_problems(TrainConfig(dataset=str(tmp_path / "p.jsonl"), **options), load_tokenizer(BUILTIN_MODEL))
    assert capsys.readouterr().out.count("asks for a \\boxed{} answer, and without one a response earns 0") == 2 * warned


def test_thinking_stays_where_its_marks_are_special_tokens():
    tokenizer = load_tokenizer(BUILTIN_MODEL)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>", "<pad2>"]})
    ids = tokenizer.convert_tokens_to_ids(["<think>", "3", "</think>", "4", "<pad2>"]) + [tokenizer.eos_token_id]
    assert decode(ids, tokenizer).replace(" ", "") == "<think>3</think>4"


# ---- the examples --------------------------------------------------------------------------------------------------

def scores(example, pairs):
    verifier = Verifier(2, reward=f"{ROOT / 'examples' / example}:reward")
    try:
        return verifier.score(*zip(*pairs, strict=True)), verifier.errors
    finally:
        verifier.close()


def test_json():
    gold = '{"name": "Ada", "born": 1815}'
    rewards, errors = scores("json_reward.py", [
        (gold, gold), ("Here:\n```json\n" + gold + "\n```", gold), ('{"name": "Ada"}', gold), ("[1]", gold), ("{", gold),
        ('{"name": "Ada", "born": 1900}', gold), ("[" * 100_000, gold), ('{"born": 1815, "name": "Ada", "x": 1}', gold)])
    assert rewards == pytest.approx([1, 1, 0.1 + 0.15 + 0.3, 0, 0, 0.1 + 0.3 + 0.3, 0, 0.1 + 0.2 + 0.4]) and not errors


def test_code(tmp_path):
    gold, good = "assert add(1, 2) == 3", "def add(a, b):\n    return a + b\n"
    codes = [good, "def add(a, b):\n    return 4\n", "import sys\nsys.exit(0)\n", "while True:\n    pass\n", "x = [0] * 10**9\n",
             "while True:\n    print('x' * 1000)\n", f"open({str(tmp_path / 'big')!r}, 'w').write('x' * 10**8)\n" + good,
             "import time\ntime.sleep(100)\n", "import os\nos.kill(os.getppid(), 0)\n" + good]
    rewards, errors = scores("code_reward.py", [(f"So:\n```python\n{code}```", gold) for code in codes] + [("none", gold)])
    assert rewards == [1, 0, 0, 0, 0, 0, 0, 0, 1, 0] and not errors
    assert (tmp_path / "big").stat().st_size <= 1 << 20
