"""The parts of the loop that every algorithm relies on, with a fake engine."""
import dataclasses
import random
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import inflight
from checkpoint import Stop, check_state
from cli import BUILTIN_MODEL, InputError
from data import Problem, load_problems, load_tokenizer
from engines import Response
from inflight import InFlight
from log import Clock
from rollout import Sampler
from sppo import Baseline, TrainConfig, checked_advantages


def test_every_problem_comes_once_an_epoch_in_a_new_order():
    baseline = Baseline(SimpleNamespace(problems=list(range(10)), config=SimpleNamespace(seed=3)))
    drawn = [problem for step in range(5) for problem in baseline.next_problems(4 * step, 4)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:]
    assert baseline.next_problems(4, 4) == drawn[4:8]
    assert sorted(baseline.next_problems(0, 30)) == sorted(list(range(10)) * 3)  # more than an epoch at once


def test_samples_of_a_prompt_are_adjacent_and_greedy_ones_apart(device):
    """Whatever the order in which responses finish. Here a response is its answer, greedy ones are always right."""
    tokenizer = load_tokenizer(BUILTIN_MODEL)
    problems = load_problems("chain:6")
    asked = []

    def generate(prompts, *, temperature, max_tokens, top_p, seeds, partial, pause_after, wait_for):
        asked.append((prompts, temperature))
        order = list(range(len(prompts)))
        random.Random(1).shuffle(order)
        for i in order:
            text = "greedy" if temperature[i] == 0 else "sample"
            yield i, Response([*prompts[i], *tokenizer.encode(text)], [-1.0] * (len(prompts[i]) + len(text)), i % 5 > 0)

    def submit(text, answer):
        reward = Future()
        reward.set_result(float("greedy" in text))
        return reward

    verifier = SimpleNamespace(submit=submit, timeouts=0, crashes=0, errors=0)
    sampler = Sampler(TrainConfig(temperature=0.6), tokenizer, SimpleNamespace(generate=generate), verifier, Clock(device))
    batch = sampler.sample(problems, samples=3, greedy=True)
    assert [p.id for p in batch.problems] == [p.id for p in problems for _ in range(3)]
    for prompt, response in zip(batch.prompts, batch.responses, strict=True):
        assert response.ids[: len(prompt)] == prompt  # each response stands with the prompt that it answers
    assert asked[0][1] == [0.6, 0.6, 0.6, 0.0] * 6  # one pass of the engine
    finished = [i % 5 > 0 for i in range(24)]
    assert batch.rewards.tolist() == [0.0] * 18
    assert batch.greedy_rewards.tolist() == [float(finished[i]) for i in range(3, 24, 4)]  # cut off: no answer, no reward
    assert batch.mask.sum() == batch.lengths.sum() == sum(len(r.ids) for r in batch.responses)
    assert torch.equal(batch.rollout_logprobs, -batch.mask.float())


class FakeRun:
    """A sampler whose engine writes one token of every response in a step of its own: its problem's answer, with the
    policy's number as its log-probability. A response is as long as its answer says."""

    def __init__(self, lengths, **options):
        self.config = TrainConfig(prompts_per_step=4, steps=10, old_logprobs="rollout", **options)
        self.problems = [Problem(i, ({"role": "user", "content": str(i)},), str(n)) for i, n in enumerate(lengths)]
        self.in_flight, self.policy, self.baseline = InFlight(self.config, self, self.problems), 0, Baseline(self)
        self.clock, self.metrics, self.prompt = Clock(torch.device("cpu")), {}, lambda problem: [problem.id]
        self.baseline.expect = lambda problems: [1000 * self.policy + p.id for p in problems]

    def generate(self, prompts, answers, temperatures, partial, pause_after, wait_for):
        done = {}
        responses = [Response([*r.ids], [*r.logprobs], False) for r in partial]

        def enough():
            return len(done) >= pause_after and wait_for <= done.keys()
        while not enough():
            for i, r in enumerate(responses):
                if i not in done and not enough():
                    r.ids.append(int(answers[i]))
                    r.logprobs.append(-float(self.policy))
                    if len(r.ids) == int(answers[i]):
                        done[i] = Response(r.ids, r.logprobs, True), 1.0
        return {**{i: (r, None) for i, r in enumerate(responses)}, **done}

    def steps(self, first, last):
        """(Batch, metrics, the Started of the batch) of each step."""
        steps = []
        for self.policy in range(first, last + 1):
            before = {s.problem.id: s for s in self.in_flight.started}
            batch = self.in_flight.sample(self.baseline, self.policy)
            steps.append((batch, dict(self.metrics), {p.id: before[p.id].step if p.id in before else self.policy
                                                      for p in batch.problems}))
        return steps


