"""tools/compare.py on small files, and our rewards against plain math-verify on benchmarks' gold answers."""
import json
import re

import pytest
from conftest import SHARED, complaint

from data import load_problems
from reward import Verifier
from tools.compare import main


def record(problem, sample, reward, answer, **other):
    """A line of a file of responses; `other` replaces fields of it."""
    return {"benchmark": "b", "problem": problem, "sample": sample, "reward": reward, "gold": "1",
            "answer": answer, "tokens": 10, "finished": True, "question": f"question {problem}",
            "response": "", **other}


def write(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


def test_compare(tmp_path, capsys):
    """Problem 0 got better by two of four samples, 1 stayed, 2 became wrong, 3 is in one evaluation only."""
    a, b = (write(tmp_path / f"{name}.jsonl", [{"model": name}] + [
        record(p, k, float(k < c), "1" if k < c else "2") for p, c in right.items() for k in range(4)])
        for name, right in (("a", {0: 1, 1: 4, 2: 3}), ("b", {0: 3, 1: 4, 2: 0, 3: 1})))
    main([a, b])
    printed = capsys.readouterr().out
    row, = (text.split() for text in printed.splitlines() if text.startswith("b  "))
    assert row[:5] == ["b", "3", "66.7", "58.3", "-8.3"] and "warning" not in printed
    title = "(at least half of the samples): 1\n  b "
    assert f"wrong in A, right in B {title}    0  0.25 -> 0.75  question 0" in printed
    assert f"right in A, wrong in B {title}    2  0.75 -> 0.00  question 2" in printed


def test_compare_warns_of_other_settings_and_of_an_evaluation_that_was_stopped(tmp_path, capsys):
    both = [record(0, 0, 1.0, "1"), record(0, 1, 0.0, "2"), record(1, 0, 1.0, "1")]
    a = write(tmp_path / "a.jsonl", [{"model": "a", "temperature": 0.6}, *both])
    b = write(tmp_path / "b.jsonl", [{"model": "b", "temperature": 1.0}, *both, record(1, 1, 1.0, "1")])
    main([a, b])
    warnings = [text for text in capsys.readouterr().out.splitlines() if text.startswith("warning")]
    assert len(warnings) == 2 and "temperature differs: 0.6 in A, 1.0 in B" in warnings[0]
    assert "a.jsonl is incomplete" in warnings[1]


def test_recheck(tmp_path, capsys):
    """What our rewards and plain math-verify disagree about is shown; here one reward was tampered with."""
    records = [record(0, 0, 1.0, "1/2", gold="\\frac12", response="\\boxed{1/2}"),
               record(0, 1, 1.0, "0.5", gold="\\frac12", response="so \\boxed{0.5}."),
               record(1, 0, 0.0, "3", gold="\\frac12", response="\\boxed{3}"),
               record(2, 0, 0.0, None, gold="\\frac12", response="no box")]
    main(["--recheck", write(tmp_path / "a.jsonl", records)])
    assert [text.split(None, 1) for text in capsys.readouterr().out.splitlines()[1:]] == [
        ["2", "agree, right"], ["1", "agree, wrong"], ["1", "without a box or unfinished"]]
    records[1]["reward"] = 0.0
    main(["--recheck", write(tmp_path / "a.jsonl", records)])
    assert "b 0/1: ours 0; gold '\\\\frac12', answer '0.5'" in capsys.readouterr().out


def test_bad_input_is_one_clear_sentence(tmp_path, capsys):
    a = write(tmp_path / "a.jsonl", [record(0, 0, 1.0, "1")])
    other = write(tmp_path / "other.jsonl", [record(0, 0, 1.0, "1", question="another")])
    elsewhere = write(tmp_path / "elsewhere.jsonl", [record(0, 0, 1.0, "1", benchmark="c")])
    for arguments, message in (
            ([a], "takes two files of responses, or one with --recheck, and was given 1"),
            (["--recheck", a, a], "and was given 2"), (["--recheck", "absent"], "absent: cannot be read"),
            ([a, other], "have different problems under the same number"),
            ([a, elsewhere], "have no problem in common")):
        error = complaint(main, arguments, capsys)
        assert message in error and error.count("\n") == 1


@pytest.mark.skipif(not (SHARED / "data/math500.parquet").exists(), reason="needs MATH-500")
def test_rewards_agree_with_plain_math_verify_on_real_answers(tmp_path, capsys):
    """1,000 responses whose box holds a gold answer of MATH-500 or AIME24: the problem's, or another's."""
    files = [next((SHARED / "data").glob(f"{name}.*")) for name in ("math500", "aime24")]
    problems = [p for file in files for p in load_problems(str(file))]
    verifier = Verifier(2, 2.0)
    texts = [f"So \\boxed{{{answer}}}." for p, q in zip(problems, problems[1:] + problems[:1], strict=True)
             for answer in (p.answer, q.answer)]
    scores = verifier.score(texts, [p.answer for p in problems for _ in range(2)])
    verifier.close()
    main(["--recheck", write(tmp_path / "a.jsonl", [
        record(i // 2, i % 2, scores[i], None, gold=problems[i // 2].answer, response=text)
        for i, text in enumerate(texts)])])
    printed = capsys.readouterr().out
    print(printed)
    assert "differ" not in printed
    assert sum(int(n.replace(",", "")) for n in re.findall(r"([\d,]+)  agree", printed)) > 1000
