"""Problems: where they come from, which of them a run trains on, and how one becomes a prompt.

`load_problems(spec)` reads the built-in task, a file (JSON, CSV or parquet), or a dataset on the hub.
Whatever the source, a problem is a list of chat messages and a gold answer.
"""
import contextlib
import csv
import gzip
import hashlib
import io
import json
import random
import re
from dataclasses import dataclass
from datetime import datetime
from itertools import islice, repeat
from pathlib import Path

import numpy as np
from jinja2 import TemplateError

from cli import BUILTIN_MODEL, InputError, replace_file, run_of, say
from machine import first_line, from_rank_0, load_tokenizer
from reward import last_boxed

BOXED_SUFFIX = "Please output the final answer within \\boxed{}."  # the papers' prompt

# A sentence that asks for another form of answer than BOXED_SUFFIX does, such as GSM8K's, and DAPO-Math-17k's
# on the hub. They are removed, because two orders contradict each other.
OTHER_FORM = re.compile(
    r"""(?:^|(?<=[.?!\n]))[^.?!\n]*\b(?:put|write|give|provide|state|end|output|return|place|finish|conclude|report)\b[^.?!\n]*"""
    r"""(?:\#{4}|"Answer:"|'Answer:')[^.?!\n]*(?:[.!]["']?(?=\s|$)|(?=\n|$))""", re.IGNORECASE)
DAPO_WORDING = re.compile(
    r"^Solve the following math problem step by step\. The last line of your response should be of the form "
    r"Answer: \$?Answer \(without quotes\) where \$?Answer is the answer to the problem\.\s*"
    r'|\s*Remember to put your answer on its own line after "Answer:"\.\s*$')

ENDINGS = (".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", ".json.gz", ".csv.gz")  # of files

CHAIN = 8192  # rows of the built-in task to train on; on those after them, eval.py evaluates

# A row is read by the first of these fields that it has.
PROMPT_FIELDS = ("problem", "question", "prompt")
ANSWER_FIELDS = ("answer", "solution", "ground_truth")
FIELDS = (*PROMPT_FIELDS, *ANSWER_FIELDS, "reward_model")  # the last is verl's
EXPECTED = (f"expected one of {'|'.join(PROMPT_FIELDS)} with one of {'|'.join(ANSWER_FIELDS)}, "
            "or verl's `prompt` with `reward_model.ground_truth`")


@dataclass(frozen=True)
class Problem:
    id: int  # the row in its source, from 0: stable from run to run
    messages: tuple  # chat messages, {"role", "content"}; the last asks for a boxed answer
    answer: str  # gold answer, LaTeX or plain

    @property
    def text(self):
        """All messages as one text."""
        return "\n\n".join(m["content"] for m in self.messages)


# ---- reading problems --------------------------------------------------------------------------------------

def load_problems(spec, prompt_field=None, answer_field=None, suffix=BOXED_SUFFIX, own_reward=False,
                  boxed=False):
    """All problems of `spec`, in their source's order, duplicates removed:

        chain or chain:SIZE         the built-in task: the first CHAIN rows of builtin/chain.jsonl, or SIZE
        FILE                        one problem a row: ENDINGS; a .json file has a list of rows
        HUB/NAME[/CONFIG][:SPLIT]   a hub dataset; the split is `train` unless named

    prompt_field, answer_field: the fields to read, for rows that name them otherwise than PROMPT_FIELDS and
    ANSWER_FIELDS. suffix: what each prompt asks for at its end. own_reward: the answers are for a reward of
    the user's own, and are kept as they are. boxed: without a box a response will earn nothing, so that a
    dataset that asks for none is warned of. Raises InputError, naming the file and the row, for what cannot
    be read.
    """
    name, _, argument = spec.partition(":")
    fields = {*FIELDS, prompt_field, answer_field}
    if name == "chain" and (not argument or argument.isdigit()):
        if int(argument or 0) > CHAIN:
            raise InputError(f"{spec}: the built-in task has {CHAIN:,} rows to train on; ask for no more")
        rows = islice(file_rows(Path(BUILTIN_MODEL, "chain.jsonl")), int(argument or CHAIN))
        prompt_field = answer_field = None
    else:
        file = file_of(spec)
        rows = file_rows(file) if file else hub_rows(spec, fields)
    # DAPO-17k on the hub repeats each problem a hundred times, so rows like earlier ones are not parsed.
    count, seen, problems, others = 0, set(), {}, 0  # problems: by their text
    for i, row in enumerate(rows):
        count = i + 1
        said = repr([row.get(field) for field in fields] if isinstance(row, dict) else row)
        if said not in seen:
            seen.add(said)
            problem = parse_row(row, i, spec, prompt_field, answer_field, suffix, own_reward)
            first = problems.setdefault(bare(problem, suffix), problem)
            others += first.answer != problem.answer
    if not problems:
        raise InputError(f"{spec}: has no problems; {EXPECTED}")
    if len(problems) < count:
        say(f"{spec}: dropped {count - len(problems):,} of {count:,} rows, which repeat earlier ones"
            + (f" ({others:,} of them with another answer than the first, which is kept)" if others else ""))
    if boxed and not any("\\boxed" in m["content"] for p in problems.values() for m in p.messages):
        say(f"warning: no prompt of {spec} asks for a \\boxed{{}} answer, and without one a response earns "
            "0; give another --suffix, or --answer any")
    return [*problems.values()]


