"""Micro-batches, ranks, memory and saving change nothing about what is learned."""
import random
import weakref

import pytest
import torch
from conftest import run
from torch.utils._python_dispatch import TorchDispatchMode

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
        longest = max(lengths[row] for row in rows)
        assert longest * len(rows) <= budget
        assert min(lengths[row] for row in rows[budget // 8 // longest + 1 :] or rows[:1]) >= 0.8 * longest  # little padding


@pytest.fixture(scope="session")
def gradients(tmp_path_factory):
    """{(ranks, micro-batch budget): loss, metrics, gradients}; on 4 ranks, two replicas of two shards (HSDP)"""
    found = {}
    for ranks, replicas in ((1, 1), (2, 1), (4, 2)):
        output = tmp_path_factory.mktemp("gradients") / "g.pt"
        done = run("tests/gradients.py", output, replicas, 10**6, 100, 150, ranks=ranks - 1 and ranks)
        assert done.returncode == 0, done.stderr
        found.update({(ranks, budget): result for budget, result in torch.load(output).items()})
    return found


@pytest.mark.xdist_group("gradients")
@pytest.mark.parametrize("per_token", [False, True])
def test_loss_and_gradients_do_not_depend_on_micro_batches_or_ranks(gradients, per_token):
    which = [(1, 150), (2, 150), (4, 150)] if per_token else [(1, 10**6), (1, 100), (2, 100), (2, 10**6), (4, 100)]
    reference, *others = [gradients[w] for w in which]
    if not per_token:
        assert reference["micro_batches"] == [1]
        assert len(set(others[1]["micro_batches"])) == 2, "the two ranks should have unequal numbers of micro-batches"
    for other in others:
        for name, value in reference["metrics"].items():
            assert other["metrics"][name] == pytest.approx(value, rel=1e-5, abs=1e-7), name
        for name, gradient in reference["gradients"].items():
            difference = (other["gradients"][name] - gradient).norm() / gradient.norm()
            assert difference < 1e-5, (name, difference)


@pytest.mark.parametrize("heads, shared", [(4, 1), (6, 3)])
def test_attention_on_a_cpu_is_pytorchs(heads, shared):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 37, 16, dtype=torch.bfloat16, requires_grad=True) for n in (heads, *[heads // shared] * 2))
    ours, _ = policy.causal_attention(None, q, k, v, None, scaling=0.3)
    in_full = [x.detach().float().requires_grad_() for x in (q, k, v)]
    theirs, _ = policy.causal_attention(None, *in_full, None, scaling=0.3)
    naive = torch.zeros(2, 37, heads, 16)
    for head in range(heads):
        for t in range(37):
            weights = (0.3 * (in_full[1][:, head // shared, : t + 1] @ in_full[0][:, head, t, :, None]))[..., 0].softmax(-1)
            naive[:, t, head] = (weights[..., None] * in_full[2][:, head // shared, : t + 1]).sum(1)
    assert torch.allclose(theirs, naive, atol=1e-5) and torch.allclose(ours.float(), naive, atol=0.03)
    direction = torch.randn_like(theirs)
    (ours * direction.bfloat16()).sum().backward()
    (naive * direction).sum().backward()
    for x, y in zip((q, k, v), in_full, strict=True):
        assert (x.grad - y.grad).norm() / y.grad.norm() < 0.02


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made within it held at once. Not the process's memory, which depends on its allocator."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.seen = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.seen:
                storage = tensor.untyped_storage()
                self.seen.add(storage._cdata)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        return result

    def freed(self, which, size):
        self.seen.discard(which)
        self.live -= size


def peak(tokens, how):
    hidden, weight = torch.randn(tokens, 32, requires_grad=True), torch.randn(50_000, 32, requires_grad=True)
    targets = torch.randint(50_000, (tokens,))
    with LiveBytes() as memory:
        if how == "chunked":
            logprobs, _ = policy.ChunkedLogProbs.apply(hidden, weight, targets, 0.6)
        else:
            logprobs = (hidden @ weight.T / 0.6).log_softmax(-1).gather(1, targets[:, None])
        logprobs.sum().backward()
    return memory.peak / 2**20


def test_memory_of_log_probabilities_does_not_grow_with_vocabulary_times_length(monkeypatch):
    monkeypatch.setattr(policy, "CHUNK_ELEMENTS", 1 << 22)
    grown = {how: peak(1500, how) - peak(500, how) for how in ("chunked", "whole")}
    print(f"\n1,000 more tokens of a 50,000 vocabulary cost {grown['chunked']:.1f} MiB chunked, {grown['whole']:.1f} whole")
    one_copy_of_the_logits = 1000 * 50_000 * 4 / 2**20
    assert grown["whole"] > one_copy_of_the_logits
    assert grown["chunked"] < one_copy_of_the_logits / 100


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
