"""Rollouts: problems in, a verified Batch out.

`Sampler.sample` renders problems as prompts, has the engines of all ranks write responses, verifies each one
as soon as it ends, and returns the same Batch on every rank. Training loop, evaluation and baselines use it.
"""
import random
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from cli import InputError, say
from data import BOXED_SUFFIX, Problem, render
from engines import Response
from reward import Verifier, decode


@dataclass
class Batch:
    """B verified responses; the samples of one prompt are adjacent. The same on every rank."""
    problems: list[Problem]  # [B], a problem repeated for each of its samples
    prompts: list[list[int]]  # [B] token ids
    responses: list[Response]  # [B]
    rewards: torch.Tensor  # [B], in [0, 1]
    greedy_rewards: torch.Tensor | None = None  # [number of problems], for a baseline that wants them (ReMax)
    expected: torch.Tensor | None = None  # [B], what `Baseline.expect` gave when these started (--oversample)
    old_logprobs: torch.Tensor | None = None  # [B, T], of the policy that sampled; None if a step needs none
    # From the above; T is the longest response.
    lengths: torch.Tensor = field(init=False)  # [B], tokens of each response
    mask: torch.Tensor = field(init=False)  # [B, T], True on a response's tokens and False beyond its end
    rollout_logprobs: torch.Tensor = field(init=False)  # [B, T], as the engine computed them
    sequences: list[tuple[list[int], list[int]]] = field(init=False)  # [B], (prompt ids, response ids)

    def __post_init__(self):
        self.lengths = torch.tensor([len(r.ids) for r in self.responses])
        self.mask = torch.arange(int(self.lengths.max())) < self.lengths[:, None]
        self.rollout_logprobs = torch.zeros(self.mask.shape)
        self.rollout_logprobs[self.mask] = torch.tensor([lp for r in self.responses for lp in r.logprobs])
        self.sequences = [(p, r.ids) for p, r in zip(self.prompts, self.responses, strict=True)]

    @property
    def truncated(self):
        """The share of responses that ran out of tokens."""
        return sum(not r.finished for r in self.responses) / len(self.responses)

    def metrics(self, advantages):
        """What the responses and their advantages ([B], or [B, T]) were like. The variance is around 0,
        since a baseline that is off on average adds noise too."""
        squares = (advantages if advantages.dim() == 1 else advantages[self.mask]).square()
        return {"reward": self.rewards.mean().item(), "response_tokens": self.lengths.float().mean().item(),
                "truncated": self.truncated, "advantage/variance": squares.mean().item()}


def make_verifier(c):
    """The Verifier that a script's options ask for. Raises InputError if their --reward cannot be used."""
    verifier = Verifier(timeout=c.reward_timeout, mode=c.answer, reward=c.reward)
    try:
        if c.reward:
            verifier.check()
        if c.reward and c.suffix == BOXED_SUFFIX:
            say("Each prompt asks for an answer in \\boxed{}. If your --reward expects another form, give a "
                "--suffix that asks for it, or --suffix '' for none.")
    except ValueError as error:
        raise InputError(str(error)) from None
    return verifier


def sample_and_verify(engine, verifier, tokenizer, prompts, answers, **sampling):
    """Yields (number of the prompt, Response, text, future of its reward) as responses end: the first are
    verified while others are still being written. A response that was cut off or paused has no answer,
    whatever its text says. sampling: as an engine's `generate`."""
    for i, response in engine.generate(prompts, **sampling):
        text = decode(response.ids, tokenizer, prompts[i])
        yield i, response, text, verifier.submit(text if response.finished else "", answers[i])


