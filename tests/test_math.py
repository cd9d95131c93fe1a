"""The mathematics, against a second computation written naively, token by token, in float64."""
import math
import random

import numpy as np
import pytest
import torch

import policy
from critic import auc, explained_variance
from log import skill
from policy import ChunkedLogProbs
from sppo import clipped_policy_loss, rollout_weights, sequence_advantages


def naive_objective(ratio, advantage, low, high, dual):
    clipped = min(max(ratio, 1 - low), 1 + high)
    objective = min(ratio * advantage, clipped * advantage)
    if dual is not None and advantage < 0:
        objective = max(objective, dual * advantage)
    return objective


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("per_token", [False, True])
def test_clipped_policy_loss_and_its_gradient(seed, per_token):
    random.seed(seed)
    torch.manual_seed(seed)
    rows, length = random.randint(1, 5), random.randint(1, 9)
    low, high, dual = random.uniform(0.05, 0.4), random.uniform(0.05, 0.4), random.choice([None, 1.5, 3.0])
    old = -torch.rand(rows, length, dtype=torch.float64) * 5
    new = (old + torch.randn(rows, length, dtype=torch.float64)).requires_grad_()
    advantages = torch.randn(rows, length, dtype=torch.float64) if per_token else torch.randn(rows, dtype=torch.float64)
    mask = torch.rand(rows, length) < 0.7
    mask[0, 0] = True
    loss, metrics = clipped_policy_loss(new, old, advantages, mask, clip_low=low, clip_high=high, dual_clip=dual)
    loss.backward()

    def naive(values):
        total, count, clipped = 0.0, 0, 0
        for b in range(rows):
            for t in range(length):
                if mask[b, t]:
                    a = advantages[b, t].item() if per_token else advantages[b].item()
                    ratio = math.exp(values[b][t] - old[b, t].item())
                    total -= naive_objective(ratio, a, low, high, dual)
                    clipped += naive_objective(ratio, a, low, high, None) < ratio * a
                    count += 1
        return total / count, clipped / count

    values = new.tolist()
    expected, clipped = naive(values)
    assert abs(loss.item() - expected) < 1e-6
    assert abs(metrics["clip_fraction"].item() - clipped) < 1e-6
    step = 1e-6
    for b in range(rows):
        for t in range(length):
            up, down = [r[:] for r in values], [r[:] for r in values]
            up[b][t] += step
            down[b][t] -= step
            slope = (naive(up)[0] - naive(down)[0]) / (2 * step)
            assert abs(new.grad[b, t].item() - slope) < 1e-6


@pytest.mark.parametrize("cap", [0.5, 2.0, 30.0])
def test_rollout_correction_weighs_each_token_of_the_loss(cap):
    """Against the naive loss, each token's term times min(pi_old / pi_rollout, cap)."""
    torch.manual_seed(0)
    rollout, new = (-3 * torch.rand(4, 6, dtype=torch.float64) for _ in range(2))
    old, advantages, mask = rollout + torch.randn(4, 6), torch.randn(4, dtype=torch.float64), torch.rand(4, 6) < 0.7
    old[0, 0], mask[0, 0] = 200.0, True  # no probability, and yet no infinity
    weights = rollout_weights(old, rollout, mask, cap)
    old[0, 0] = new[0, 0]
    loss, _ = clipped_policy_loss(new, old, weights * advantages[:, None], mask)
    total = 0.0
    for b in range(4):
        for t in range(6):
            if mask[b, t]:
                weight = cap if (b, t) == (0, 0) else min(math.exp(old[b, t] - rollout[b, t]), cap)
                total -= weight * naive_objective(math.exp(new[b, t] - old[b, t]), advantages[b].item(), 0.2, 0.2, 3.0)
    assert loss.item() == pytest.approx(total / mask.sum().item(), rel=1e-9)
    assert (weights[~mask] == min(1, cap)).all()


def test_losses_of_micro_batches_add_up():
    torch.manual_seed(0)
    new, old, advantages = torch.randn(6, 5), torch.randn(6, 5), torch.randn(6)
    mask = torch.rand(6, 5) < 0.6
    whole, whole_metrics = clipped_policy_loss(new, old, advantages, mask)
    parts = [clipped_policy_loss(new[i : i + 2], old[i : i + 2], advantages[i : i + 2], mask[i : i + 2],
                                 num_tokens=mask.sum()) for i in (0, 2, 4)]
    assert torch.allclose(sum(loss for loss, _ in parts), whole)
    for name in whole_metrics:
        assert torch.allclose(sum(metrics[name] for _, metrics in parts), whole_metrics[name])


