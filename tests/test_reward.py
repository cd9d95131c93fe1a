"""Verification: which part of a response is its answer, is it equal, and what a hostile answer can do (nothing)."""
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, SHARED

from equality import equal, equal_at_once, read
from reward import MAX_WORKER_BYTES, Verifier, extract_answer, last_boxed, verify

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
HOSTILE = [f"\\boxed{{{answer}}}" for answer in [
    "9^{9^{9^{9}}}", "9^{9^{9^{9^{9}}}}", "2^{2^{2^{2^{2^{2}}}}}", "10^{10^{10}}", "7^{10^{9}}",
    "(10^{10})!", "99999999!", "1000000!", "((5!)!)!", "\\binom{10^9}{10^8}", "\\binom{99999999}{44444444}",
    "\\sum_{k=1}^{10^9} \\frac{1}{k}", "\\prod_{k=1}^{10^8} k", "\\int_0^1 x^{x^{x^x}} dx",
    "\\frac{d^{50}}{dx^{50}} \\sin(x^{x^x})", "(x+1)^{100000}", "\\sqrt[10^9]{10^{10^9}}",
    "{" * 5000 + "1" + "}" * 5000, "\\boxed{" * 5000 + "1" + "}" * 5000, "9" * 500_000,
    "\\frac{1}{" * 2000 + "2" + "}" * 2000, "\\frac{1}{" * 80 + "2" + "}" * 80,
    "\\{" + ",".join(map(str, range(3000))) + "\\}", "(" * 300 + "1" + ")" * 300, "{" * 300 + "1" + "}" * 300]]


@pytest.fixture(scope="module")
def verifier():
    verifier = Verifier(workers=2, timeout=5.0)  # on a slow machine, too
    yield verifier
    verifier.close()


@pytest.mark.parametrize("response, gold, reward", [
    ("so it is \\boxed{27}.", "27", 1), ("27", "27", 0), ("\\boxed{26}", "27", 0), ("\\boxed{27", "27", 0),
    ("\\boxed{}", "27", 0), ("", "27", 0), ("\\boxed{\\frac12}", "0.5", 1), ("\\boxed{1/2}", "\\frac{1}{2}", 1),
    ("\\boxed{x = 27}", "27", 1), ("$\\boxed{27}$", "27", 1), ("\\boxed{\\boxed{27}}", "27", 1),
    ("\\boxed {27}", "27", 1), ("\\boxed{\\text{Evelyn}}", "\\text{Evelyn}", 1), ("\\boxed{1,000}", "1000", 1),
    # the last box after the thinking is the answer
    ("\\boxed{27} no, \\boxed{26}", "27", 0), ("\\boxed{26}. Wait. It is \\boxed{27}", "27", 1),
    ("<think>\\boxed{27}</think> It is \\boxed{26}", "27", 0), ("<think>\\boxed{27}</think> It is 27", "27", 0),
    ("<think>\\boxed{26} or \\boxed{28}</think>\\boxed{27}", "27", 1),
    # a list of candidates is not an answer
    ("\\boxed{26} or \\boxed{27}", "27", 0), ("\\boxed{27} or \\boxed{26}", "27", 0), ("\\boxed{26}, \\boxed{27}", "27", 0),
    ("\\boxed{26}\\boxed{27}", "27", 0), ("\\boxed{26, 27, 28}", "27", 0), ("\\boxed{26 or 27}", "27", 0),
    ("\\boxed{26 \\lor 27}", "27", 0), ("\\boxed{26 \\text{ or } 27}", "27", 0), ("\\boxed{27 \\pm 1}", "27", 0),
    ("$\\boxed{26}$ and $\\boxed{27}$", "27", 0),
    # unless the answer is that list, or the same thing is said twice
    ("\\boxed{3} and \\boxed{4}", "3, 4", 1), ("\\boxed{27}\n\\boxed{27}", "27", 1)])
