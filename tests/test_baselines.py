"""What each algorithm subtracts, against loops written straight from the formulas; and SPO's memory."""
import random
import statistics
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cli import InputError
from critic import explained_variance
from data import Problem
from engines import Response
from grpo import GRPO, group_advantages, remax_advantages, rloo_advantages
from ppo import gae, tail_effect, value_loss, whiten
from rollout import Batch
from spo import SPO, ValueTracker, normalize


def close(tensor, expected):
    return torch.allclose(tensor, torch.tensor(expected, dtype=tensor.dtype), rtol=0, atol=1e-6)


def random_groups(seed):
    rng = random.Random(seed)
    n = rng.randint(2, 9)
    groups = [[float(rng.random() < 0.5) for _ in range(n)] for _ in range(rng.randint(1, 6))]
    groups += [[0.0] * n, [1.0] * n, [1.0] + [0.0] * (n - 1)]  # nobody, everybody, one
    return n, groups, torch.tensor([r for group in groups for r in group], dtype=torch.float64)


@pytest.mark.parametrize("seed", range(8))
def test_group_advantages(seed):
    n, groups, rewards = random_groups(seed)
    plain = [r - sum(g) / n for g in groups for r in g]
    divided = [(r - sum(g) / n) / (statistics.stdev(g) + 1e-6) for g in groups for r in g]
    assert close(group_advantages(rewards, n), divided)
    assert close(group_advantages(rewards, n, normalize=False), plain)
    equal = [i for i, g in enumerate(groups) for _ in g if len(set(g)) == 1]
    assert equal and all(group_advantages(rewards.float(), n).view(-1, n)[i].eq(0).all() for i in equal)  # exactly


@pytest.mark.parametrize("reward", [0.1, 0.7, 0.9])
@pytest.mark.parametrize("n", [3, 8, 12])
def test_equal_rewards_in_between_say_nothing(reward, n):
    """Whose mean in float32 is another number."""
    rewards = torch.tensor([reward] * n + [0.7] * (n - 1) + [0.1])
    for advantages in group_advantages(rewards, n), rloo_advantages(rewards, n):
        assert not advantages[:n].any() and advantages[n:].all()
    run = SimpleNamespace(config=SimpleNamespace(group_size=n, normalize=True))
    assert GRPO(run).update(SimpleNamespace(rewards=rewards)) == {
        "group/all_equal": 0.5, "group/all_right": 0, "group/all_wrong": 0}
    assert explained_variance(np.full(n, 0.5), rewards[:n].numpy()) is None


@pytest.mark.parametrize("seed", range(8))
def test_rloo_and_remax_advantages(seed):
    n, groups, rewards = random_groups(seed)
    assert close(rloo_advantages(rewards, n),
                 [g[i] - sum(g[j] for j in range(n) if j != i) / (n - 1) for g in groups for i in range(n)])
    greedy = torch.randint(2, rewards.shape).double()
    assert close(remax_advantages(rewards, greedy), [r - g for r, g in zip(rewards.tolist(), greedy.tolist(), strict=True)])


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("holes", [False, True])
def test_gae(seed, holes):
    """Rewards anywhere, rows of unequal length, and with `holes` masked tokens in the middle (as of a tool's output)."""
    torch.manual_seed(seed)
    random.seed(seed)
    rows, length = random.randint(1, 5), random.randint(1, 9)
    gamma, lam = random.choice([(1.0, 1.0), (random.random(), random.random())])
    rewards, values = torch.randn(2, rows, length, dtype=torch.float64)
    mask = torch.arange(length) < torch.randint(1, length + 1, (rows, 1))
    if holes:
        mask = mask & (torch.rand(rows, length) < 0.6)
    expected = torch.zeros(2, rows, length, dtype=torch.float64)
    for b in range(rows):
        tokens = [t for t in range(length) if mask[b, t]]
        r, v = [rewards[b, t].item() for t in tokens], [values[b, t].item() for t in tokens] + [0.0]
        for i, t in enumerate(tokens):  # eq. 16, as a sum
            advantage = sum((gamma * lam) ** (j - i) * (r[j] + gamma * v[j + 1] - v[j]) for j in range(i, len(tokens)))
            expected[0, b, t], expected[1, b, t] = advantage, advantage + v[i]
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    assert torch.allclose(advantages, expected[0], rtol=0, atol=1e-6)
    assert torch.allclose(returns, expected[1], rtol=0, atol=1e-6)


def test_with_gamma_and_lambda_of_one_an_advantage_is_the_reward_less_the_value():
    values, mask = torch.rand(3, 4), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    rewards = torch.tensor([[0, 0, 0, 1.0], [0, 0, 0, 0], [1, 0, 0, 0]])
    advantages, returns = gae(rewards, values, mask)
    assert torch.allclose(advantages, (torch.tensor([[1.0], [0], [1]]) - values) * mask)
    assert torch.allclose(returns, torch.tensor([[1.0], [0], [1]]) * mask)


