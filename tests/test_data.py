"""Problems from every source, and one clear sentence for what cannot be read."""
import gzip
import json
import types

import pytest
from conftest import SHARED

import data
from cli import BUILTIN_MODEL, InputError
from data import (
    BOXED_SUFFIX,
    digest,
    drop_unverifiable,
    load_problems,
    load_tokenizer,
    render,
    split,
    trained_on,
    training_problems,
    write_problems,
    write_trained,
)
from reward import Verifier

VERL = {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}],
        "reward_model": {"ground_truth": "2"}}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("row, content, answer", [
    ({"problem": "1+1?", "answer": "2"}, "1+1?", "2"), ({"question": "1+1?", "solution": "2"}, "1+1?", "2"),
    ({"prompt": "1+1?", "ground_truth": 2}, "1+1?", "2"), (VERL, "1+1?", "2"), ({"problem": "1+1?", "answer": 0}, "1+1?", "0"),
    ({"problem": "1+1?", "answer": "2", "solution": "It is \\boxed{3}."}, "1+1?", "2"),  # the answer, not the solution
    ({"problem": "1+1?", "solution": "Add them: \\boxed{\\frac{4}{2}}."}, "1+1?", "\\frac{4}{2}"),
    ({"question": "1+1?", "answer": "One and one is\n#### 2"}, "1+1?", "2")])
def test_layouts(tmp_path, row, content, answer):
    problem, = load_problems(write(tmp_path / "x.jsonl", [row]))
    assert problem.messages[-1] == {"role": "user", "content": f"{content} {BOXED_SUFFIX}"}
    assert problem.answer == answer


def test_parquet_and_jsonl_are_read_alike(tmp_path):
    import pyarrow
    import pyarrow.parquet
    rows = [VERL, {**VERL, "reward_model": {"ground_truth": "3"}}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    assert load_problems(str(tmp_path / "x.parquet")) == load_problems(write(tmp_path / "x.jsonl", rows))


ROWS = [{"question": "1+1?", "answer": "2"}, {"question": "2, or \"é\"?", "answer": "4"}]
AS_CSV = 'question,answer\n1+1?,2\n"2, or ""é""?",4\n'
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


@pytest.mark.parametrize("name, text", [
    ("x.jsonl", LINES), ("x.json", json.dumps(ROWS)), ("x.csv", AS_CSV), ("x.jsonl.gz", LINES), ("x.csv.gz", AS_CSV)])
@pytest.mark.parametrize("windows", [False, True])
def test_files_as_people_have_them_are_read_alike(tmp_path, name, text, windows):
    """With `windows`: a byte-order mark in front, and CRLF at the ends of lines."""
    data = ("\ufeff" + text.replace("\n", "\r\n") if windows else text).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert load_problems(str(tmp_path / name)) == load_problems(write(tmp_path / "plain.jsonl", ROWS))


def test_fields_by_other_names(tmp_path):
    file = write(tmp_path / "x.jsonl", [{"frage": "1+1?", "loesung": 2, "answer": "wrong"}])
    problem, = load_problems(file, "frage", "loesung")
    assert problem.messages[0]["content"].startswith("1+1?") and problem.answer == "2"
    with pytest.raises(InputError, match="has no field 'fragen' for --prompt-field; it has the fields frage, loesung, answer"):
        load_problems(file, "fragen", "loesung")
    with pytest.raises(InputError, match="row 1: has no problem; it has the fields frage, loesung, answer; .*--prompt-field"):
        load_problems(file)


def test_what_a_run_holds_out_is_read_again(tmp_path):
    problems = load_problems(write(tmp_path / "x.jsonl", ROWS))
    for fields in ((None, None), ("frage", "loesung")):
        options = types.SimpleNamespace(prompt_field=fields[0], answer_field=fields[1])
        write_problems(tmp_path / "held_out.jsonl", problems, options)
        assert load_problems(str(tmp_path / "held_out.jsonl"), *fields) == problems


def test_a_prompt_that_a_run_has_held_out_is_finished(tmp_path):
    """Under whatever --suffix it is read."""
    problems = load_problems(write(tmp_path / "x.jsonl", ROWS), suffix="Answer with a number.")
    write_problems(tmp_path / "held_out.jsonl", problems, types.SimpleNamespace(prompt_field=None, answer_field=None))
    assert [p.messages for p in load_problems(str(tmp_path / "held_out.jsonl"))] == [p.messages for p in problems]


def test_numbers_in_tables_are_what_was_written(tmp_path):
    """Also those of 32 bits; and what is not a number is no answer."""
    import pyarrow as pa
    import pyarrow.parquet
    table = {"problem": ["a?", "b?", "c?"], "answer": pa.array([0.1, 3.7, 5.0], pa.float32())}
    pyarrow.parquet.write_table(pa.table(table), tmp_path / "x.parquet")
    assert [p.answer for p in load_problems(str(tmp_path / "x.parquet"))] == ["0.1", "3.7", "5.0"]
    (tmp_path / "nan.jsonl").write_text('{"problem": "1?", "answer": NaN}\n')
    with pytest.raises(InputError, match="nan.jsonl, row 1: has no answer"):
        load_problems(str(tmp_path / "nan.jsonl"))


def test_what_a_run_has_trained_on_is_known_by_its_text(tmp_path):
    """Not by the file's name, nor by its row; also after the run was resumed with other problems."""
    c = types.SimpleNamespace(suffix="Now!")
    ours = [load_problems(write(tmp_path / f"{name}.jsonl", rows), suffix="Now!") for name, rows in (("a", ROWS), ("b", ROWS[::-1]))]
    assert trained_on(tmp_path, ours[1], c) == 0
    write_trained(tmp_path, ours[0][:1], c, resumed=True)
    assert trained_on(tmp_path, ours[1], c) == 1
    write_trained(tmp_path, ours[0][1:], c, resumed=True)
    assert trained_on(tmp_path, ours[1], c) == 2
    then = types.SimpleNamespace(suffix="Then!")
    assert trained_on(tmp_path, load_problems(str(tmp_path / "b.jsonl"), suffix="Then!"), then) == 2
    # So is what the run has trained on from whose model this one goes on.
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "next").mkdir()
    (tmp_path / "next" / "config.json").write_text(json.dumps({"model": f"{tmp_path}/model"}))
    assert trained_on(tmp_path / "next", ours[1], c) == 2 and trained_on(tmp_path / "next", ours[1], c, before=False) == 0
    write_trained(tmp_path, ours[0][1:], c, resumed=False)
    assert trained_on(tmp_path, ours[1], c) == 1


