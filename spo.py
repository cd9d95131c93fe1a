"""SPO: Single-stream Policy Optimization (arXiv 2509.13232): no group, no critic, a memory of each prompt.

    python spo.py

The loop is sppo.py's. What differs: the expected reward of a prompt is not predicted but remembered. Two
numbers per prompt count successes and failures, and old ones count less as the policy changes. That needs no
second model. But the numbers are of use only when a prompt comes again, and say nothing about other prompts.
Prompts whose outcome is uncertain come more often, and advantages are whitened over the whole batch.
"""
import random
from dataclasses import dataclass

import numpy as np
import torch

from cli import InputError, clear_errors, option, say
from critic import value_metrics
from data import check_rows, marks_of
from sppo import Baseline, TrainConfig, train

# ---- the mathematics ---------------------------------------------------------------------------------------

class ValueTracker:
    """v = alpha / (alpha + beta) for each of `num_prompts` prompts (arXiv 2509.13232, section 3.1).

    After a reward r in [0, 1]: alpha <- rho alpha + r, beta <- rho beta + 1 - r. Here rho =
    2^(-D / half_life), clamped to [rho_min, rho_max]. D measures how far the policy has moved: the mean
    |difference of log-probability| per token of the prompt's last response, between the policy that wrote it
    and the policy now. v remembers about 1 / (1 - rho) samples.
    """

    def __init__(self, num_prompts, half_life=0.06, rho_min=0.875, rho_max=0.96):
        self.alpha, self.beta = np.full(num_prompts, 0.5), np.full(num_prompts, 0.5)
        self.half_life, self.rho_min, self.rho_max = half_life, rho_min, rho_max

    def start(self, ids, rewards):
        """From first samples: rewards [len(ids), n]. Sets v to the success rate, with half a success and half
        a failure added, and gives it the weight of 1 / (1 - rho_min) samples."""
        weight, n = 1 / (1 - self.rho_min), rewards.shape[1]
        successes = rewards.sum(1)
        self.alpha[ids] = weight * (successes + 0.5) / (n + 1)
        self.beta[ids] = weight * (n - successes + 0.5) / (n + 1)

    def values(self, ids):
        """v [len(ids)], float64."""
        return self.alpha[ids] / (self.alpha[ids] + self.beta[ids])

    def update(self, ids, rewards, distance):
        """ids, rewards, distance (D) [n], in the order sampled; a prompt may occur more than once."""
        for i, r, rho in zip(ids, rewards, self.rho(distance), strict=True):
            self.alpha[i] = rho * self.alpha[i] + r
            self.beta[i] = rho * self.beta[i] + 1 - r

    def rho(self, distance):
        """How much of the past is kept, for a policy that has moved by this distance (D)."""
        rho = 2.0 ** (-np.asarray(distance, dtype=np.float64) / self.half_life)
        return np.clip(rho, self.rho_min, self.rho_max)

    def sampling_weights(self):
        """sqrt(v (1 - v)) + 0.05 of all prompts [num_prompts], not normalised: uncertain prompts come more
        often, and every prompt comes at times."""
        v = self.values(slice(None))
        return np.sqrt(v * (1 - v)) + 0.05

    def state_dict(self):
        return {"alpha": torch.tensor(self.alpha), "beta": torch.tensor(self.beta)}

    def load_state_dict(self, state):
        if len(state["alpha"]) != len(self.alpha):
            raise InputError(f"the checkpoint tracks {len(state['alpha'])} problems and the dataset has "
                             f"{len(self.alpha)}; continue with the dataset that the run started with")
        self.alpha, self.beta = state["alpha"].numpy().copy(), state["beta"].numpy().copy()


def normalize(advantages):
    """[B] minus its mean, divided by its standard deviation. In float64, or equal advantages would become
    rounding divided by rounding.

    Each response counts once, as in the paper. But the loss averages over tokens, so where long responses
    have other advantages than short ones, the mean over tokens is not 0 (SPO++, arXiv 2608.24870)."""
    advantages = advantages.double()
    spread = advantages.std(correction=min(1, len(advantages) - 1))  # of one: 0
    return (advantages - advantages.mean()) / (spread + 1e-8)


# ---- the baseline ------------------------------------------------------------------------------------------

