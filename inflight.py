"""Nobody waits for the longest response: `--oversample`.

A step trains on B responses. To wait for B that were started together means to wait for the longest, while an engine
that could write hundreds writes a few. So keep more than B in flight, stop when B have finished, train on these, and carry
the others on: in the next step they are continued as longer prompts, by a newer policy. Four things keep this honest.

1. The ratio. Tokens of one response may come from several policies. Each keeps the log-probability that it was sampled
   with, and the clipped loss compares with that.
2. Length. The first to finish are the short ones. But nothing that was started is dropped: it is trained on once, some
   steps later, and towards the end of a run nothing is started that could not be. Over a run, the responses trained
   on are exactly those that were generated.
3. The baseline. A reward is compared with what was expected when its response was started. While the policy improves, so
   does what is expected; with today's expectation, all that took long would seem worse than it was, and be unlearned.
4. Age. What was started `--max-staleness` steps ago is waited for. (To drop it would bring the bias back.) The engine
   has enough to do meanwhile: what else finishes is there for the next step.

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
    step: int  # in which it was started
    expected: float | None  # of its reward, by the baseline, at that time
    response: Response  # as far as it got
    reward: float | None = None  # once it has finished


class InFlight:
    """Responses that were started and not yet trained on, oldest first. The same on every rank."""

    def __init__(self, run):
        self.run, self.started = run, []

    def take(self, baseline, step):
        """The first responses to finish, as many as a step (from 1) trains on: a list of Started; and metrics."""
        run, c, count = self.run, self.run.config, self.run.config.prompts_per_step
        before = (step - 1) * count  # were trained on
        room = min(math.ceil(count * (1 + c.oversample)), c.steps * count - before) - len(self.started)
        if room > 0:
            problems = baseline.next_problems(before + len(self.started), room)
            with run.clock("critic"):
                expected = baseline.expect(problems)
            self.started += [Started(problem, render(problem.messages, run.tokenizer), step, value, Response([], [], False))
                             for problem, value in zip(problems, expected, strict=True)]
        open_ = [s for s in self.started if s.reward is None]
        overdue = {i for i, s in enumerate(open_) if step - s.step >= c.max_staleness}
        needed = count - (len(self.started) - len(open_))

        def until(mine, engine, engines):
            """Whether an engine that has the responses `mine` (numbers in `open_`) may stop; asked after each that finishes."""
            quota = needed // engines + (engine < needed % engines)
            missing = overdue & set(mine)
            finished = 0

            def enough(i=None):
                nonlocal finished
                finished += i is not None
                missing.discard(i)
                return finished >= quota and not missing
            return enough

        done = run.generate([s.prompt for s in open_], [s.problem.answer for s in open_], [c.temperature] * len(open_),
                            begun=[s.response for s in open_], until=until)
        for i, (response, reward) in done.items():
            open_[i].response, open_[i].reward = response, reward
        taken = [s for s in self.started if s.reward is not None][:count]
        gone = set(map(id, taken))
        self.started = [s for s in self.started if id(s) not in gone]
        metrics = {"rollout/age": sum(step - s.step for s in taken) / count, "rollout/overdue": len(overdue),
                   "rollout/in_flight": len(self.started)}
        return taken, metrics

    def state_dict(self):
        """Flat tensors: token ids and log-probabilities of all, and a row of numbers for each."""
        rows = [(s.problem.id, s.step, math.nan if s.expected is None else s.expected, len(s.response.ids),
                 s.response.finished, math.nan if s.reward is None else s.reward) for s in self.started]
        return {"rows": torch.tensor(rows, dtype=torch.float64).view(-1, 6),
                "ids": torch.tensor([token for s in self.started for token in s.response.ids], dtype=torch.int32),
                "logprobs": torch.tensor([lp for s in self.started for lp in s.response.logprobs], dtype=torch.float64)}

    def load_state_dict(self, state):
        problems = {p.id: p for p in self.run.problems}
        if missing := [int(row[0]) for row in state["rows"] if int(row[0]) not in problems]:
            raise InputError(f"the checkpoint has a response in flight to problem {missing[0]}, which the dataset lacks; "
                             "continue with the dataset that the run began with")
        limit = self.run.config.max_response_tokens
        longest = max((int(row[3]) for row in state["rows"] if row[5].isnan()), default=0)  # of those that have not ended
        if longest >= limit:
            raise InputError(f"--max-response-tokens {limit}: the checkpoint has a response in flight that has {longest} "
                             "tokens already; continue with the limit that the run began with")
        lengths = [int(row[3]) for row in state["rows"]]
        self.started = [
            Started(problems[int(problem)], render(problems[int(problem)].messages, self.run.tokenizer), int(step),
                    None if math.isnan(expected) else expected,
                    Response(ids.tolist(), logprobs.tolist(), bool(finished)), None if math.isnan(reward) else reward)
            for (problem, step, expected, _, finished, reward), ids, logprobs in zip(
                state["rows"].tolist(), state["ids"].split(lengths), state["logprobs"].split(lengths), strict=True)]