def test_whiten_and_normalize():
    torch.manual_seed(0)
    x, mask = torch.randn(4, 5, dtype=torch.float64) * 3 + 2, torch.rand(4, 5) < 0.6
    inside = [x[b, t].item() for b in range(4) for t in range(5) if mask[b, t]]
    mean, std = statistics.mean(inside), statistics.stdev(inside)
    assert close(whiten(x, mask), [[(x[b, t].item() - mean) / std if mask[b, t] else 0.0 for t in range(5)] for b in range(4)])
    row = x[0]
    assert close(normalize(row), [(v - statistics.mean(row.tolist())) / statistics.stdev(row.tolist()) for v in row.tolist()])
    for equal in (normalize(torch.full((8,), 0.3)), whiten(torch.full((2, 7), 0.3), torch.ones(2, 7))):
        assert equal.abs().max() < 1e-6  # nothing to prefer


def test_normalised_by_response_the_mean_over_tokens_is_not_zero():
    """What SPO++ observes (arXiv 2608.24870), and spo.py says: the loss averages over tokens, `normalize` over responses."""
    advantages = normalize(torch.tensor([-0.75, 0.25, 0.5]))  # long responses fail

    def token_mean(lengths):
        tokens = [a for a, n in zip(advantages.tolist(), lengths, strict=True) for _ in range(n)]
        return statistics.mean(tokens)
    assert token_mean([6, 6, 6]) == pytest.approx(0, abs=1e-6)
    assert token_mean([20, 4, 4]) < -0.5


@pytest.mark.parametrize("kind", ["mse", "bce"])
def test_value_loss(kind):
    torch.manual_seed(0)
    outputs, old, returns = torch.randn(3, 4, dtype=torch.float64), *torch.rand(2, 3, 4, dtype=torch.float64)
    mask = torch.rand(3, 4) < 0.7
    total = 0.0
    for b in range(3):
        for t in range(4):
            if mask[b, t]:
                out, v, r = outputs[b, t].item(), old[b, t].item(), returns[b, t].item()
                if kind == "bce":
                    p = 1 / (1 + np.exp(-out))
                    total -= r * np.log(p) + (1 - r) * np.log(1 - p)
                else:
                    total += max((out - r) ** 2, (min(max(out, v - 0.2), v + 0.2) - r) ** 2) / 2
    assert abs(value_loss(outputs, old, returns, mask, 7, kind, 0.2).item() - total / 7) < 1e-6