def file_of(spec):
    """The path of the file that `spec` means, or None for the built-in task or a dataset on the hub. Raises
    InputError if there is no such file, or none of a kind that is read."""
    name, _, size = spec.partition(":")
    if name == "chain" and size and not size.isdigit():
        raise InputError(f"{spec}: the size of the built-in task must be a number, as in chain:1280")
    if name == "chain" or not (spec.endswith(ENDINGS) or spec.startswith(("/", ".", "~"))
                                                 or Path(spec).exists() or "/" not in spec):
        return None
    path = Path(spec).expanduser()
    kinds = f"give a file that ends with {', '.join(ENDINGS)}"
    if path.is_dir():
        raise InputError(f"{path}: is a folder; {kinds}")
    if not path.is_file():
        raise InputError(f"{path}: no such file; give the path of one (--help lists what --dataset takes)")
    if not path.name.endswith(ENDINGS):
        raise InputError(f"{path}: is of a kind that is not read; {kinds}")
    return path


def file_rows(path):
    """The rows of a file as dictionaries. Raises InputError if it cannot be read."""
    if path.suffix == ".parquet":
        import pyarrow.parquet
        try:
            parts = pyarrow.parquet.ParquetFile(path).iter_batches()  # as Python objects, all take much
            return (row for part in parts for row in map(shortened, part.to_pylist(), repeat(part.schema)))
        except pyarrow.ArrowInvalid as error:
            raise InputError(f"{path}: is not a parquet file ({error})") from None
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    try:
        text = data.decode("utf-8-sig")  # -sig: without the mark that Windows puts first
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 (byte {error.start}); save it in this encoding") from None
    kind = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    return {".jsonl": json_lines, ".json": json_list, ".csv": csv_rows}[kind](path, text)


def shortened(row, schema):
    """A row whose numbers of 32 bits are as they were written: 0.1, and not 0.10000000149011612."""
    return {name: float(str(np.float32(value)))
            if isinstance(value, float) and str(schema.field(name).type) == "float" else value
            for name, value in row.items()}


def json_lines(path, text):
    for i, line in enumerate(text.split("\n")):
        try:
            if line.strip():
                yield json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {i + 1}: is not JSON ({error}); give one object a line") from None


def json_list(path, text):
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise InputError(f"{path}: is not JSON ({error}); an object a line is .jsonl") from None
    if not isinstance(rows, list):
        raise InputError(f"{path}: is a {type(rows).__name__}, not a list of rows")
    return rows


def csv_rows(path, text):
    csv.field_size_limit(2**31 - 1)  # or a long solution would be refused
    try:
        yield from csv.DictReader(io.StringIO(text, newline=""), strict=True)
    except csv.Error as error:
        raise InputError(f"{path}: is not CSV ({error})") from None