class SPO(Baseline):
    """One sample per prompt, against what is remembered of that prompt. Prompts are known by their
    row in the dataset."""

    def __init__(self, run):
        super().__init__(run)
        self.ids = np.array([p.id for p in run.problems])
        self.tracker = ValueTracker(1 + max(p.id for p in run.problems + run.held_out))
        self.last = {}  # id -> (token ids, log-probabilities) of its last response, six bytes a token

    def next_problems(self, first, count):
        c = self.run.config
        if first == 0 and c.init_samples:
            self.start()
        weights = self.tracker.sampling_weights()[self.ids]
        # From the seed and how many were drawn before: the same on every rank, and after a restart.
        rng = np.random.default_rng(random.Random(f"{c.seed}/{first}").getrandbits(64))
        chosen = rng.choice(len(weights), count, replace=count > len(weights), p=weights / weights.sum())
        return [self.run.problems[i] for i in chosen]

    def start(self):
        """The tracker's first values, from samples of the policy before training. Counts for step 1."""
        run, n, size = self.run, self.run.config.init_samples, self.run.config.prompts_per_step
        say(f"Before step 1: {n} responses to each of {len(run.problems):,} problems, to start the tracker.")
        for i in range(0, len(run.problems), size):
            problems = run.problems[i : i + size]
            batch = run.sampler.sample(problems, n)
            self.tracker.start([p.id for p in problems], batch.rewards.view(-1, n).double().numpy())

    def moved(self, batch):
        """D [B]: how far the policy is from the one that last answered each prompt, on that
        answer; 0 for the first."""
        distance = np.zeros(len(batch.problems))
        known = [i for i, p in enumerate(batch.problems) if p.id in self.last]
        if known:
            then = [self.last[batch.problems[i].id] for i in known]
            now = self.run.policy.logprobs([(batch.prompts[i], ids.tolist())
                                            for i, (ids, _) in zip(known, then, strict=True)])
            distance[known] = [np.abs(new[: len(ids)].numpy() - old.numpy()).mean()
                               for new, (ids, old) in zip(now, then, strict=True)]
        return distance

    def expect(self, problems):
        return self.tracker.values([p.id for p in problems]).tolist()

    def advantages(self, batch):
        logprobs = batch.old_logprobs
        if logprobs is None or self.run.config.old_logprobs == "rollout":
            # The trainer's, not the engine's: their difference is not the policy's movement.
            logprobs = self.run.policy.logprobs(batch.sequences)
        self.distance = self.moved(batch)
        for problem, (_, ids), row in zip(batch.problems, batch.sequences, logprobs, strict=True):
            self.last[problem.id] = torch.tensor(ids, dtype=torch.int32), row[: len(ids)].half()
        self.values = batch.expected  # v from before the update: it must not have seen these rewards
        if self.values is None:
            self.values = torch.tensor(self.expect(batch.problems), dtype=torch.float32)
        return normalize(batch.rewards - self.values)

    def update(self, batch):
        self.tracker.update([p.id for p in batch.problems], batch.rewards.tolist(), self.distance)
        return {**value_metrics(self.values, batch.rewards),
                # Responses that were sampled before step 1, of which `reward` and lengths know nothing.
                "tracker/init_samples": self.run.config.init_samples * len(self.run.problems),
                "tracker/distance": self.distance.mean(),
                "tracker/rho": self.tracker.rho(self.distance).mean()}

    def state_dict(self):
        """The tracker, and the last responses as flat tensors: whose, how long, token ids,
        log-probabilities."""
        # Something empty stands first, since there may be no responses yet.
        ids, logprobs = zip((torch.empty(0).int(), torch.empty(0).half()), *self.last.values(), strict=True)
        rows, marks = map(str, self.ids.tolist()), marks_of(self.run.problems, self.run.config)
        return {**self.tracker.state_dict(), "marks": dict(zip(rows, marks, strict=True)),
                "problems": torch.tensor(list(self.last), dtype=torch.int64),
                "lengths": torch.tensor([len(part) for part in ids[1:]], dtype=torch.int64),
                "ids": torch.cat(ids), "logprobs": torch.cat(logprobs)}

    def load_state_dict(self, state):
        check_rows(state.get("marks", {}), self.run.problems, self.run.config)  # older checkpoints have none
        self.tracker.load_state_dict(state)
        lengths = state["lengths"].tolist()
        responses = zip(state["ids"].split(lengths), state["logprobs"].split(lengths), strict=True)
        self.last = dict(zip(state["problems"].tolist(), responses, strict=True))


# ---- the options -------------------------------------------------------------------------------------------

@dataclass
class SPOConfig(TrainConfig):
    output: str = option("runs/spo", "folder for metrics.jsonl, checkpoints and the trained model")
    prompts_per_step: int = option(1024, "prompts sampled in a step", positive=True)
    clip_high: float = option(0.28, "the ratio is clipped above 1 + this")
    dual_clip: float = option(10.0, "where A < 0, the objective is at least this times A (0: no such bound)")
    temperature: float = option(1.0, "of sampling, and of the ratio", group="sampling", positive=True)
    init_samples: int = option(8, "responses per problem before step 1; 0: start from 1/2", group="algorithm")

    # A prompt must come back: with 1,024 training problems each is drawn nine times on average.
    BUILTIN = TrainConfig.BUILTIN | {"dataset": "chain:1280"}

    def check(self):
        self.without_critic("spo")
        super().check()


if __name__ == "__main__":
    with clear_errors():
        train(SPOConfig.parse(__doc__), SPO)
