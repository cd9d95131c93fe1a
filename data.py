"""Problems: where they come from, how one becomes a prompt, and whether a model can read it.

`load_problems(spec)` reads the built-in task, a `.jsonl` or `.parquet` file, or a dataset on the hub.
Whatever the source, a problem is a list of chat messages and a gold answer.
"""
import json
import random
import re
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from cli import BUILTIN_MODEL, InputError, say
from machine import from_rank_0
from reward import last_boxed

BOXED_SUFFIX = "Please output the final answer within \\boxed{}."  # the papers' prompt

# A sentence that asks for another form of answer than BOXED_SUFFIX does, such as GSM8K's, and DAPO-Math-17k's
# on the hub. They are removed, because two orders contradict each other.
OTHER_FORM = re.compile(
    r"""[^.?!\n]*\b(?:put|write|give|provide|state|end|output|return|place|finish|conclude|report)\b[^.?!\n]*"""
    r"""(?:\#{4}|"Answer:"|'Answer:')[^.?!\n]*(?:[.!]["']?(?=\s|$)|(?=\n|$))""", re.IGNORECASE)
DAPO_WORDING = re.compile(
    r"^Solve the following math problem step by step\. The last line of your response should be of the form "
    r"Answer: \$?Answer \(without quotes\) where \$?Answer is the answer to the problem\.\s*"
    r'|\s*Remember to put your answer on its own line after "Answer:"\.\s*$')

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


def first_line(error):
    """What an exception of a library says, shortened: a message of ours is one line."""
    return str(error).strip().partition("\n")[0]


# ---- reading problems --------------------------------------------------------------------------------------

def load_problems(spec, suffix=BOXED_SUFFIX, own_reward=False):
    """All problems of `spec`, in their source's order, duplicates removed. suffix: what each prompt asks for
    at its end. own_reward: the answers are for a reward of the user's own, and are kept as they are.

        chain or chain:SIZE         the built-in task: the first 8,192 rows of builtin/chain.jsonl, or SIZE
        FILE.jsonl, FILE.parquet    one problem a row
        HUB/NAME[/CONFIG][:SPLIT]   a hub dataset; the split is `train` unless named

    Raises InputError, naming the file and the row, for what cannot be read.
    """
    name, _, argument = spec.partition(":")
    if name == "chain" and (not argument or argument.isdigit()):
        rows = islice(file_rows(Path(BUILTIN_MODEL, "chain.jsonl")), int(argument or 8192))
    elif spec.endswith((".jsonl", ".parquet")):
        rows = file_rows(Path(spec))
    else:
        rows = hub_rows(spec)
    problems = {}  # by what they say: DAPO-17k on the hub repeats each problem a hundred times
    for i, row in enumerate(rows):
        problem = parse_row(row, i, spec, suffix, own_reward)
        problems.setdefault(json.dumps([problem.messages, problem.answer]), problem)
    if not problems:
        raise InputError(f"{spec}: has no problems; {EXPECTED}")
    return [*problems.values()]


def file_rows(path):
    if not path.is_file():
        raise InputError(f"{path}: no such file; give the path of one (--help lists what --dataset takes)")
    if path.suffix == ".parquet":
        import pyarrow.parquet
        try:
            yield from pyarrow.parquet.read_table(path).to_pylist()
        except pyarrow.ArrowInvalid as error:
            raise InputError(f"{path}: is not a parquet file ({error})") from None
        return
    for i, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n")):
        try:
            if line.strip():
                yield json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {i + 1}: is not JSON ({error}); give one object a line") from None


def hub_rows(spec):
    name, _, split = spec.partition(":")
    parts = name.split("/", 2)  # HUB, NAME and, where it is given, CONFIG
    try:
        import datasets
        return datasets.load_dataset("/".join(parts[:2]), *parts[2:], split=split or "train")
    except Exception as error:  # the library raises a dozen kinds; each is about this name
        raise InputError(f"{spec}: is neither a .jsonl or .parquet file nor a dataset on the hub in reach "
                         f"({first_line(error)}); without a network, give a file") from None


def is_chat(prompt):
    """Whether this is a list of chat messages {"role", "content"}, the user's last."""
    chat = isinstance(prompt, list) and all(isinstance(m, dict) and "role" in m for m in prompt)
    return chat and all(isinstance(m.get("content"), str) for m in prompt) and prompt[-1]["role"] == "user"