def test_rewards(response, gold, reward, verifier):
    assert verify(response, gold) == reward
    assert verifier.score([response], [gold]) == [reward]


@pytest.mark.parametrize("response, answer", [
    ("It is 12, thanks", "12"), ("it is .5", ".5"), ("3-5", "5"), ("= -5", "-5"), ("about 1e-5", "1e-5"), ("a 3/4 b", "3/4"),
    ("it is 3, no 14.", "14"), ("about 2.5", "2.5"), ("-7", "-7"), ("1,200 apples", "1,200"), ("none", None),
    ("12 and \\boxed{13} and 14", "13"), ("<think>5</think> so", None)])
def test_any_answer_falls_back_on_the_last_number(response, answer):
    assert extract_answer(response, "any") == answer


def cases():
    """(response, gold, reward) of answers.txt."""
    for line in (ROOT / "tests/answers.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("# "):
            gold, rest = line.split(" | ", 1)
            answer, reward = rest.rsplit(" | ", 1)
            answer = re.sub(r"\\n(?=[-*2]|\\n|\\boxed)", "\n", answer)
            response = answer if re.search(r"box|think", answer) else f"So $\\boxed{{{answer}}}$."
            yield response, gold, float(reward)


def test_each_class_of_answers(verifier):
    """Cases of our own, by class: to what is paid and what is not."""
    pairs = [*cases()]
    scores = verifier.score([response for response, *_ in pairs], [gold for _, gold, _ in pairs])
    failed = [(pair, score) for pair, score in zip(pairs, scores, strict=True) if pair[2] != score]
    assert len(pairs) > 500 and not failed


def formula(rng, depth=1):
    """A formula in some notation, and its value at the point `AT`, computed as it is written."""
    latex, value = product(rng, depth)
    for _ in range(rng.choice((0, 1))):
        (more, number), sign = product(rng, depth), rng.choice("+-")
        latex, value = f"{latex} {sign} {more}", value + number if sign == "+" else value - number
    return latex, value


def product(rng, depth):
    latex, value = factor(rng, depth)
    for _ in range(rng.choice((0, 0, 1, 2))):
        (more, number), sign = factor(rng, depth), rng.choice(("", " ", r" \cdot ", r"\times "))
        mixed, call = more.startswith(r"\frac"), latex.endswith((*AT,)) and more.startswith(r"\left")
        if latex.endswith(FUNCTIONS) or more[0].isdigit() or more[0] == "|" or mixed or call:
            sign = r"\cdot "
        latex, value = latex + sign + more, value * number
    if rng.random() < 0.2 and not latex.endswith(FUNCTIONS[1:]):  # \sin x/2 is \sin(x/2)
        latex, value = f"{latex}/3", value / 3
    return latex, value


AT = {"x": 1.3, "y": 2.7}
FUNCTIONS = (r"\ln x", r"\sin y")


def factor(rng, depth):
    kind = rng.choice(("number", "letter", "power", "binomial", "factorial", "root", "logarithm", "sine") if depth < 1 else
                      ("letter", "fraction", "brackets", "absolute", "floor"))
    n, m, x = rng.randint(2, 9), rng.randint(0, 3), rng.choice("xy")
    if kind in ("fraction", "brackets", "absolute", "floor"):
        inner, value = formula(rng, depth - 1)
        return {"fraction": (rf"\frac{{{inner}}}{{{n}}}", value / n), "brackets": (rf"\left({inner}\right)", value),
                "absolute": (f"|{inner}|", abs(value)), "floor": (rf"\lfloor {inner}\rfloor ", math.floor(value))}[kind]
    return {"number": (f"{n}", n), "letter": (x, AT[x]), "power": (f"{x}^{m}", AT[x] ** m), "factorial": (f"{m}!", math.factorial(m)),
            "binomial": (rf"\binom{{{n}}}{{{m}}}", math.comb(n, m)), "root": (rf"\sqrt{n}", math.sqrt(n)),
            "logarithm": (r"\ln x", math.log(AT["x"])), "sine": (r"\sin y", math.sin(AT["y"]))}[kind]


def test_a_formula_is_read_as_it_is_written():
    """Numbers and letters side by side are products; the parser would add 2 and \\binom{4}{2}, or take the sine of all that
    follows."""
    rng, wrong = random.Random(int(os.environ.get("TEST_SEED", 0))), []
    for latex, value in (formula(rng) for _ in range(40)):
        found = read(latex)
        number = None if found is None else float(found.doit().subs({x: AT[x.name] for x in found.free_symbols}))
        if number != pytest.approx(value, rel=1e-6, abs=1e-6):
            wrong.append((latex, value, found))
    assert not wrong


@pytest.mark.skipif(not (SHARED / "data/answers.jsonl").exists(), reason="needs ../shared/data")
def test_labelled_answers(verifier):
    pairs = [json.loads(line) for line in (SHARED / "data/answers.jsonl").read_text().splitlines()]
    scores = verifier.score([p["response"] for p in pairs], [p["gold"] for p in pairs])
    failed = [(score, pair) for pair, score in zip(pairs, scores, strict=True) if score != pair["reward"]]
    for score, pair in failed:
        print(f"{score:.0f}: {pair}")
    right = sum(pair["reward"] for pair in pairs)
    paid = sum(score for score, _ in failed)
    assert paid <= 0.02 * (len(pairs) - right) and len(failed) - paid <= 0.05 * right


def test_a_worker_imports_sympys_units_before_the_first_deadline():
    code = ("import sys, equality, reward; [equality.equal(form, reward.WARM_UP_GOLD) for form in reward.WARM_UP]; "
            "sys.exit('sympy.physics.units' not in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_same_verdict_at_once_and_in_a_worker():
    for answer, gold in [("7", "7"), ("3", "2.9999999"), ("0.5", "0.50"), ("five", "5"), ("proof", "proof"), ("007", "7")]:
        assert equal_at_once(answer, gold) == equal(answer, gold)


def test_boxes_are_found_in_one_pass():
    start = time.process_time()
    assert last_boxed("\\boxed{" * 100_000) is None
    assert last_boxed("\\boxed{1} " * 100_000) == "1"
    assert last_boxed("{" * 500_000 + "\\boxed{1}") == "1"
    assert last_boxed("\\{ \\boxed{\\{1, 2\\}} \\}") == "\\{1, 2\\}"
    assert time.process_time() - start < 60  # of this process alone; a rescan from every box would take hours


def test_hostile_answers_cost_little_and_no_honest_one_its_reward():
    assert len(HOSTILE) == 25
    responses, golds, expected = [], [], []
    for i in range(256):
        hostile = i % 10 == 0 and i // 10 < 25
        responses.append(HOSTILE[i // 10] if hostile else f"\\boxed{{\\frac{{{i}}}{{7}}}}" if i % 2 else f"\\boxed{{{i}}}")
        golds.append("27" if hostile else f"{i}/7" if i % 2 else str(i + i % 3))
        expected.append(0.0 if hostile else float(i % 2 or i % 3 == 0))
    verifier = Verifier(workers=2, timeout=0.3)
    try:
        verifier.score(["\\boxed{1}"] * 2, ["1"] * 2)  # both workers are up
        start = time.perf_counter()
        assert verifier.score(responses, golds) == expected
        seconds = time.perf_counter() - start
        print(f"\n256 responses, 25 of them hostile: {seconds:.1f} s, {verifier.timeouts} killed")
        assert 0 < verifier.timeouts <= 25  # each costs 0.3 s of a worker
    finally:
        verifier.close()


def child_of(worker):
    """The process that compares, of a worker, which forked it."""
    return int(Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text().split()[-1])


@linux
def test_a_worker_that_is_killed_is_replaced():
    verifier = Verifier(workers=1)
    try:
        assert verifier.score(["\\boxed{1/2}"], ["0.5"]) == [1.0]
        worker = verifier._idle.get()
        verifier._idle.put(worker)
        os.kill(child_of(worker), signal.SIGKILL)
        assert verifier.score(["\\boxed{1/2}"] * 3, ["0.5"] * 3) == [0.0, 1.0, 1.0]
        assert verifier.crashes == 1
    finally:
        verifier.close()


def test_whole_numbers_are_compared_at_once(monkeypatch):
    """As math-verify would, but without a process."""
    monkeypatch.setattr(Verifier, "_start", lambda self: pytest.fail("no worker is needed"))
    answers = [("7", "7"), ("007", "7"), ("7", "8"), ("10", "1"), ("0", "0")]  # and decimals, and words
    scores = Verifier(1).score([f"\\boxed{{{answer}}}" for answer, _ in answers], [gold for _, gold in answers])
    assert scores == [1.0, 1.0, 0.0, 0.0, 1.0] == [verify(f"\\boxed{{{answer}}}", gold) for answer, gold in answers]


def test_waiting_costs_a_right_answer_nothing_but_not_for_ever(tmp_path):
    """The deadline is of processor time: a machine with too much to do is not the answer's fault."""
    for name in "equality.py", "notation.py":
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "sleeping.py").write_text((ROOT / "reward.py").read_text() + """
import time
compare = equal
def equal(answer, gold):
    time.sleep({"3/3": 1, "4/4": 60}.get(answer, 0))
    return compare(answer, gold)
if __name__ == "__main__":
    verifier = Verifier(workers=1, timeout=0.3)
    print(verifier.score([f"\\\\boxed{{{n}/{n}}}" for n in (3, 4, 5)], ["1"] * 3), verifier.timeouts, verifier.crashes)
    verifier.close()
""")
    done = subprocess.run([sys.executable, "sleeping.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "[1.0, 0.0, 1.0] 1 0", done.stderr


@linux
def test_what_compares_has_a_memory_limit():
    verifier = Verifier(workers=1)
    try:
        verifier.score(["\\boxed{1/2}"], ["0.5"])
        worker = verifier._idle.get()
        verifier._idle.put(worker)
        limits = Path(f"/proc/{child_of(worker)}/limits").read_text().splitlines()
        limit, = (line for line in limits if "Max data size" in line)
        assert limit.split()[3:5] == [str(MAX_WORKER_BYTES)] * 2
    finally:
        verifier.close()


def test_gold_answers_that_cannot_be_verified_are_found(verifier):
    assert verifier.unverifiable(["1", "\\frac{1}{2}", "(10^{10})!", "(3, \\pi)", "\\frac{\\"]) == [2, 4]
    assert verifier.unverifiable(["yes", "B", "\\text{(C)}", "New York", "proof", "notfound", "", '{"a": 1}',
                                  "def f(x):\n    return x + 1", "[1, {'b': 2}]", "1, 2, \\ldots, n"]) == [*range(4, 11)]


@pytest.mark.skipif(not (SHARED / "data/math500.parquet").exists(), reason="needs ../shared/data")
def test_every_gold_answer_of_math500_and_aime24_equals_itself(verifier):
    import pyarrow.parquet
    golds = [row["reward_model"]["ground_truth"]
             for row in pyarrow.parquet.read_table(SHARED / "data/math500.parquet").to_pylist()]
    golds += [json.loads(line)["answer"] for line in (SHARED / "data/aime24.jsonl").read_text().splitlines()]
    assert len(golds) == 530
    assert verifier.score([f"It is \\boxed{{{gold}}}." for gold in golds], golds) == [1.0] * 530


def test_a_worker_ends_when_its_trainer_is_killed_while_it_verifies():
    worker = Verifier(1, 1.0)._start()
    worker.stdin.write(json.dumps(["equal", "\\pi", "1"]) + "\n")
    worker.stdin.flush()
    for pipe in (worker.stdout, worker.stdin):  # as a kill leaves them
        pipe.close()
    assert worker.wait(60) is not None