def test_a_token_whose_probability_exploded_stays_finite():
    new = torch.tensor([[0.0, 0.0]], requires_grad=True)
    loss, _ = clipped_policy_loss(new, torch.tensor([[-500.0, -0.1]]), torch.tensor([-1.0]), torch.ones(1, 2), dual_clip=None)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(new.grad).all()


def test_sequence_advantages():
    rewards, logits = torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.tensor([0.0, 0.0, 2.0, -30.0])
    expected = [r - 1 / (1 + math.exp(-v)) for r, v in zip(rewards.tolist(), logits.tolist(), strict=True)]
    assert torch.allclose(sequence_advantages(rewards, logits), torch.tensor(expected), atol=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_log_probabilities_entropies_and_gradients(seed, monkeypatch):
    """Chunked, against softmax over whole logits; chunk sizes that do and do not divide the number of tokens."""
    random.seed(seed)
    torch.manual_seed(seed)
    tokens, hidden_size, vocabulary = random.randint(1, 40), 8, random.randint(3, 50)
    monkeypatch.setattr(policy, "CHUNK_ELEMENTS", vocabulary * random.randint(1, 15))
    temperature = random.choice([0.6, 1.0, 1.7])
    hidden = torch.randn(tokens, hidden_size, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(vocabulary, hidden_size, dtype=torch.float64, requires_grad=True)
    targets, outer = torch.randint(vocabulary, (tokens,)), torch.randn(tokens, dtype=torch.float64)
    logprobs, entropy = ChunkedLogProbs.apply(hidden, weight, targets, temperature)
    (logprobs * outer).sum().backward()
    chunked = hidden.grad.clone(), weight.grad.clone()

    hidden.grad = weight.grad = None
    probabilities = torch.softmax(torch.einsum("nh,vh->nv", hidden, weight) / temperature, dim=-1)
    naive = torch.stack([probabilities[n, targets[n]] for n in range(tokens)]).log()
    (naive * outer).sum().backward()
    assert torch.allclose(logprobs, naive, atol=1e-6)
    assert torch.allclose(entropy, -(probabilities * probabilities.log()).sum(-1), atol=1e-6)
    assert torch.allclose(chunked[0], hidden.grad, atol=1e-6)
    assert torch.allclose(chunked[1], weight.grad, atol=1e-6)


def test_log_probabilities_of_no_tokens():
    """A rank that only keeps the others company scores none, and still has a gradient: zero."""
    hidden, weight = torch.zeros(0, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    logprobs, _ = ChunkedLogProbs.apply(hidden, weight, torch.zeros(0, dtype=torch.long), 1.0)
    logprobs.sum().backward()
    assert weight.grad.abs().sum() == 0


def test_auc_and_explained_variance():
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores, labels = rng.integers(0, 6, 15) / 5, rng.integers(0, 2, 15)
        pairs = [(p, n) for p in scores[labels == 1] for n in scores[labels == 0]]
        if pairs:
            assert abs(auc(scores, labels) - np.mean([(p > n) + 0.5 * (p == n) for p, n in pairs])) < 1e-9
            residual = [r - v for r, v in zip(labels, scores, strict=True)]
            assert abs(explained_variance(scores, labels) - (1 - np.var(residual) / np.var(labels))) < 1e-9
    assert auc(np.array([0.1, 0.2]), np.array([1, 1])) is None
    assert explained_variance(np.array([0.1, 0.2]), np.array([1, 1])) is None


def test_skill_compares_the_critic_with_the_mean_of_the_last_steps():
    earlier = [0.9] * 3 + [0.25, 0.5] * 4  # the window is eight steps: the first three do not count
    rewards, values = [1, 0, 0, 1, 1], [0.8, 0.3, 0.1, 0.6, 0.9]
    surprise = [-math.log(v if r else 1 - v) for r, v in zip(rewards, values, strict=True)]
    constant = [-math.log(0.375 if r else 0.625) for r in rewards]
    assert skill(sum(surprise) / 5, 3 / 5, earlier) == pytest.approx(1 - sum(surprise) / sum(constant))
    assert skill(sum(constant) / 5, 3 / 5, earlier) == pytest.approx(0)
    assert skill(0.7, 0.5, []) is None
    assert math.isfinite(skill(0.7, 0.5, [0.0])) and math.isfinite(skill(0.7, 0.5, [1.0]))
    assert skill(0.1, 0.0, earlier) is None and skill(0.1, 1.0, earlier) is None  # nothing to know