def test_what_is_in_flight_is_trained_on_exactly_once_whatever_its_length(monkeypatch):
    lengths = random.Random(0).choices([1, 2, 3, 40], k=40)
    for oversample, staleness in ((1.0, 100), (3.0, 2), (0.5, 1)):
        monkeypatch.setattr(inflight, "MAX_AGE", staleness)
        run = FakeRun(lengths, oversample=oversample)
        steps = run.steps(1, 10)
        assert all(len(batch.responses) == 4 for batch, _, _ in steps) and not run.in_flight.started
        responses = [r for batch, _, _ in steps for r in batch.responses]
        assert sorted(len(r.ids) for r in responses) == sorted(lengths)  # no bias: those generated, each once
        assert {p.id for batch, _, _ in steps for p in batch.problems} == set(range(40))
        for batch, _, started in steps:
            # The expectation is that of the step in which a response was started, not of the one that trains on it.
            assert batch.expected.tolist() == [1000 * started[p.id] + p.id for p in batch.problems]
            for p, r in zip(batch.problems, batch.responses, strict=True):
                assert r.finished and r.ids == [int(p.answer)] * len(r.ids)
        ages = [step - begun for step, (_, _, started) in enumerate(steps, 1) for begun in started.values()]
        assert max(ages) <= staleness + oversample  # waited for in time, and then perhaps in turn
        assert staleness == 100 or sum(m["rollout/overdue"] for _, m, _ in steps) > 0
        if staleness == 100:  # each token keeps the log-probability of the policy that chose it
            slowest = max(responses, key=lambda r: len(set(r.logprobs)))
            assert len(set(slowest.logprobs)) > 3
            assert slowest.logprobs == sorted(slowest.logprobs, reverse=True)
            first, last = (steps[i][0].lengths.sum() for i in (0, -1))
            assert first < last  # the quickest came first


def test_nothing_is_expected_while_vllm_is_awake():
    """The loop asks for the next step's expectations before vLLM wakes, and they are those that `sample` would ask for."""
    lengths, asked = random.Random(1).choices([1, 2, 3, 40], k=40), []
    plain, early = (FakeRun(lengths, oversample=2.0) for _ in range(2))
    expect = early.baseline.expect
    early.baseline.expect = lambda problems: asked.append(len(problems)) or expect(problems)
    for step in range(1, 11):
        before, early.policy = len(asked), step
        batch = early.in_flight.sample(early.baseline, step)
        assert step == 1 or len(asked) == before
        early.policy = step + 1
        early.in_flight.start(early.baseline, step + 1)
        (other, _, _), = plain.steps(step, step)
        assert other.responses == batch.responses and torch.equal(other.expected, batch.expected)
    assert sum(asked) == 40 and len(asked) > 3


