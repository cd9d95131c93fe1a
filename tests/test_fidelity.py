"""Where a number could differ from the papers' code: prompts, weights of tokens, defaults, and the README's commands."""
import json
import random
import re
import shlex
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, run

from cli import BUILTIN_MODEL, InputError
from data import BOXED_SUFFIX, drop_unverifiable, load_problems
from engines import Response
from equality import verifiable
from eval import EvalConfig
from policy import Policy
from ppo import PPO, PPOConfig
from reward import Verifier
from rollout import Batch
from spo import SPO, SPOConfig
from sppo import TrainConfig, clipped_policy_loss, policy_step, weigh_sequences

PROBLEM = "Find $m + n$ if $\\frac{m}{n} = 0.5$ in lowest terms."
HUB = ("Solve the following math problem step by step. The last line of your response should be of the form Answer: "
       "$Answer (without quotes) where $Answer is the answer to the problem.\n\n" + PROBLEM +
       '\n\nRemember to put your answer on its own line after "Answer:".')  # as DAPO-Math-17k has it on the hub


def test_dapos_own_order_gives_way_to_the_box(tmp_path):
    row = {"prompt": [{"role": "user", "content": HUB}], "reward_model": {"ground_truth": "3"}}
    (tmp_path / "x.jsonl").write_text(json.dumps(row) + "\n")
    problem, = load_problems(str(tmp_path / "x.jsonl"))
    assert problem.messages[-1]["content"] == f"{PROBLEM} {BOXED_SUFFIX}"


def test_ppo_whitens_the_whole_batch_before_it_is_cut():
    torch.manual_seed(0)
    responses = [Response([1] * n, [0.0] * n, True) for n in (5, 1, 4, 2)]
    batch = Batch([None] * 4, [[1]] * 4, responses, torch.tensor([1.0, 0.0, 0.0, 1.0]))
    values = torch.rand(4, 5)
    ppo = PPO.__new__(PPO)
    ppo.run = SimpleNamespace(config=PPOConfig(minibatch=2))
    ppo.critic = SimpleNamespace(values=lambda sequences: values)
    got = ppo.advantages(batch)
    plain = {(b, t): (batch.rewards[b] - values[b, t]).item() for b in range(4) for t in range(batch.lengths[b])}
    mean = sum(plain.values()) / len(plain)
    std = (sum((a - mean) ** 2 for a in plain.values()) / (len(plain) - 1)) ** 0.5
    for (b, t), advantage in plain.items():
        assert got[b, t].item() == pytest.approx((advantage - mean) / std, abs=1e-5)


def naive_loss(logprobs, old, advantages, lengths, mean, c):
    """Of lists, by the papers' formula: the mean over tokens, or over responses of the mean over their tokens."""
    per_response = []
    for new, before, a, n in zip(logprobs, old, advantages, lengths, strict=True):
        losses = []
        for x, y in list(zip(new, before, strict=True))[:n]:
            ratio = torch.exp(x - y)
            objective = torch.minimum(ratio * a, ratio.clamp(1 - c.clip_low, 1 + c.clip_high) * a)
            losses.append(-torch.maximum(objective, c.dual_clip * a) if a < 0 and c.dual_clip else -objective)
        per_response.append(losses)
    if mean == "token":
        return sum(sum(losses) for losses in per_response) / sum(lengths)
    return sum(sum(losses) / len(losses) for losses in per_response) / len(lengths)


@pytest.mark.parametrize("mean", ["token", "sequence"])
def test_the_mean_of_the_loss_against_a_loop(mean):
    torch.manual_seed(0)
    lengths = [9, 1, 4]
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    new, old, advantages = torch.randn(3, 9), torch.randn(3, 9), torch.tensor([1.0, -2.0, 0.5])
    scaled = weigh_sequences(advantages, torch.tensor(lengths)) if mean == "sequence" else advantages
    loss, _ = clipped_policy_loss(new, old, scaled, mask)
    assert loss.item() == pytest.approx(naive_loss(new, old, advantages, lengths, mean, TrainConfig(clip_high=0.2)).item(), rel=1e-5)
    per_token = weigh_sequences(advantages[:, None].expand(3, 9), torch.tensor(lengths))
    assert torch.allclose(per_token, weigh_sequences(advantages, torch.tensor(lengths))[:, None].expand(3, 9))


@pytest.mark.parametrize("mean", ["token", "sequence"])
@pytest.mark.parametrize("dual_clip", [3.0, 0.0])
def test_a_policy_step_takes_the_mean_and_the_dual_clip_that_are_asked_for(mean, dual_clip, device):
    """Cut into micro-batches, with a response of advantage 0, and old log-probabilities far enough for both bounds."""
    rng, c = random.Random(0), TrainConfig(loss_mean=mean, dual_clip=dual_clip, clip_high=0.2)
    policy = Policy(BUILTIN_MODEL, device, temperature=1.0, lr=1e-3, dtype="float32", micro_batch_tokens=20,
                    checkpoint_activations=False)
    responses = [Response([rng.randrange(256) for _ in range(n)], [-1.0] * n, True) for n in (11, 3, 6, 8)]
    batch = Batch([None] * 4, [[1, 2]] * 4, responses, torch.zeros(4))
    batch.old_logprobs = policy.logprobs(batch.sequences) + torch.randn(batch.mask.shape)
    advantages = torch.tensor([1.0, -2.0, 0.0, -0.5])
    expected = naive_loss(policy.logprobs(batch.sequences), batch.old_logprobs, advantages, batch.lengths.tolist(), mean, c)
    assert policy_step(policy, batch, range(4), advantages, c)["policy/loss"] == pytest.approx(expected.item(), rel=1e-4)