def hub_rows(spec, fields):
    say(f"Reading {spec} from the hub.")
    name, _, split = spec.partition(":")
    parts = name.split("/", 2)  # HUB, NAME and, where it is given, CONFIG
    try:
        import datasets
        rows = datasets.load_dataset("/".join(parts[:2]), *parts[2:], split=split or "train")
    except Exception as error:  # the library raises a dozen kinds; each is about this name
        raise InputError(f"{spec}: is neither a file that is here nor a dataset on the hub in reach "
                         f"({first_line(error)}); without a network, give a file") from None
    if len(rows):
        yield shortened(rows[0], rows.features.arrow_schema)  # with all fields, which an error names
    rows = rows.select(range(1, len(rows)))
    for part in rows.select_columns([name for name in rows.column_names if name in fields]).iter(1000):
        dicts = (dict(zip(part, row, strict=True)) for row in zip(*part.values(), strict=True))
        yield from map(shortened, dicts, repeat(rows.features.arrow_schema))


def is_chat(prompt):
    """Whether this is a list of chat messages {"role", "content"}, the user's last."""
    chat = isinstance(prompt, list) and all(isinstance(m, dict) and "role" in m for m in prompt)
    return chat and all(isinstance(m.get("content"), str) for m in prompt) and prompt[-1]["role"] == "user"


def parse_row(row, i, spec, prompt_field=None, answer_field=None, suffix=BOXED_SUFFIX, own_reward=False):
    """One row of any accepted layout as a Problem. `drop_unverifiable` counts empty answers."""
    where = f"{spec}, row {i + 1}"
    if not isinstance(row, dict):
        raise InputError(f"{where}: is a {type(row).__name__}, not an object; {EXPECTED}")
    has = f"it has the fields {', '.join(map(str, row)) or '(none)'}"
    for option, field in (("--prompt-field", prompt_field), ("--answer-field", answer_field)):
        if field and field not in row:
            raise InputError(f"{where}: has no field {field!r} for {option}; {has}")
    prompt = next((row[f] for f in (prompt_field and [prompt_field]) or PROMPT_FIELDS if row.get(f)), None)
    given = [row[f] for f in (answer_field and [answer_field]) or ANSWER_FIELDS if row.get(f) is not None]
    given = [value for value in given if value == value]  # not a number: as null
    answer = next((value for value in given if value != ""), "" if given else None)
    if isinstance(row.get("reward_model"), dict) and not answer_field:  # verl
        answer = row["reward_model"].get("ground_truth")
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    elif "row" in row:  # a run's held_out.jsonl: these prompts are finished
        suffix = ""
    if not prompt:
        raise InputError(f"{where}: has no problem; {has}; {EXPECTED} (or name yours with --prompt-field)")
    if not is_chat(prompt):
        raise InputError(f"{where}: its prompt is not a list of chat messages, the user's last; {EXPECTED}")
    if isinstance(answer, dict | list) and own_reward:
        answer = json.dumps(answer)
    if isinstance(answer, list | dict):
        raise InputError(f"{where}: its answer is a {type(answer).__name__}; give text or a number")
    if answer is None and answer_field:
        raise InputError(f"{where}: its field {answer_field!r} is null; give an answer, or leave the row out")
    if not isinstance(answer, str | int | float):
        raise InputError(f"{where}: has no answer; {has}; {EXPECTED} (or name yours with --answer-field)")
    # A JSON string may hold half of a surrogate pair, which no tokenizer accepts: it becomes a question mark.
    texts = [str(answer), *(m["content"] for m in prompt)]
    answer, *contents = (text.encode(errors="replace").decode() for text in texts)
    if not own_reward:
        if "\\boxed" in answer or "\\fbox" in answer:  # a worked solution
            answer = last_boxed(answer) or ""
        answer = answer.rpartition("####")[2].strip()  # GSM8K's
    messages = [{"role": m["role"], "content": content} for m, content in zip(prompt, contents, strict=True)]
    if suffix == BOXED_SUFFIX:
        content = DAPO_WORDING.sub("", messages[-1]["content"])
        if "####" in content or "answer:" in content.lower():  # else there is nothing to look for, at length
            content = OTHER_FORM.sub("", content)
        messages[-1]["content"] = content.strip()
    asked = "\\boxed" if suffix == BOXED_SUFFIX else suffix
    if suffix and not any(asked in m["content"] for m in messages):  # once, never twice
        messages[-1]["content"] += f" {suffix}"
    return Problem(i, tuple(messages), answer)