def test_the_same_problems_are_held_out_whatever_is_too_long(tmp_path):
    rows = [{"problem": f"{i} + " * (1 + i % 7), "answer": "2"} for i in range(100)]
    config = types.SimpleNamespace(dataset=write(tmp_path / "x.jsonl", rows), critic_model=None, prompt_field=None, answer_field=None, suffix="",
                                   answer="any", reward=None, eval_problems=20, eval_every=1, seed=0, prompts_per_step=4)
    parts = []
    for config.max_prompt_tokens in (999, 20):
        parts.append([{p.id for p in part} for part in training_problems(config, load_tokenizer(BUILTIN_MODEL))])
    assert all(0 < len(short) < len(all_) and short < all_ for all_, short in zip(*parts, strict=True))


def test_a_template_that_tells_the_time_gives_the_same_prompt_all_along():
    tokenizer = load_tokenizer(BUILTIN_MODEL)
    tokenizer.chat_template = "{{ strftime_now('%f') }}{{ messages[0]['content'] }}"
    (problem,) = load_problems("chain:1")
    assert render(problem.messages, tokenizer) == render(problem.messages, tokenizer)


@pytest.mark.parametrize("spec, message", [
    ("/nowhere/x.csv", "no such file"), ("./x.jsonl", "no such file"), ("~/no/such/x", "no such file"), ("problems", "no such file"),
    ("FOLDER", "is a folder; give a file that ends with .jsonl"), ("FOLDER/x.tsv", "is of a kind that is not read; give a file that ends"),
    ("FOLDER/x.json", "is a dict, not a list"), ("FOLDER/y.json", "an object a line is .jsonl"), ("FOLDER/x.gz.jsonl.gz", "cannot be read"),
    ("FOLDER/x.csv", "row 1: has no problem; it has the fields a, b"), ("chain:8193", "the built-in task has 8,192 rows to train on"),
    ("chain:many", "must be a number, as in chain:1280"), ("FOLDER/latin.csv", "is not UTF-8 (byte 16)"),
    ("FOLDER/list.jsonl", "row 1: its answer is a list; give text or a number")])
def test_what_is_no_file_of_problems_is_named(tmp_path, spec, message):
    for name, text in {"x.tsv": "", "x.json": "{}", "y.json": "{}\n{}", "x.gz.jsonl.gz": "text", "x.csv": "a,b\n1,2\n",
                       "list.jsonl": '{"problem": "1?", "answer": ["1"]}'}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "latin.csv").write_bytes("problem,answer\nné,1\n".encode("latin-1"))
    with pytest.raises(InputError) as error:
        load_problems(spec.replace("FOLDER", str(tmp_path)))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_boxed_suffix_is_added_once(tmp_path):
    asked = {"problem": "1+1? Put it in \\boxed{}.", "answer": "2"}
    problem, = load_problems(write(tmp_path / "x.jsonl", [asked]))
    assert problem.messages[-1]["content"] == asked["problem"]