def parse_row(row, i, spec, suffix=BOXED_SUFFIX, own_reward=False):
    """One row of any accepted layout as a Problem. `drop_unverifiable` counts empty answers."""
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
        raise InputError(f"{where}: its prompt is not a list of chat messages, the user's last; {EXPECTED}")
    if isinstance(answer, dict | list) and own_reward:
        answer = json.dumps(answer)
    if not isinstance(answer, str | int | float):
        raise InputError(f"{where}: has no answer; {EXPECTED}")
    # A JSON string may hold half of a surrogate pair, which no tokenizer accepts: it becomes a question mark.
    texts = [str(answer), *(m["content"] for m in prompt)]
    answer, *contents = (text.encode(errors="replace").decode() for text in texts)
    if not own_reward:
        if "\\boxed" in answer or "\\fbox" in answer:  # a worked solution
            answer = last_boxed(answer) or ""
        answer = answer.rpartition("####")[2].strip()  # GSM8K's
    messages = [{"role": m["role"], "content": content} for m, content in zip(prompt, contents, strict=True)]
    if suffix == BOXED_SUFFIX:
        messages[-1]["content"] = OTHER_FORM.sub("", DAPO_WORDING.sub("", messages[-1]["content"])).strip()
    asked = "\\boxed" if suffix == BOXED_SUFFIX else suffix
    if suffix and not any(asked in m["content"] for m in messages):  # once, never twice
        messages[-1]["content"] += f" {suffix}"
    return Problem(i, tuple(messages), answer)


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
    limit, problems = c.max_prompt_tokens, load_problems(c.dataset, c.suffix, bool(c.reward))
    fitting = [p for p in problems if all(len(render(p.messages, t)) <= limit for t in [tokenizer, *critic])]
    if not fitting:
        raise InputError(f"{c.dataset}: every prompt is longer than --max-prompt-tokens {limit}; raise it")
    if len(fitting) < len(problems):
        say(f"{c.dataset}: dropped {len(problems) - len(fitting)} of {len(problems)} problems, whose prompts "
            f"are longer than --max-prompt-tokens {limit}")
    return split(fitting, c.eval_problems if c.eval_every else 0, c.seed)


def drop_unverifiable(problems, held_out, verifier, dataset):
    """Removes from both lists the problems whose gold answer is empty or cannot be read: hardly a response
    could be right. Raises InputError if these are more than 1 %.

    All ranks call it, and rank 0 decides: a deadline may fall differently on others, and all ranks must train
    on the same problems.
    """
    both = problems + held_out
    bad = from_rank_0(lambda: {both[i].id for i in verifier.unverifiable([p.answer for p in both])})
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


def shuffled_epochs(problems, first, count, seed):
    """Problems number `first` to `first + count` of an endless series. Every problem comes once an
    epoch, in a new order each time. The series depends on the arguments alone: every rank and a
    resumed run draw the same."""
    places = [divmod(i, len(problems)) for i in range(first, first + count)]  # (epoch, place in it)
    orders = {epoch: random.Random(f"{seed}/{epoch}").sample(problems, len(problems))
              for epoch in {epoch for epoch, _ in places}}
    return [orders[epoch][i] for epoch, i in places]


# ---- from problem to prompt --------------------------------------------------------------------------------

def load_tokenizer(model, trust_remote_code=False):
    """The tokenizer of a Hugging Face name or folder. Raises InputError if there is none that can be read."""
    from transformers import AutoTokenizer
    try:
        return AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(f"{model}: its tokenizer cannot be loaded ({first_line(error)})") from None


def render(messages, tokenizer):
    """Token ids of the prompt, up to where the response starts. Without a chat template (base
    models): plain text."""
    if tokenizer.chat_template is None:
        return tokenizer.encode("\n\n".join(m["content"] for m in messages) + "\n\n")
    return tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False)


def decode(ids, tokenizer):
    """The text of a response, without padding and end marks. `<think>` and `</think>` stay, even where they
    are special tokens: the verdict depends on them."""
    thinking = {tokenizer.convert_tokens_to_ids(token) for token in ("<think>", "</think>")}
    special = set(tokenizer.all_special_ids) - thinking
    return tokenizer.decode([i for i in ids if i not in special])


# ---- can the model be used? --------------------------------------------------------------------------------

def check_model(model, tokens, trust_remote_code=False, options="--max-prompt-tokens, --max-response-tokens"):
    """Checks a model (hub name or folder) without loading its weights. Raises
    InputError if it cannot be used.

    tokens: the longest sequence that the model will have to read; options: the options that set this length.
    """
    from transformers import AutoConfig
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code).get_text_config()
    except Exception as error:  # transformers and its validators raise many kinds; each is about this file
        raise InputError(f"{model}: is no folder with a usable config.json and no model on the hub within "
                         f"reach ({first_line(error)})") from None
    if Path(model).is_dir() and not any(Path(model).glob("*.safetensors")):
        raise InputError(f"{model}: has no .safetensors file, and other formats can run code when they are "
                         "read; convert it with transformers' save_pretrained")
    tokenizer = load_tokenizer(model, trust_remote_code)
    if len(tokenizer) > config.vocab_size:
        raise InputError(f"{model}: its tokenizer has {len(tokenizer)} tokens and its weights only "
                         f"{config.vocab_size}; give a folder in which the two belong together")
    context = getattr(config, "max_position_embeddings", None)
    if context and tokens > context:
        raise InputError(f"{model}: reads at most {context} tokens, not {tokens}; lower {options}")