def test_spos_defaults_are_its_recipes_and_nothing_is_forgotten_at_a_first_visit():
    c = SPOConfig()
    assert (c.temperature, c.dual_clip, c.clip_low, c.clip_high) == (1.0, 10.0, 0.2, 0.28)
    problems = load_problems("chain:6")
    responses = [Response([5, 6], [-1.0] * 2, True)] * 12
    sampled = Batch([p for p in problems for _ in range(2)], [[1]] * 12, responses, torch.ones(12))
    policy = SimpleNamespace(logprobs=lambda sequences: torch.full((len(sequences), 2), -9.0))  # far from everything
    spo = SPO(SimpleNamespace(problems=problems, held_out=[], policy=policy, sampler=SimpleNamespace(
        sample=lambda problems, n: sampled), config=SimpleNamespace(seed=0, init_samples=2, prompts_per_step=6,
                                                                  old_logprobs="policy")))
    spo.next_problems(0, 6)  # starts the tracker
    batch = Batch(problems, [[1]] * 6, responses[:6], torch.ones(6))
    spo.advantages(batch)
    assert spo.distance.tolist() == [0.0] * 6 and spo.tracker.rho(spo.distance).tolist() == [0.96] * 6


PAPERS = dict(temperature=0.6, clip_low=0.2, clip_high=0.2, dual_clip=3.0, lr=1e-6,
              max_response_tokens=8192)
TABLE = {  # the papers' settings, by the dataset of the README's command
    "DeepScaleR": dict(steps=1000, prompts_per_step=256, minibatch=128, critic_lr=5e-6, weight_decay=0.01, max_prompt_tokens=1024),
    "DAPO": dict(prompts_per_step=512, minibatch=32, critic_lr=1e-5, weight_decay=0.1, max_prompt_tokens=2048, steps=200,
                 loss_mean="sequence")}


def test_the_readmes_commands_have_the_papers_settings():
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    commands = [shlex.split(line.split(" sppo.py ")[1], comments=True) for line in text.splitlines()
                if line.startswith("    torchrun") and " sppo.py " in line]
    found = {}
    for arguments in commands:
        config = TrainConfig.parse("", arguments)
        name = next(name for name in TABLE if name in config.dataset)
        found[name] = config
        for option, value in {**PAPERS, **TABLE[name]}.items():
            assert getattr(config, option) == value, (name, option)
    assert found.keys() == TABLE.keys()
    assert PPOConfig().value_clip == 0.5
    assert EvalConfig(model="no/such").temperature == 0.6 and EvalConfig(model="no/such").top_p == 0.95


def test_a_few_gold_answers_that_nobody_can_match_are_dropped_aloud(capsys):
    problems = load_problems("chain:500")
    broken = [problems[7].__class__(p.id, p.messages, "\\frac{" if p.id == 7 else p.answer) for p in problems]
    verifier = Verifier(1, 2.0)
    training, held_out = broken[:400], broken[400:]
    c = SimpleNamespace(dataset="x.jsonl", output="", resume=False, suffix="")
    drop_unverifiable(training, held_out, verifier, c)
    assert [p.id for p in training + held_out] == [p.id for p in problems if p.id != 7]
    printed = capsys.readouterr().out
    assert "x.jsonl, row 8: the answer '\\\\frac{' cannot be read as mathematics; dropped 1 of" in printed
    with pytest.raises(InputError, match=r"x.jsonl, row 8: .* \(as in 1 of 50 rows\); correct or remove"):
        drop_unverifiable(broken[:50], [], verifier, c)
    verifier.close()


@pytest.mark.parametrize("gold, good", [("\\frac{a M^{1 / 3", False), ("\\frac{1}{2}", True), ("\\{1, 2\\}", True),
                                        ("x^{2}", True), ("3}", False)])
def test_unbalanced_gold_answers_are_noticed(gold, good):
    assert verifiable(gold) == good


def test_an_evaluation_says_how_many_problems_cannot_be_won(tmp_path):
    rows = [{"problem": "Compute 1+1 modulo 10.", "answer": "2"}, {"problem": "Compute 2+1 modulo 10.", "answer": "\\frac{3"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run("eval.py", "--benchmarks", tmp_path / "p.jsonl", "--engine", "transformers", "--samples", "2",
               "--temperature", "0.1", "--output", tmp_path / "e.jsonl")
    assert done.returncode == 0, done.stderr
    score = float(re.search(r"p +2 +([\d.]+) \[", done.stdout)[1])
    said = re.search(r"p: 1 of 2 gold answers are broken, such as '\\\\frac{3': .*avg@2 over the others: ([\d.]+)", done.stdout)
    assert float(said[1]) == pytest.approx(2 * score)
