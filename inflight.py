"""Nobody waits for the longest response: `--oversample`.

A step trains on B responses. To wait for B that were started together means to wait for the longest, while an engine
that could write hundreds writes a few. So keep more than B in flight, (1 + oversample) B; train on the B that were
started first, once they have finished, which most have long before; and carry the others on: in the next step they are
continued as longer prompts, by a newer policy. Three things keep this honest.

1. The ratio. Tokens of one response may come from several policies. Each keeps the log-probability that it was sampled
   with, and the clipped loss compares with that.
2. Length. The first to finish are the short ones, and a step that trains on those teaches the policy to be short, even
   if the long ones follow some steps later. In the order in which they were started, every step's lengths are those of
   all that is generated.
3. Age. For the same reason nothing is older than `oversample` steps, rounded up: nothing has to be dropped, which would
   bring the bias back.

Only for algorithms with one sample per prompt; one that compares the samples of a group must wait for all of them.
"""
import math
from dataclasses import dataclass

import torch

from data import InputError, Problem, render
from rollout import Response


@dataclass
class Started:
    problem: Problem
    prompt: list[int]  # token ids
    response: Response  # as far as it got
    reward: float | None = None  # once it has finished


class InFlight:
    """Responses that were started and not yet trained on, oldest first. The same on every rank."""

    def __init__(self, run):
        self.run, self.started = run, []

    def take(self, baseline, step):
        """What a step (from 1) trains on: a list of Started, all finished; and metrics."""
        run, c, count = self.run, self.run.config, self.run.config.prompts_per_step
        before = (step - 1) * count  # were trained on
        room = min(math.ceil(count * (1 + c.oversample)), c.steps * count - before) - len(self.started)
        if room > 0:  # towards the end of a run nothing is started that could not be trained on
            self.started += [Started(p, render(p.messages, run.tokenizer), Response([], [], False))
                             for p in baseline.next_problems(before + len(self.started), room)]
        open_ = [s for s in self.started if s.reward is None]
        awaited = sum(s.reward is None for s in self.started[:count])  # they are the first of `open_`
        tokens = sum(len(s.response.ids) for s in open_)
        done = run.generate([s.prompt for s in open_], [s.problem.answer for s in open_], [c.temperature] * len(open_),
                            begun=[s.response for s in open_], awaited=awaited)
        for i, (response, reward) in done.items():
            open_[i].response, open_[i].reward = response, reward
        taken, self.started = self.started[:count], self.started[count:]
        return taken, {"rollout/generated_tokens": sum(len(s.response.ids) for s in open_) - tokens,
                       "rollout/in_flight": len(self.started)}

    def state_dict(self):
        """Flat tensors: token ids and log-probabilities of all, and a row of numbers for each."""
        rows = [(s.problem.id, len(s.response.ids), s.response.finished, math.nan if s.reward is None else s.reward)
                for s in self.started]
        return {"rows": torch.tensor(rows, dtype=torch.float64).view(-1, 4),
                "ids": torch.tensor([token for s in self.started for token in s.response.ids], dtype=torch.int32),
                "logprobs": torch.tensor([lp for s in self.started for lp in s.response.logprobs], dtype=torch.float64)}

    def load_state_dict(self, state):
        problems = {p.id: p for p in self.run.problems}
        rows = state["rows"].tolist()
        if missing := [int(row[0]) for row in rows if int(row[0]) not in problems]:
            raise InputError(f"the checkpoint has a response in flight to problem {missing[0]}, which the dataset lacks; "
                             "continue with the dataset that the run began with")
        lengths = [int(row[1]) for row in rows]
        self.started = [
            Started(problems[int(problem)], render(problems[int(problem)].messages, self.run.tokenizer),
                    Response(ids.tolist(), logprobs.tolist(), bool(finished)), None if math.isnan(reward) else reward)
            for (problem, _, finished, reward), ids, logprobs in zip(
                rows, state["ids"].split(lengths), state["logprobs"].split(lengths), strict=True)]