def test_duplicates_are_dropped_aloud_and_ids_are_rows(tmp_path, capsys):
    rows = [{"problem": f"{i // 2}?", "answer": "2"} for i in range(6)]
    assert [p.id for p in load_problems(write(tmp_path / "x.jsonl", rows))] == [0, 2, 4]
    assert "x.jsonl: dropped 3 of 6 rows, which repeat earlier ones\n" in capsys.readouterr().out
    rows = [{"problem": f"{space}{i}?{space}", "answer": "2"} for i in range(3) for space in ("", "\n")]
    assert [p.id for p in load_problems(write(tmp_path / "x.jsonl", rows), suffix="", own_reward=True)] == [0, 2, 4]
    # The policy cannot tell them apart, and one could be held out while the other is trained on.
    rows = [{"problem": "1?", "answer": answer} for answer in "1221"]
    assert [p.answer for p in load_problems(write(tmp_path / "x.jsonl", rows))] == ["1"]
    assert "earlier ones (1 of them with another answer than the first, which is kept)" in capsys.readouterr().out


def test_a_hub_dataset_that_repeats_its_problems_is_parsed_once(monkeypatch, capsys):
    datasets = pytest.importorskip("datasets")
    rows = [{"extra": i, "prompt": [{"role": "user", "content": f"{i % 3}?"}], "reward_model": {"ground_truth": str(i % 3)}}
            for i in range(2500)]
    asked, parse = [], data.parse_row
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: datasets.Dataset.from_list(rows))
    monkeypatch.setattr(data, "parse_row", lambda row, i, *options: asked.append(i) or parse(row, i, *options))
    problems = load_problems("hub/repeats")
    assert [(p.id, p.answer) for p in problems] == [(0, "0"), (1, "1"), (2, "2")] and asked == [0, 1, 2]
    printed = capsys.readouterr().out
    assert "Reading hub/repeats from the hub" in printed and "dropped 2,497 of 2,500 rows" in printed


@pytest.mark.parametrize("options, message", [
    ({}, "row 1: has no problem; it has the fields input, output; "),
    ({"prompt_field": "inputs", "answer_field": "output"}, "has no field 'inputs' for --prompt-field; it has the fields input, output")])
def test_a_hub_dataset_with_other_columns_names_them(monkeypatch, options, message):
    datasets = pytest.importorskip("datasets")
    rows = [{"input": f"{i}+1?", "output": str(i + 1)} for i in range(3)]
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: datasets.Dataset.from_list(rows[: (split != "none") * 3]))
    with pytest.raises(InputError, match="hub/other") as error:
        load_problems("hub/other", **options)
    assert message in str(error.value)
    named = load_problems("hub/other", prompt_field="input", answer_field="output")
    assert [(p.id, p.answer) for p in named] == [(0, "1"), (1, "2"), (2, "3")]
    with pytest.raises(InputError, match="hub/other:none: has no problems"):
        load_problems("hub/other:none")


@pytest.mark.parametrize("text, message", [
    ("", "has no problems"), ("\n\n", "has no problems"), ('{"problem": "1+1?", "answer": "2"}\n{oops', "line 2: is not JSON"),
    ("[1]", "row 1: is a list"), ('{"answer": "2"}', "row 1: has no problem"), ('{"problem": "1+1?"}', "row 1: has no answer"),
    ('{"prompt": [{"role": "assistant", "content": "hi"}], "answer": "2"}', "row 1: its prompt is not a list of chat"),
    ('{"prompt": ["hi"], "answer": "2"}', "row 1: its prompt is not a list of chat"), ('{"prompt": 5, "answer": "2"}', "row 1"),
    ('{"prompt": [{"role": "user", "content": null}], "answer": "2"}', "row 1: its prompt is not a list of chat")])
def test_what_cannot_be_read_is_named(tmp_path, text, message):
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(InputError, match="x.jsonl") as error:
        load_problems(str(tmp_path / "x.jsonl"))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_answer_that_is_null_or_empty(tmp_path):
    file = write(tmp_path / "x.jsonl", [{"problem": "1+1?", "mine": None, "answer": "", "solution": "It is \\boxed{2}."}])
    with pytest.raises(InputError, match="x.jsonl, row 1: its field 'mine' is null; give an answer"):
        load_problems(file, answer_field="mine")
    assert [p.answer for p in load_problems(file)] == ["2"] and [p.answer for p in load_problems(file, answer_field="answer")] == [""]


