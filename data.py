"""Problems: where they come from, how one becomes a prompt, and whether a model can read it.

`load_problems(spec)` reads the built-in task, a `.jsonl` or `.parquet` file, a hub dataset, or a procedural task of
the library reasoning-gym. Whatever the source, a problem is chat messages and a gold answer.
"""
import glob
import hashlib
import json
import os
import random
from dataclasses import dataclass
from pathlib import Path

from cli import InputError, say
from reward import last_boxed

BOXED_SUFFIX = "Please output the final answer within \\boxed{}."  # the papers' prompt

# A row is read by the first of these fields that it has.
PROMPT_FIELDS = ("problem", "question", "prompt")
ANSWER_FIELDS = ("answer", "solution", "ground_truth")
EXPECTED = (f"expected one of {'|'.join(PROMPT_FIELDS)} with one of {'|'.join(ANSWER_FIELDS)}, "
            "or verl's `prompt` with `reward_model.ground_truth`")


@dataclass(frozen=True)
class Problem:
    id: int  # the row in its source, from 0: stable from run to run
    messages: tuple  # chat messages, {"role", "content"}; the last asks for a boxed answer
    answer: str  # gold answer, LaTeX or plain


# ---- reading problems -------------------------------------------------------------------------------------------------

def load_problems(spec, size=20_000, seed=0):
    """All problems of `spec`, in their source's order, duplicates removed:

        chain or chain:SIZE         the built-in task (`size` problems, generated from `seed`)
        reasoning_gym:NAME          procedural problems (`size` of them; pip install reasoning-gym)
        FILE.jsonl, FILE.parquet    one problem a row
        HUB/NAME[/CONFIG][:SPLIT]   a hub dataset; the split is `train` unless named

    Raises InputError, naming the file and the row, for what cannot be read.
    """
    name, _, argument = spec.partition(":")
    if name == "chain" and (not argument or argument.isdigit()):
        rows = chain_rows(int(argument or size), seed)
    elif name == "reasoning_gym":
        rows = reasoning_gym_rows(argument, size, seed)
    elif spec.endswith((".jsonl", ".parquet")):
        rows = file_rows(Path(spec))
    else:
        rows = hub_rows(spec)
    problems, seen = [], set()
    for i, row in enumerate(rows):
        problem = parse_row(row, i, spec)
        key = hashlib.sha1(json.dumps([problem.messages, problem.answer]).encode()).digest()
        if key not in seen:  # DAPO-17k on the hub repeats each problem a hundred times
            seen.add(key)
            problems.append(problem)
    if not problems:
        raise InputError(f"{spec}: has no problems; give a dataset with at least one row ({EXPECTED})")
    return problems


def file_rows(path):
    if not path.is_file():
        raise InputError(f"{path}: no such file; --dataset takes a .jsonl or .parquet file, a hub dataset, `chain`, or "
                         "`reasoning_gym:NAME`")
    if path.suffix == ".parquet":
        import pyarrow.parquet
        try:
            yield from pyarrow.parquet.read_table(path).to_pylist()
        except pyarrow.ArrowInvalid as error:
            raise InputError(f"{path}: is not a parquet file ({error})") from None
        return
    for i, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n")):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {i + 1}: is not JSON ({error}); expected one object a line") from None


def hub_rows(spec):
    name, _, split = spec.partition(":")
    hub, _, name = name.partition("/")
    name, _, config = name.partition("/")
    try:
        import datasets
        return datasets.load_dataset(f"{hub}/{name}", config or None, split=split or "train")
    except ImportError:
        raise InputError(f"{spec}: reading hub datasets needs `pip install datasets`") from None
    except Exception as error:  # the library raises a dozen kinds; each is about this name
        reason = str(error).partition("\n")[0]
        raise InputError(f"{spec}: is neither a .jsonl or .parquet file, `chain`, nor a hub dataset that can be read "
                         f"from here ({reason})") from None


def reasoning_gym_rows(name, size, seed):
    try:
        import reasoning_gym
    except ImportError:
        raise InputError(f"reasoning_gym:{name} needs `pip install reasoning-gym`") from None
    if name not in reasoning_gym.factory.DATASETS:
        raise InputError(f"reasoning_gym:{name}: there is no such task; see reasoning_gym.factory.DATASETS, for "
                         "example chain_sum")
    for row in reasoning_gym.create_dataset(name, size=size, seed=seed):
        yield {"question": row["question"], "answer": row["answer"]}


def is_chat(prompt):
    return (isinstance(prompt, list) and all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in prompt)
            and all("role" in m for m in prompt) and prompt[-1]["role"] == "user")


def parse_row(row, i, spec):
    """One row of any accepted layout as a Problem."""
    where = f"{spec}, row {i + 1}"
    if not isinstance(row, dict):
        raise InputError(f"{where}: is a {type(row).__name__}, not an object; {EXPECTED}")
    prompt = next((row[f] for f in PROMPT_FIELDS if row.get(f)), None)
    answer = next((row[f] for f in ANSWER_FIELDS if row.get(f) is not None), None)
    if isinstance(row.get("reward_model"), dict):  # verl
        answer = row["reward_model"].get("ground_truth")
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not prompt:
        raise InputError(f"{where}: has no problem; {EXPECTED}")
    if not is_chat(prompt):
        raise InputError(f"{where}: its prompt is not a list of chat messages that ends with the user's; {EXPECTED}")
    if not isinstance(answer, str | int | float):
        raise InputError(f"{where}: has no answer; {EXPECTED}")
    # Half of a surrogate pair is no text, and no tokenizer takes it.
    answer, *contents = (str(text).encode(errors="replace").decode() for text in (answer, *(m["content"] for m in prompt)))
    if "\\boxed" in answer:  # a worked solution
        answer = last_boxed(answer) or ""
    answer = answer.rpartition("####")[2].strip()  # GSM8K's
    if not answer:
        raise InputError(f"{where}: its answer is empty; every problem needs one to be verified against")
    messages = [{"role": m["role"], "content": content} for m, content in zip(prompt, contents, strict=True)]
    if not any("\\boxed" in m["content"] for m in messages):  # once, never twice
        messages[-1]["content"] += f" {BOXED_SUFFIX}"
    return Problem(i, tuple(messages), answer)


