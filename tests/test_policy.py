"""Micro-batches, ranks, memory and saving change nothing about what is learned."""
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run

import policy
from data import BUILTIN_MODEL, load_tokenizer


@pytest.mark.parametrize("seed", range(20))
def test_micro_batches_deal_every_row_once_and_equally_many_to_each_rank(seed, monkeypatch):
    rng = random.Random(seed)
    world, budget = rng.randint(1, 5), rng.randint(10, 200)
    lengths = [rng.randint(1, 120) for _ in range(rng.randint(1, 40))]
    shares = []
    for rank in range(world):
        monkeypatch.setattr(policy.dist, "get_world_size", lambda: world)
        monkeypatch.setattr(policy.dist, "get_rank", lambda rank=rank: rank)
        shares.append(policy.micro_batches(lengths, budget))
    assert sorted(row for share in shares for rows in share for row in rows) == list(range(len(lengths)))
    assert len({len(share) for share in shares}) == 1
    for rows in (rows for share in shares for rows in share if len(rows) > 1):
        assert max(lengths[row] for row in rows) * len(rows) <= budget


def gradients(folder, ranks, budget):
    output = folder / f"{ranks}-{budget}.pt"
    done = run("tests/gradients.py", output, budget, ranks=ranks)
    assert done.returncode == 0, done.stderr
    return torch.load(output)


@pytest.mark.parametrize("per_token", [False, True])
def test_loss_and_gradients_do_not_depend_on_micro_batches_or_ranks(tmp_path, per_token):
    budgets = [(1, 150), (2, 150)] if per_token else [(1, 10**6), (1, 100), (2, 100), (2, 10**6)]
    reference, *others = [gradients(tmp_path, *which) for which in budgets]
    if not per_token:
        assert reference["micro_batches"] == [1]
        assert len(set(others[1]["micro_batches"])) == 2, "the two ranks should have unequal numbers of micro-batches"
    for other in others:
        for name, value in reference["metrics"].items():
            assert other["metrics"][name] == pytest.approx(value, rel=1e-5, abs=1e-7), name
        for name, gradient in reference["gradients"].items():
            difference = (other["gradients"][name] - gradient).norm() / gradient.norm()
            assert difference < 1e-5, (name, difference)


PEAK = """
import re, sys, torch
from policy import ChunkedLogProbs
import policy
policy.CHUNK_ELEMENTS = 1 << 22
tokens, how = int(sys.argv[1]), sys.argv[2]
hidden, weight = torch.randn(tokens, 32, requires_grad=True), torch.randn(50_000, 32, requires_grad=True)
targets = torch.randint(50_000, (tokens,))
if how == "chunked":
    logprobs, _ = ChunkedLogProbs.apply(hidden, weight, targets, 0.6)
else:
    logprobs = (hidden @ weight.T / 0.6).log_softmax(-1).gather(1, targets[:, None])
logprobs.sum().backward()
# Not getrusage: its peak is inherited from the process that started this one.
print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024)
"""


def peak(tokens, how):
    done = subprocess.run([sys.executable, "-c", PEAK, str(tokens), how], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_of_log_probabilities_does_not_grow_with_vocabulary_times_length():
    grown = {how: peak(4500, how) - peak(500, how) for how in ("chunked", "whole")}
    print(f"\n4,000 more tokens of a 50,000 vocabulary cost {grown['chunked']:.0f} MiB chunked, {grown['whole']:.0f} whole")
    one_copy_of_the_logits = 4000 * 50_000 * 4 / 2**20
    assert grown["whole"] > one_copy_of_the_logits
    assert grown["chunked"] < one_copy_of_the_logits / 1.5  # the allocator's noise was seen to reach 320 MiB


def test_saved_folder_is_the_same_model_for_transformers(tmp_path, device):
    from transformers import AutoModelForCausalLM
    tokenizer = load_tokenizer(BUILTIN_MODEL)
    trained = policy.Policy(BUILTIN_MODEL, device, temperature=1.0, lr=1e-3, dtype="float32", checkpoint_activations=False)
    with torch.no_grad():
        for parameter in trained.module.parameters():
            parameter.mul_(1.01)
    prompt, response = tokenizer.encode("1+2="), tokenizer.encode("3<|end|>")
    ours = trained.logprobs([(prompt, response)])[0]
    trained.save(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    logprobs = loaded(torch.tensor([prompt + response])).logits[0].float().log_softmax(-1)
    theirs = [logprobs[len(prompt) - 1 + i, token].item() for i, token in enumerate(response)]
    assert ours.tolist() == pytest.approx(theirs, abs=1e-5)