def write_problems(path, problems, c):
    """Writes Problems as a file that `load_problems` reads with the same options `c`, with their rows in the
    dataset."""
    rows = ({"row": p.id, c.prompt_field or "prompt": p.messages, c.answer_field or "answer": p.answer}
            for p in problems)
    replace_file(path, "".join(json.dumps(row) + "\n" for row in rows))


def reading(c):
    """The keyword arguments of `load_problems` that a script's options ask for."""
    return dict(prompt_field=c.prompt_field, answer_field=c.answer_field, suffix=c.suffix,
                own_reward=bool(c.reward), boxed=c.answer == "boxed" and not c.reward)


# ---- the problems of a training run ------------------------------------------------------------------------

def split(problems, held_out, seed=0):
    """(training problems, held-out problems), disjoint; at most a fifth is held out."""
    order = random.Random(seed).sample(range(len(problems)), len(problems))
    held_out = min(held_out, len(problems) // 5)
    return [problems[i] for i in sorted(order[held_out:])], [problems[i] for i in order[:held_out]]


def training_problems(c, tokenizer):
    """(training problems, held-out problems) of a training script's config. Drops problems whose prompt is
    too long for the policy's tokenizer or the critic's."""
    critic = [load_tokenizer(c.critic_model, c.trust_remote_code)] if c.critic_model else []
    tokenizers = [tokenizer, *critic]
    limit, loaded = c.max_prompt_tokens, load_problems(c.dataset, **reading(c))
    wanted = c.eval_problems if c.eval_every else 0
    # Split before any are dropped: so runs with other tokenizers or limits hold out the same ones.
    problems, held_out = ([p for p in part if all(len(render(p.messages, t)) <= limit for t in tokenizers)]
                          for part in split(loaded, wanted, c.seed))
    if not problems:
        raise InputError(f"{c.dataset}: every prompt to train on is longer than --max-prompt-tokens {limit}; "
                         "raise it")
    if dropped := len(loaded) - len(problems) - len(held_out):
        say(f"{c.dataset}: dropped {dropped} of {len(loaded)} problems, whose prompts are longer than "
            f"--max-prompt-tokens {limit}")
    if wanted and not held_out:
        say(f"{c.dataset}: has too few problems that fit to hold any out, so no accuracy will be measured")
    if len(problems) < c.prompts_per_step:
        say(f"{c.dataset}: has {len(problems)} problems to train on, so each step of --prompts-per-step "
            f"{c.prompts_per_step} has some of them more than once")
    return problems, held_out


def bare(problem, suffix):
    """A problem's text without what every prompt asks for at its end."""
    return problem.text.removesuffix(suffix).strip()


def marks_of(problems, c):
    """A short text for each problem, the same in whatever file or place it stands. c: the options with which
    it was read."""
    return [hashlib.sha1(bare(p, c.suffix).encode()).hexdigest()[:12] for p in problems]


def digest(problems, c):
    """A short text that changes with any row, text or answer of the problems."""
    rows = [(p.id, mark, p.answer) for p, mark in zip(problems, marks_of(problems, c), strict=True)]
    return hashlib.sha1(json.dumps(sorted(rows)).encode()).hexdigest()[:12]


def check_rows(marks, problems, c):
    """marks: {row: mark}, as a checkpoint tells them. Raises InputError if a row is another problem now:
    what was remembered of one would be taken for another's."""
    now = dict(zip((str(p.id) for p in problems), marks_of(problems, c), strict=True))  # JSON's keys are text
    other = [row for row, mark in marks.items() if now.get(row, mark) != mark]
    if other:
        raise InputError(f"{c.dataset}: row {int(other[0]) + 1} was another problem when the checkpoint was "
                         "written; continue with the dataset and the --suffix that the run started with")


def trained_on(run, problems, c, before=True):
    """How many of these problems a run (its folder) has trained on; `before`: or a run from whose model it
    went on, and so on, as far as their folders are still there."""
    trained, runs = set(), []
    while run and Path(run).resolve() not in runs:
        runs.append(Path(run).resolve())
        file, config = Path(run, "trained.txt"), Path(run, "config.json")  # older runs have no trained.txt
        trained |= {*file.read_text().split()} if file.exists() else set()
        run = None
        with contextlib.suppress(OSError, ValueError, KeyError):
            run = before and run_of(json.loads(config.read_text())["model"])
    return sum(mark in trained for mark in marks_of(problems, c))


def write_trained(run, problems, c, resumed):
    """Adds the problems that a run (its folder) trains on to those of before, if it was resumed."""
    file = Path(run, "trained.txt")
    before = file.read_text().split() if resumed and file.exists() else []
    replace_file(file, "\n".join(dict.fromkeys([*before, *marks_of(problems, c)])) + "\n")


def drop_unverifiable(problems, held_out, verifier, c):
    """Removes from both lists the problems whose gold answer is empty or cannot be read: no response could be
    marked right. Returns their "rows", and of which problems and reward. Raises InputError if these are more
    than 1 %.

    All ranks call it, and rank 0 decides: a deadline may fall differently on others, and all ranks must train
    on the same problems. So must a run that is resumed: its folder tells what was dropped. c: its options.
    """
    both, dataset = problems + held_out, c.dataset
    mark, own, before = digest(both, c), bool(verifier.reward), Path(c.output, "dropped.json")

    def unverifiable():
        known = json.loads(before.read_text()) if c.resume and before.is_file() else {}
        if (known.get("problems"), known.get("own_reward")) == (mark, own):
            return {*known["rows"]}
        return {both[i].id for i in verifier.unverifiable([p.answer for p in both])}

    bad = from_rank_0(unverifiable)
    if bad:
        first = min((p for p in both if p.id in bad), key=lambda p: p.id)
        about = f"{dataset}, row {first.id + 1}: the answer {first.answer[:100]!r} cannot be read as "
        about += "mathematics" if first.answer else "mathematics, since it is empty"
        if len(bad) > len(both) / 100:
            raise InputError(f"{about} (as in {len(bad)} of {len(both)} rows); correct or remove them, or "
                             "give a --reward of your own")
        say(f"{about}; dropped {len(bad)} of {len(both)} problems, to which no answer could be right")
    for part in (problems, held_out):
        part[:] = [p for p in part if p.id not in bad]
    return {"problems": mark, "own_reward": own, "rows": sorted(bad)}


def write_split(problems, held_out, dropped, c, resumed):
    """What eval.py, a resumed run, and a run that goes on from this one's model need to know. dropped: what
    `drop_unverifiable` returned."""
    write_problems(f"{c.output}/held_out.jsonl", held_out, c)
    replace_file(f"{c.output}/dropped.json", json.dumps(dropped))
    write_trained(c.output, problems, c, resumed)


def shuffled_epochs(problems, first, count, seed):
    """Problems number `first` to `first + count` of an endless series. Every problem comes once an
    epoch, in a new order each time. The series depends on the arguments alone: every rank and a
    resumed run draw the same."""
    places = [divmod(i, len(problems)) for i in range(first, first + count)]  # (epoch, place in it)
    orders = {epoch: random.Random(f"{seed}/{epoch}").sample(problems, len(problems))
              for epoch in {epoch for epoch, _ in places}}
    return [orders[epoch][i] for epoch, i in places]


# ---- from problem to prompt --------------------------------------------------------------------------------

STARTED = datetime.now()  # a template that tells the date has the same prompts from start to end


def render(messages, tokenizer):
    """Token ids of the prompt, up to where the response starts. Without a chat template (base
    models): plain text."""
    if tokenizer.chat_template is None:
        ids = tokenizer.encode("\n\n".join(m["content"] for m in messages) + "\n\n")
        while ids[-1] in tokenizer.all_special_ids:  # some add an end token, after which nothing follows
            ids.pop()
        return ids
    try:
        clock = {"strftime_now": STARTED.strftime} if "strftime_now" in str(tokenizer.chat_template) else {}
        return tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False,
                                             **clock)
    except TemplateError as error:
        roles = ", ".join(m["role"] for m in messages)
        raise InputError(f"{tokenizer.name_or_path}: its chat template does not take messages by {roles} "
                         f"({first_line(error)}); change the dataset's messages, or the template") from None