# ---- the problems of a training run -------------------------------------------------------------------------

def split(problems, held_out, seed=0):
    """(training problems, held-out problems), disjoint; at most a fifth is held out."""
    order = random.Random(seed).sample(range(len(problems)), len(problems))
    held_out = min(held_out, len(problems) // 5)
    return [problems[i] for i in sorted(order[held_out:])], [problems[i] for i in order[:held_out]]


def training_problems(c, tokenizer):
    """(training problems, held-out problems) of a training script's config. Drops problems whose prompt is too long
    for the policy's tokenizer or the critic's."""
    tokenizers = [tokenizer, *([load_tokenizer(c.critic_model, c.trust_remote_code)] if c.critic_model else [])]
    problems = load_problems(c.dataset)
    fitting = [p for p in problems if all(len(render(p.messages, t)) <= c.max_prompt_tokens for t in tokenizers)]
    if len(fitting) < len(problems):
        say(f"{c.dataset}: dropped {len(problems) - len(fitting)} of {len(problems)} problems, whose prompts are "
            f"longer than --max-prompt-tokens {c.max_prompt_tokens}")
    if not fitting:
        raise InputError(f"{c.dataset}: every prompt is longer than --max-prompt-tokens {c.max_prompt_tokens}; "
                         "raise it")
    return split(fitting, c.eval_problems if c.eval_every else 0, c.seed)


def check_answers(problems, verifier, dataset):
    """Refuses a dataset with gold answers that math-verify cannot read: no response could ever earn their reward."""
    bad = sorted((problems[i] for i in verifier.unverifiable([p.answer for p in problems])), key=lambda p: p.id)
    if bad:
        raise InputError(f"{dataset}, row {bad[0].id + 1}: the answer {bad[0].answer[:100]!r} cannot be parsed, so no "
                         f"response could be verified against it ({len(bad)} such rows); correct or remove it")


def shuffled_epochs(problems, first, count, seed):
    """Problems number `first` to `first + count` of an endless series in which every problem comes once an epoch, in a
    new order each time. It depends on its arguments alone: every rank, and a resumed run, draws the same."""
    places = [divmod(i, len(problems)) for i in range(first, first + count)]  # (epoch, place in it)
    orders = {epoch: random.Random(f"{seed}/{epoch}").sample(problems, len(problems))
              for epoch in {epoch for epoch, _ in places}}
    return [orders[epoch][i] for epoch, i in places]


# ---- from problem to prompt ---------------------------------------------------------------------------------

def load_tokenizer(model, trust_remote_code=False):
    """The tokenizer of a Hugging Face name or folder. Raises InputError if there is none that can be read."""
    from transformers import AutoTokenizer
    try:
        return AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(f"{model}: its tokenizer cannot be loaded ({str(error).splitlines()[0]})") from None


def render(messages, tokenizer):
    """Token ids of the prompt, up to where the response begins. Base models have no chat template: plain text, then."""
    if tokenizer.chat_template is None:
        return tokenizer.encode("\n\n".join(m["content"] for m in messages) + "\n\n")
    return tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False)


# ---- can the model be used? ---------------------------------------------------------------------------------

def check_model(model, tokens, trust_remote_code=False, options="--max-prompt-tokens or --max-response-tokens"):
    """Raises InputError for what can be seen to be wrong with a model (hub name or folder) without loading its weights.

    tokens: the longest sequence that the model will have to read; options: the options that set this length.
    """
    from transformers import AutoConfig
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code).get_text_config()
    except Exception as error:  # transformers and its validators raise many kinds; each is about this file
        raise InputError(f"{model}: is neither a folder with a usable config.json nor a model on the hub that can be "
                         f"read from here ({str(error).strip().splitlines()[0]})") from None
    if os.path.isdir(model) and not glob.glob(f"{glob.escape(model)}/*.safetensors"):
        raise InputError(f"{model}: has no .safetensors file; weights in other formats can run code when they are "
                         "read, so convert them first (transformers' save_pretrained writes safetensors)")
    tokenizer = load_tokenizer(model, trust_remote_code)
    if len(tokenizer) > config.vocab_size:
        raise InputError(f"{model}: its tokenizer has {len(tokenizer)} tokens and its weights only "
                         f"{config.vocab_size}; the two do not belong together")
    context = getattr(config, "max_position_embeddings", None)
    if context and tokens > context:
        raise InputError(f"{model}: reads at most {context} tokens, and is asked to read {tokens}; lower {options}")


# ---- the built-in task ----------------------------------------------------------------------------------------------

def chain_problem(rng, min_ops=2, max_ops=6):
    """One chain of additions and subtractions modulo 10. More operations, more chances to slip: difficulty varies."""
    value = rng.randrange(10)
    text = str(value)
    for _ in range(rng.randint(min_ops, max_ops)):
        op, digit = rng.choice("+-"), rng.randrange(10)
        text += f"{op}{digit}"
        value = (value + digit if op == "+" else value - digit) % 10
    return f"Compute {text} modulo 10.", str(value)


def chain_rows(size, seed):
    rng = random.Random(seed)
    for _ in range(size):
        question, answer = chain_problem(rng)
        yield {"problem": question, "answer": answer}
