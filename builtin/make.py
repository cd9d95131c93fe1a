"""Makes the built-in model: a 350k-parameter Qwen2 that does modular arithmetic step by step, and slips.

    python builtin/make.py            # 14 minutes on 2 busy cores; rewrites the checkpoint in this folder

It is trained on demonstrations in which one step in six is wrong, so at temperature 1 it knows the method but
is right only about half of the time. That is the state in which reinforcement learning finds a reasoning model:
the reward has something to separate, and longer chains are harder, so a critic has something to learn.
"""
import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))
from data import BOXED_SUFFIX, chain_problem, render  # noqa: E402

# First the sums alone, on short and faultless chains, with a strong weight decay: the tables take long to learn from
# noisy examples. Then chains of every length, with slips, and without decay, which keeps the model from being sure.
STAGES = (dict(steps=500, batch=256, max_ops=2, error_rate=0.0, weight_decay=1.0),
          dict(steps=900, batch=128, max_ops=6, error_rate=1 / 6, weight_decay=0.0))
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
                          for phrase in ("Compute ", " modulo 10.", " " + BOXED_SUFFIX, "\\boxed{")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|endoftext|>", unk_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE, model_max_length=512, clean_up_tokenization_spaces=False)


def demonstration(question, error_rate, rng):
    """The chain solved left to right, one step a line. A wrong step is carried on from, as a model would."""
    chain = question.removeprefix("Compute ").split(" modulo")[0]
    value, lines = int(chain[0]), []
    for op, digit in zip(chain[1::2], map(int, chain[2::2]), strict=True):
        result = (value + digit if op == "+" else value - digit) % 10
        if rng.random() < error_rate:
            result = (result + rng.randrange(1, 10)) % 10
        lines.append(f"{value}{op}{digit}={result}\n")
        value = result
    return "".join(lines) + f"\\boxed{{{value}}}<|end|>"


def main():
    torch.manual_seed(0)
    rng = random.Random(1)
    tokenizer = make_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=3,
        num_key_value_heads=3, max_position_embeddings=512, rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None, dtype="float32")
    model = Qwen2ForCausalLM(config)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens")
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    stages = [stage for stage in STAGES for _ in range(stage["steps"])]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=len(stages), pct_start=0.05)
    for step, stage in enumerate(stages):
        optimizer.param_groups[0]["weight_decay"] = stage["weight_decay"]
        rows = []
        for _ in range(stage["batch"]):
            question, _ = chain_problem(rng, max_ops=stage["max_ops"])
            prompt = render([{"role": "user", "content": f"{question} {BOXED_SUFFIX}"}], tokenizer)
            rows.append((prompt, tokenizer.encode(demonstration(question, stage["error_rate"], rng))))
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
        if step % 100 == 0 or step == len(stages) - 1:
            print(f"step {step:5d}  loss {loss.item():.4f}", flush=True)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(FOLDER)
    tokenizer.save_pretrained(FOLDER)


if __name__ == "__main__":
    main()