class Sampler:
    """Samples from the current policy with the engines of all ranks, and verifies."""

    def __init__(self, config, tokenizer, engine, verifier, clock):
        self.config, self.tokenizer, self.clock = config, tokenizer, clock
        self.engine, self.verifier = engine, verifier
        self.random = random.Random()  # the same on every rank; seeded anew for each step: no state to save
        self.metrics = {}  # of the last call: how busy the engines were, and what the verifier gave up on

    def failures(self):
        """How many verifications have failed on this rank so far, by metric."""
        return {f"reward/{name}": getattr(self.verifier, name) for name in ("timeouts", "crashes", "errors")}

    def prompt(self, problem):
        """The token ids that the policy reads before it writes."""
        return render(problem.messages, self.tokenizer)

    def sample(self, problems, samples=1, greedy=False, temperature=None, top_p=1.0):
        """A Batch of `samples` responses per problem, at the training temperature unless another is given.

        greedy: also sample each problem's greedy response, in the same pass; `greedy_rewards` has its reward.
        """
        temperature = self.config.temperature if temperature is None else temperature
        each = samples + greedy  # responses per problem; the last of them is the greedy one
        problems = [p for p in problems for _ in range(each)]
        prompts = [self.prompt(p) for p in problems]
        temperatures = [temperature if j % each < samples else 0.0 for j in range(len(problems))]
        done = self.generate(prompts, [p.answer for p in problems], temperatures, top_p, adjacent=each)
        kept = [j for j in range(len(problems)) if j % each < samples]
        rewards = torch.tensor([done[j][1] for j in range(len(problems))])
        return Batch([problems[j] for j in kept], [prompts[j] for j in kept], [done[j][0] for j in kept],
                     rewards[kept], rewards[samples::each] if greedy else None)

    def generate(self, prompts, answers, temperatures, top_p=1.0, adjacent=1, partial=None, pause_after=None,
                 wait_for=()):
        """{number of the prompt: (Response, reward)}, the same on every rank. The engines share the prompts.

        adjacent: this many consecutive prompts go to the same engine, which reads a common prompt once.
        partial, pause_after, wait_for: as in an engine's `generate`, over all engines together. A paused
        response has the reward None.
        """
        c, world = self.config, dist.get_world_size()
        first_seed = self.random.getrandbits(40)
        number = dist.get_rank() // c.tensor_parallel  # of this rank's engine, of all `engines`
        engines = world // c.tensor_parallel
        local = [j for j in range(len(prompts)) if j // adjacent % engines == number]  # this engine's prompts
        # A seed for each response costs some speed, but ranks that share an engine must sample the same.
        seeds = [first_seed + j for j in local] if c.deterministic or c.tensor_parallel > 1 else None
        if pause_after is not None:  # this engine's share of those that must end; without any, it rests
            pause_after = pause_after // engines + (number < pause_after % engines)
            wait_for = [n for n, j in enumerate(local) if j in wait_for]
            if not pause_after and not wait_for:
                local = []
        done, before = {}, self.failures()
        with self.clock("rollout", len(local)):
            for n, response, _, reward in sample_and_verify(
                    self.engine, self.verifier, self.tokenizer, [prompts[j] for j in local],
                    [answers[j] for j in local], temperature=[temperatures[j] for j in local], top_p=top_p,
                    max_tokens=c.max_response_tokens, partial=partial and [partial[j] for j in local],
                    seeds=seeds, pause_after=pause_after, wait_for=wait_for):
                done[local[n]] = response, reward
        with self.clock("reward"):  # the wait for the last verdicts, and for slower ranks
            done = {j: (response, None if response.paused else reward.result())
                    for j, (response, reward) in done.items()}
            parts = [None] * world
            counts = {name: count - before[name] for name, count in self.failures().items()}
            dist.all_gather_object(parts, (done, counts))
        parts, counts = zip(*parts[:: c.tensor_parallel], strict=True)  # one rank of each engine
        done = {j: result for part in parts for j, result in part.items()}
        # rollout/idle: of the time until the longest response ended, how much the others had ended before, on
        # average. If the engines start all responses at once, this share of their places stood empty.
        written = [len(r.ids) - (len(partial[j].ids) if partial else 0) for j, (r, _) in done.items()]
        longest = max(written, default=0)
        self.metrics = {"rollout/generated_tokens": sum(written), "rollout/longest": longest,
                        "rollout/idle": 1 - sum(written) / max(1, len(prompts) * longest),
                        **{name: sum(count[name] for count in counts) for name in counts[0]}}
        return done
