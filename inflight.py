"""Nobody waits for the longest response: `--oversample`.

A step trains on B responses. If B are started together, the step must wait for the longest of them, while an
engine that could write hundreds at once writes only a few. So keep more than B in flight, stop when B have
finished, and train on these. The others are continued in the next step, as longer prompts, by a newer policy.
Four things keep this correct.

1. The ratio. The tokens of one response may come from several policies. Each token keeps the log-probability
   that it was sampled with, and the clipped loss compares with that.
2. Length. Short responses finish first. But no response that was started is dropped: it is trained on once,
   some steps later, and near the end of a run none is started that could no longer be trained on. So a run
   trains on exactly the responses that it generated, long and short.
3. The baseline. A reward is compared with what was expected when its response was started. The expectation
   rises as the policy improves: compared with today's, a long response would seem worse than it was.
4. Age. A response that was started MAX_AGE steps ago is waited for. (Dropping it would bring back
   the bias against long responses.) The engine stays busy: whatever else finishes is ready for the next step.

Only for algorithms with one sample per prompt: those that compare the samples of a group must wait for all of
them.
"""
import math
from dataclasses import asdict, dataclass

import torch

from cli import InputError
from data import Problem, check_rows, marks_of
from engines import Response
from rollout import Batch

MAX_AGE = 8  # steps: older responses are waited for


@dataclass(eq=False)  # compared by identity: two responses to a problem may look the same
class Started:
    """A response that was started and not yet trained on."""
    problem: Problem
    prompt: list[int]  # token ids
    step: int  # in which it was started
    expected: float | None  # what `Baseline.expect` gave at that time (SPPO: a logit; SPO: a chance)
    response: Response  # as far as it got
    reward: float | None = None  # once it has finished


class InFlight:
    """The responses that were started and not yet trained on, oldest first. The same on every rank."""

    def __init__(self, config, sampler, problems):
        self.config, self.sampler, self.started = config, sampler, []
        self.problems = {p.id: p for p in problems}

    def start(self, baseline, step):
        """Chooses the problems whose responses start in this step (from 1), and asks what is expected of
        them. The loop calls this while vLLM still sleeps, since a critic needs memory to answer."""
        c, count = self.config, self.config.prompts_per_step
        trained_on = (step - 1) * count
        room = min(math.ceil(count * (1 + c.oversample)), c.steps * count - trained_on) - len(self.started)
        if room > 0:
            problems = baseline.next_problems(trained_on + len(self.started), room)
            with self.sampler.clock("critic"):
                expected = baseline.expect(problems)
            self.started += [Started(p, self.sampler.prompt(p), step, value, Response([], [], False))
                             for p, value in zip(problems, expected, strict=True)]

    def sample(self, baseline, step):
        """The Batch of a step: as many responses as a step trains on, the first to finish."""
        c, count = self.config, self.config.prompts_per_step
        self.start(baseline, step)  # in the first step, or with a larger --oversample; else it has been done
        unfinished = [s for s in self.started if s.reward is None]
        finished = len(self.started) - len(unfinished)
        overdue = {i for i, s in enumerate(unfinished) if step - s.step >= MAX_AGE}
        done = self.sampler.generate(
            [s.prompt for s in unfinished], [s.problem.answer for s in unfinished],
            [c.temperature] * len(unfinished), partial=[s.response for s in unfinished], wait_for=overdue,
            pause_after=max(0, count - finished))
        for i, (response, reward) in done.items():
            unfinished[i].response, unfinished[i].reward = response, reward
        taken = [s for s in self.started if s.reward is not None][:count]
        self.started = [s for s in self.started if s not in taken]
        batch = Batch([s.problem for s in taken], [s.prompt for s in taken], [s.response for s in taken],
                      torch.tensor([s.reward for s in taken]))
        if all(s.expected is not None for s in taken):
            batch.expected = torch.tensor([s.expected for s in taken])
        self.sampler.metrics |= {"rollout/age": sum(step - s.step for s in taken) / count,
                                 "rollout/overdue": len(overdue), "rollout/in_flight": len(self.started)}
        return batch

    def state_dict(self):
        """Values that JSON can hold, for state.json. A problem is known by its row in the dataset."""
        problems = [s.problem for s in self.started]
        marks = dict(zip((str(p.id) for p in problems), marks_of(problems, self.config), strict=True))
        return {"started": [{**asdict(s), "problem": s.problem.id} for s in self.started], "marks": marks}

    def load_state_dict(self, state):
        """Restores what `state_dict` returned. Raises InputError if a response no longer fits the options."""
        limit, self.started = self.config.max_response_tokens, []
        if state["started"] and not self.config.oversample:
            raise InputError(f"the checkpoint has {len(state['started'])} responses in flight, which would "
                             "be lost; give the --oversample that the run had")
        check_rows(state.get("marks", {}), self.problems.values(), self.config)  # older checkpoints have none
        for saved in state["started"]:
            problem, response = saved["problem"], Response(**saved["response"])
            if problem not in self.problems:
                raise InputError(f"the checkpoint has a response in flight to problem {problem}, which the "
                                 "dataset lacks; continue with the dataset that the run started with")
            if saved["reward"] is None and len(response.ids) >= limit:
                raise InputError(f"--max-response-tokens {limit}: the checkpoint has a response in flight "
                                 f"that has {len(response.ids)} tokens already; raise it to what it was")
            self.started.append(Started(**saved | {"problem": self.problems[problem], "response": response}))