def test_what_is_in_flight_survives_a_checkpoint(monkeypatch):
    monkeypatch.setattr(inflight, "MAX_AGE", 4)
    lengths = random.Random(1).choices([1, 2, 3, 40], k=40)
    run, resumed = (FakeRun(lengths, oversample=2.0) for _ in range(2))
    run.steps(1, 4)
    assert any(s.reward is None and s.response.ids for s in run.in_flight.started)
    resumed.in_flight.load_state_dict(run.in_flight.state_dict())
    with pytest.raises(InputError, match="responses in flight, which would be lost; give the --oversample"):
        FakeRun(lengths).in_flight.load_state_dict(run.in_flight.state_dict())
    shorter = FakeRun(lengths, oversample=2.0, max_response_tokens=2)
    with pytest.raises(InputError, match="a response in flight that has [0-9]+ tokens already"):
        shorter.in_flight.load_state_dict(run.in_flight.state_dict())
    for (one, _, _), (other, _, _) in zip(resumed.steps(5, 10), run.steps(5, 10), strict=True):
        assert one.responses == other.responses and torch.equal(one.expected, other.expected)
    run = FakeRun(lengths, oversample=2.0)
    run.steps(1, 2)
    # Another order of the rows: an answer would be compared with another problem's.
    resumed.in_flight.problems = {i: dataclasses.replace(run.problems[i - 1], id=i) for i in range(40)}
    with pytest.raises(InputError, match=r"row \d+ was another problem when the checkpoint was written"):
        resumed.in_flight.load_state_dict(run.in_flight.state_dict())
    resumed.in_flight.problems = {i: run.problems[i] for i in range(3)}
    with pytest.raises(InputError, match="which the dataset lacks"):
        resumed.in_flight.load_state_dict(run.in_flight.state_dict())


def test_what_a_new_baseline_gives_is_checked():
    class New(Baseline):
        def state_dict(self):
            return self.state

        def advantages(self, batch):
            return self.given(batch)

    batch, new = SimpleNamespace(rewards=torch.zeros(4), mask=torch.ones(4, 7, dtype=torch.bool)), New(None)
    for shape in (4,), (4, 7):
        for dtype in torch.float32, torch.float64, torch.bool:
            new.given = lambda batch, shape=shape, dtype=dtype: torch.ones(shape, dtype=dtype)
            assert checked_advantages(new, batch).dtype == {torch.bool: torch.float32}.get(dtype, dtype)
        new.given = lambda batch, shape=shape: torch.zeros(shape, requires_grad=True) * 2
        assert not checked_advantages(new, batch).requires_grad
    for bad, said in (torch.zeros(4, 1), r"torch.Size\(\[4, 1\]\)"), ([0.0] * 4, "list"), (None, "NoneType"):
        new.given = lambda batch, bad=bad: bad
        with pytest.raises(InputError, match=rf"New.advantages gave {said}; it must give a tensor of torch.Size\(\[4\]\)"):
            checked_advantages(new, batch)
    new.given = lambda batch: batch.rewards.sub_(0.5)
    with pytest.raises(InputError, match="New.advantages changed batch.rewards"):
        checked_advantages(new, batch)
    for new.state in {}, {"mean": 0.5, "seen": [1, 2], "weights": torch.zeros(3)}, {"mean": np.float32(0.5)}:
        check_state(new)
    new.critic = SimpleNamespace(state_dict=lambda: {"updates": 1, "head/weight": torch.zeros(3)})
    for new.state in {"updates": 1, "head/weight": torch.zeros(3), "own": 1}, {"critic/updates": 1, "critic/head/weight": 2}:
        check_state(new)
    new.state = {"own": 1}
    with pytest.raises(InputError, match="New.state_dict: leaves out the critic, which --resume would start anew"):
        check_state(new)
    new.critic = None
    for new.state in {"mean": np.zeros(3)}, {"net": {"weight": torch.zeros(3)}}, {"run": object()}:
        with pytest.raises(InputError, match="New.state_dict: '(mean|net|run)' cannot be kept in a checkpoint"):
            check_state(new)


def test_training_in_a_thread_that_is_told_of_no_signals():
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: Stop().__enter__().requested).result() == 0