def test_tail_effect():
    """A critic that knows nothing in the first half of a response and everything in the second, at two lengths."""
    lengths, rewards = torch.tensor([20, 4, 20, 4]), torch.tensor([1.0, 1.0, 0.0, 0.0])
    values = torch.full((4, 20), 0.5)
    for b in range(4):
        values[b, lengths[b] // 2 : lengths[b]] = rewards[b]
        values[b, lengths[b] :] = 1 - rewards[b]  # beyond the end: never looked at
    assert tail_effect(values, lengths, rewards) == {f"critic/auc_tenth_{k}": 0.5 if k <= 5 else 1.0 for k in range(1, 11)}


# ---- SPO's tracker --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("first_samples", [0, 8])
def test_tracker_after_a_random_history(seed, first_samples):
    """Batches of 12 from 10 prompts: some are drawn twice, and each time counts."""
    rng = random.Random(seed)
    tracker, alpha, beta = ValueTracker(10), [0.5] * 10, [0.5] * 10
    if first_samples:
        rewards = [[rng.randint(0, 1) for _ in range(first_samples)] for _ in range(7)]
        tracker.start(list(range(3, 10)), np.array(rewards, float))
        for i in range(7):
            alpha[i + 3] = 8 * (sum(rewards[i]) + 0.5) / (first_samples + 1)
            beta[i + 3] = 8 * (first_samples - sum(rewards[i]) + 0.5) / (first_samples + 1)
    for _ in range(20):
        ids = [rng.randrange(10) for _ in range(12)]
        rewards, kl = [rng.randint(0, 1) for _ in ids], [rng.choice([0.0, rng.random() * 0.02, 1.0]) for _ in ids]
        tracker.update(ids, rewards, kl)
        for i, r, d in zip(ids, rewards, kl, strict=True):
            rho = min(max(2 ** (-d / 0.06), 0.875), 0.96)
            alpha[i], beta[i] = rho * alpha[i] + r, rho * beta[i] + (1 - r)
        v = [a / (a + b) for a, b in zip(alpha, beta, strict=True)]
        asked = [rng.randrange(10) for _ in range(15)]
        assert np.allclose(tracker.values(asked), [v[i] for i in asked], rtol=0, atol=1e-6)
        assert np.allclose(tracker.sampling_weights(), [(x * (1 - x)) ** 0.5 + 0.05 for x in v], rtol=0, atol=1e-6)


class FakePolicy:
    """Every token has the log-probability -1 - `moved`, and 0 past a response's end."""
    moved = 0.0

    def logprobs(self, sequences):
        longest = max(len(r) for _, r in sequences)
        return torch.tensor([[-1.0 - self.moved] * len(r) + [0.0] * (longest - len(r)) for _, r in sequences])


def spo_with(problems, **config):
    return SPO(SimpleNamespace(problems=problems, held_out=[], policy=FakePolicy(),
                               config=SimpleNamespace(seed=0, init_samples=0, suffix="", **config)))


def batch_of(problems, rewards):
    responses = [Response([5] * (2 + i % 3), [-1.0] * (2 + i % 3), True) for i in range(len(problems))]
    return Batch(problems, [[1, 2]] * len(problems), responses, torch.tensor(rewards))


def test_spo_forgets_by_how_far_the_policy_moved_on_the_last_response():
    problems = [Problem(i, (), "") for i in (40, 7, 9)]
    spo = spo_with(problems)
    first = batch_of([problems[0], problems[1], problems[0]], [1.0, 0.0, 1.0])  # one of them twice
    assert torch.allclose(spo.advantages(first), normalize(torch.tensor([0.5, -0.5, 0.5])))
    spo.update(first)
    assert spo.distance.tolist() == [0, 0, 0]  # nothing to forget yet
    assert len(spo.last[40][0]) == 4  # of two responses to a problem the later one is kept
    spo.run.policy.moved = 0.01
    second = batch_of(problems, [0.0, 0.0, 1.0])
    values = [(0.96 * (0.96 * 0.5 + 1) + 1) / (0.96 * (0.96 + 1) + 1), 0.96 * 0.5 / 1.96, 0.5]  # before the update
    assert torch.allclose(spo.advantages(second), normalize(second.rewards - torch.tensor(values)), atol=1e-5)
    assert np.allclose(spo.distance, [0.01, 0.01, 0.0], atol=1e-3)  # float16
    assert spo.update(second)["tracker/rho"] == pytest.approx((2 * 2 ** (-0.01 / 0.06) + 0.96) / 3, abs=1e-3)


def test_spo_draws_uncertain_problems_more_often_and_the_same_ones_on_every_rank():
    problems = [Problem(i, (), "") for i in range(100, 300)]
    spo, other = spo_with(problems), spo_with(problems)
    for tracker in (spo.tracker, other.tracker):
        tracker.alpha[100:200], tracker.beta[100:200] = 1e-6, 8.0  # never solved: weight 0.05 against 0.55
    drawn = [p.id for step in range(1, 101) for p in spo.next_problems(20 * step, 20)]
    assert 0.04 < np.mean([i < 200 for i in drawn]) < 0.14
    assert all(len(set(drawn[i : i + 20])) == 20 for i in range(0, len(drawn), 20))  # no problem twice in a step
    assert [p.id for p in other.next_problems(80, 20)] == drawn[60:80]
    assert len(spo.next_problems(20, 500)) == 500  # more than there are


def test_spo_survives_a_checkpoint(tmp_path):
    problems = [Problem(i, ({"content": f"{i}?"},), "") for i in range(6)]
    spo = spo_with(problems)
    batch = batch_of(problems, [1.0, 0.0, 1.0, 0.0, 1.0, 1.0])
    spo.advantages(batch)
    spo.update(batch)
    torch.save(spo.state_dict(), tmp_path / "state.pt")
    resumed = spo_with(problems)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt"))
    for baseline in (spo, resumed):
        baseline.run.policy.moved = 0.02
    assert torch.equal(spo.advantages(batch), resumed.advantages(batch))
    assert spo.distance.tolist() == resumed.distance.tolist() and spo.distance.max() > 0
    assert [p.id for p in spo.next_problems(12, 4)] == [p.id for p in resumed.next_problems(12, 4)]
    with pytest.raises(InputError, match="tracks 6 problems and the dataset has 3"):
        spo_with(problems[:3]).load_state_dict(spo.state_dict())
    # A dataset of as many problems in another order: what is known of one would be taken for another's.
    changed = [*problems[:4], *(Problem(i, problems[9 - i].messages, "") for i in (4, 5))]
    with pytest.raises(InputError, match="sums.jsonl: row 5 was another problem"):
        spo_with(changed, dataset="sums.jsonl").load_state_dict(spo.state_dict())


def test_the_tracker_is_no_slower_with_a_hundred_thousand_prompts():
    """Milliseconds of a step of 1,024 prompts; printed, not asserted (`pytest -s`)."""
    for size in (1_000, 100_000):
        spo = spo_with([Problem(i, (), "") for i in range(size)])
        rng, spent = np.random.default_rng(0), []
        for step in range(2, 12):
            start = time.perf_counter()
            ids = [p.id for p in spo.next_problems(1024 * step, 1024)]
            spo.tracker.values(ids)
            spo.tracker.update(ids, rng.integers(0, 2, 1024).tolist(), rng.random(1024) * 0.02)
            spent.append(1000 * (time.perf_counter() - start))
        print(f"\n{size:,} prompts: {statistics.median(spent):.1f} ms a step")