def test_a_small_dataset_says_what_it_is_too_small_for(tmp_path, capsys):
    file = write(tmp_path / "x.jsonl", [{"problem": f"{i}?", "answer": "2"} for i in range(4)])
    config = types.SimpleNamespace(dataset=file, critic_model=None, max_prompt_tokens=64, prompt_field=None, answer_field=None, suffix="", answer="any",
                             reward=None, eval_problems=8, eval_every=1, seed=0, prompts_per_step=4)
    training_problems(config, load_tokenizer(BUILTIN_MODEL))
    assert capsys.readouterr().out == f"{file}: has too few problems that fit to hold any out, so no accuracy will be measured\n"
    config.eval_every, config.prompts_per_step = 0, 8
    training_problems(config, load_tokenizer(BUILTIN_MODEL))
    assert capsys.readouterr().out == (f"{file}: has 4 problems to train on, so each step of --prompts-per-step 8 has some "
                                       "of them more than once\n")


@pytest.mark.parametrize("solution, answer", [
    ("so \\boxed 2", "2"), ("$x=\\boxed{3}$ or $x=\\boxed{4}$", "3, 4"), ("no box: \\boxed{", ""), ("1+1 = 2\n#### 2", "2"),
    (" ", ""), ("first \\fbox{3}.", "3")])
def test_what_becomes_a_gold_answer(tmp_path, solution, answer):
    problem, = load_problems(write(tmp_path / "x.jsonl", [{"problem": "1+1?", "solution": solution}]))
    assert problem.answer == answer


def test_gold_answers_to_which_nothing_could_be_right_are_dropped_or_refused(tmp_path):
    for bad in ("", "proof", "First we add 1 and 1. The sum is 2, as one sees."):
        rows = [{"problem": f"{i}?", "answer": str(i)} for i in range(150)] + [{"problem": "a?", "answer": bad}]
        problems, verifier = load_problems(write(tmp_path / "x.jsonl", rows)), Verifier(1)
        c = types.SimpleNamespace(dataset="x.jsonl", output=tmp_path, resume=False, suffix=BOXED_SUFFIX)
        mark = digest(problems, c)
        assert drop_unverifiable(problems, [], verifier, c) == {"problems": mark, "own_reward": False, "rows": [150]}
        assert [p.id for p in problems] == [*range(150)]
        c.resume = True  # it leaves out what it did before, if it judges the same problems alike
        for known, left_out in ({}, [7]), ({"own_reward": True}, [150]), ({"problems": "others"}, [150]):
            before = {"problems": mark, "own_reward": False, "rows": [7]} | known
            (tmp_path / "dropped.json").write_text(json.dumps(before))
            assert drop_unverifiable(load_problems(str(tmp_path / "x.jsonl")), [], verifier, c)["rows"] == left_out
        with pytest.raises(InputError, match="x.jsonl, row 151: .* cannot be read as mathematics"):
            drop_unverifiable(load_problems(write(tmp_path / "x.jsonl", rows))[60:], [], verifier, c)
        verifier.close()


def test_files_that_are_not_what_they_seem(tmp_path):
    (tmp_path / "x.parquet").write_text("not parquet")
    with pytest.raises(InputError, match="is not a parquet file"):
        load_problems(str(tmp_path / "x.parquet"))
    with pytest.raises(InputError, match="no such file"):
        load_problems(str(tmp_path / "absent.jsonl"))


def test_builtin_problems_are_right_and_tell_how_hard_they_are():
    problems = load_problems("chain:500")
    for problem in problems:
        chain = problem.messages[0]["content"].split()[1]
        value = int(chain[0])
        for op, digit in zip(chain[1::2], chain[2::2], strict=True):
            value = eval(f"{value}{op}{digit}")
        assert str(value % 10) == problem.answer
    assert {(len(p.messages[0]["content"].split()[1]) - 1) // 2 for p in problems} == set(range(1, 15))
    assert len(load_problems("chain")) > 7000


def test_split_is_disjoint_and_holds_out_a_fifth_at_most():
    problems = load_problems("chain:300")
    training, held_out = split(problems, 256)
    assert len(held_out) == len(problems) // 5
    assert sorted(p.id for p in training + held_out) == [p.id for p in problems]


def test_a_tokenizer_without_a_chat_template_gets_plain_text():
    tokenizer = load_tokenizer(BUILTIN_MODEL)
    tokenizer.chat_template = None
    assert tokenizer.decode(render([{"role": "user", "content": "1+1?"}], tokenizer)) == "1+1?\n\n"


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")
@pytest.mark.parametrize("name, count", [("aime24.jsonl", 30), ("math500.parquet", 500), ("dapo-math-17k.parquet", 17255)])  # 143 repeat others, 141 of them but for blanks
def test_real_problems(name, count):
    problems = load_problems(str(SHARED / "data" / name))
    assert len(problems) == count
    assert all(p.messages[-1]["content"].count(BOXED_SUFFIX) == 1 for p in problems)
