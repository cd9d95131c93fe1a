"""The parts of the loop that every algorithm relies on, with a fake engine."""
import random
from concurrent.futures import Future
from types import SimpleNamespace

import torch

from cli import Clock
from data import BUILTIN_MODEL, load_problems, load_tokenizer
from rollout import Response
from run import Run
from sppo import Baseline, Config


def test_every_problem_comes_once_an_epoch_in_a_new_order():
    baseline = Baseline(SimpleNamespace(problems=list(range(10)), config=SimpleNamespace(seed=3)))
    drawn = [problem for step in range(1, 6) for problem in baseline.next_problems(step, 4)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:]
    assert baseline.next_problems(2, 4) == drawn[4:8]
    assert sorted(baseline.next_problems(1, 30)) == sorted(list(range(10)) * 3)  # more than an epoch at once


def test_samples_of_a_prompt_are_adjacent_and_greedy_ones_apart(device):
    """Whatever the order in which responses finish. Here a response is its answer, greedy ones are always right."""
    run = Run.__new__(Run)
    run.config, run.clock, run.random = Config(), Clock(device), random.Random(0)
    run.tokenizer = load_tokenizer(BUILTIN_MODEL)
    problems = load_problems("chain", size=6)
    asked = []

    def generate(prompts, *, temperature, max_tokens, top_p, seeds):
        asked.append((prompts, temperature))
        order = list(range(len(prompts)))
        random.Random(1).shuffle(order)
        for i in order:
            text = "greedy" if temperature[i] == 0 else "sample"
            yield i, Response([*prompts[i], *run.tokenizer.encode(text)], [-1.0] * (len(prompts[i]) + len(text)), i % 5 > 0)

    def submit(text, answer):
        reward = Future()
        reward.set_result(float("greedy" in text))
        return reward

    run.engine = SimpleNamespace(generate=generate)
    run.verifier = SimpleNamespace(submit=submit, timeouts=0, crashes=0)
    batch = run.sample(problems, samples=3, greedy=True)
    assert [p.id for p in batch.problems] == [p.id for p in problems for _ in range(3)]
    for prompt, response in zip(batch.prompts, batch.responses, strict=True):
        assert response.ids[: len(prompt)] == prompt  # each response stands with the prompt that it answers
    assert asked[0][1] == [0.6, 0.6, 0.6, 0.0] * 6  # one pass of the engine
    finished = [i % 5 > 0 for i in range(24)]
    assert batch.rewards.tolist() == [0.0] * 18
    assert batch.greedy_rewards.tolist() == [float(finished[i]) for i in range(3, 24, 4)]  # cut off: no answer, no reward
    assert batch.mask.sum() == batch.lengths.sum() == sum(len(r.ids) for r in batch.responses)
    assert torch.equal(batch.rollout_logprobs, -batch.mask.float())
