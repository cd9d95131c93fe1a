"""tools/compare.py on small files."""
import json

import pytest
from conftest import complaint

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
    assert row[:5] == ["b", "3", "66.7", "58.3", "-8.3"]
    assert f"warning: 1 problems of these benchmarks are in {b} alone, and are left out" in printed and printed.count("warning") == 1
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


def test_bad_input_is_one_clear_sentence(tmp_path, capsys):
    a = write(tmp_path / "a.jsonl", [record(0, 0, 1.0, "1")])
    other = write(tmp_path / "other.jsonl", [record(0, 0, 1.0, "1", question="another")])
    elsewhere = write(tmp_path / "elsewhere.jsonl", [record(0, 0, 1.0, "1", benchmark="c")])
    for arguments, message in (
            (["absent", a], "absent: cannot be read"), ([a, other], "have different problems under the same number"),
            ([a, elsewhere], "have no problem in common")):
        error = complaint(main, arguments, capsys)
        assert message in error and error.count("\n") == 1
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0 and "python -m tools.compare a.jsonl b.jsonl" in capsys.readouterr().out
