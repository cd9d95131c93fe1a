"""Makes the built-in models: tiny Qwen2s that do modular arithmetic step by step, and slip.

    python builtin/make.py            # the demo's model, 10 minutes on 2 busy cores; rewrites the checkpoint in this folder
    python builtin/make.py small      # builtin/small: a critic of a fifth of its size, for the same task
    python builtin/make.py problems   # builtin/chain.jsonl: the problems of the task

They are trained on demonstrations some of whose steps are wrong, so at temperature 1 they know the method but slip.
That is the state in which reinforcement learning finds a reasoning model: the reward has something to separate. The
task's longest chains are longer than any that they were taught. So some prompts are easy and others hopeless, as in
real datasets, and a critic has something to learn.
"""
import json
import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))
from data import BOXED_SUFFIX, render  # noqa: E402

LR = 3e-3

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer():
    """Bytes, so that any text has tokens, plus one token for each phrase that every problem repeats."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"])
    tokenizer.add_tokens([AddedToken(phrase, normalized=False)
                          for phrase in ("Compute ", " modulo 10 from left to right.", " " + BOXED_SUFFIX, "\\boxed{")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|endoftext|>", unk_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE, model_max_length=512, clean_up_tokenization_spaces=False)


# ---- the task -------------------------------------------------------------------------------------------------------

def chain_problem(rng, max_ops=14):
    """One chain of 1 to `max_ops` operations modulo 10, from left to right. The prompt tells how hard it is:
    the built-in model may slip at every operation, most often at a product, and was taught no chain of more
    than 12.

    Factors are 3, 7 and 9, which have an inverse modulo 10: a wrong step is not made good by a product.
    """
    value = rng.randrange(10)
    text = str(value)
    for _ in range(rng.randint(1, max_ops)):
        op = rng.choice("+-*")
        digit = rng.choice((3, 7, 9)) if op == "*" else rng.randrange(10)
        text += f"{op}{digit}"
        value = apply(value, op, digit)
    return f"Compute {text} modulo 10 from left to right.", str(value)


def apply(value, op, digit):
    return (value + digit if op == "+" else value - digit if op == "-" else value * digit) % 10


def write_problems(size=8_800, seed=0):
    """8,192 problems to train on, and some for `eval.py --benchmarks chain`."""
    rng = random.Random(seed)
    problems = [chain_problem(rng) for _ in range(size)]
    lines = [json.dumps({"problem": question, "answer": answer}) + "\n" for question, answer in problems]
    (FOLDER / "chain.jsonl").write_text("".join(lines))


# ---- demonstrations: (rng) -> (question, answer); a wrong step is carried on from, as a model would ------------------

# How often a step of a demonstration is wrong. The model learns to be as unsure as this, so it knows every step and
# yet slips: rarely in a sum, often in a product.
SLIPS = {"+": 0.04, "-": 0.12, "*": 0.28}
TAUGHT = 12  # operations in the longest demonstration; the task has up to 14
FAULTLESS = dict.fromkeys(SLIPS, 0.0)


def chain(rng, max_ops=TAUGHT, slips=SLIPS):
    """The chain solved left to right, one step a line."""
    question, _ = chain_problem(rng, max_ops)
    text = question.removeprefix("Compute ").split(" modulo")[0]
    value, lines = int(text[0]), []
    for op, digit in zip(text[1::2], map(int, text[2::2]), strict=True):
        result = apply(value, op, digit)
        if rng.random() < slips[op]:
            result = (result + rng.randrange(1, 10)) % 10
        lines.append(f"{value}{op}{digit}={result}\n")
        value = result
    return question, "".join(lines) + f"\\boxed{{{value}}}"


# ---- models ---------------------------------------------------------------------------------------------------------

# First the operations alone, on short and faultless chains, with a strong weight decay: the tables take long to learn from
# noisy examples. Then chains of every length, with slips, and without decay, which keeps the model from being sure.
MODELS = {
    "chain": dict(folder=FOLDER, hidden_size=96, intermediate_size=256, num_hidden_layers=3, stages=(
        dict(steps=500, batch=256, weight_decay=1.0, example=lambda rng: chain(rng, max_ops=2, slips=FAULTLESS)),
        dict(steps=900, batch=128, weight_decay=0.0, example=chain))),
    "small": dict(folder=FOLDER / "small", hidden_size=48, intermediate_size=128, num_hidden_layers=2, stages=(
        dict(steps=500, batch=128, weight_decay=0.0, example=chain),))}


def teach(model, tokenizer, stages, lr, seed=1):
    """Supervised training on demonstrations, in stages: their steps, batch, weight_decay, and example(rng) -> (question,
    answer)."""
    rng, steps = random.Random(seed), [stage for stage in stages for _ in range(stage["steps"])]
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=len(steps), pct_start=0.05)
    for step, stage in enumerate(steps):
        optimizer.param_groups[0]["weight_decay"] = stage["weight_decay"]
        rows = []
        for _ in range(stage["batch"]):
            question, answer = stage["example"](rng)
            prompt = render([{"role": "user", "content": f"{question} {BOXED_SUFFIX}"}], tokenizer)
            rows.append((prompt, tokenizer.encode(answer + "<|end|>")))
        length = max(len(p) + len(r) for p, r in rows)
        ids = torch.full((len(rows), length), tokenizer.pad_token_id)
        labels = torch.full((len(rows), length), -100)
        for i, (p, r) in enumerate(rows):
            ids[i, : len(p) + len(r)] = torch.tensor(p + r)
            labels[i, len(p) : len(p) + len(r)] = torch.tensor(r)
        logits = model(input_ids=ids).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == len(steps) - 1:
            print(f"  step {step:5d}  loss {loss.item():.4f}", flush=True)


def main(name):
    torch.manual_seed(0)
    tokenizer, settings = make_tokenizer(), dict(MODELS[name])
    folder, stages = settings.pop("folder"), settings.pop("stages")
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), num_attention_heads=3, num_key_value_heads=3, max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0}, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None, dtype="float32",
        **settings))
    print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens")
    teach(model, tokenizer, stages, LR)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    name, *more = sys.argv[1:] or ["chain"]
    if more or name not in (*MODELS, "problems"):
        sys.exit(__doc__)
    if name == "problems":
        write_problems()
    else:
        main(name)
