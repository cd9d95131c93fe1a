"""What would a perfect critic buy? SPPO, but the baseline is each prompt's true chance of success, measured.

    python examples/oracle.py --steps 10

Before each step it samples 32 more responses to each prompt from the current policy, and subtracts the share
of them that is right. That costs far too much for a real run. It shows the least variance of R - b that a
baseline b of the prompt alone can have. SPPO's critic learns beside it from the same rewards, so that its
error can be measured.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # sppo.py is in the folder above
from cli import InputError, clear_errors  # noqa: E402
from sppo import SPPO, TrainConfig, train  # noqa: E402

FRESH = 32  # responses per prompt that measure its chance of success


class Oracle(SPPO):
    def __init__(self, run):
        if run.config.oversample:
            raise InputError("--oversample: the oracle samples before each whole step; leave it out")
        super().__init__(run)

    def next_problems(self, first, count):
        """The problems are SPPO's. But this is called before each step's sampling, when the engine is awake
        and has the current weights, so here is the time to sample more."""
        problems = super().next_problems(first, count)
        self.chance = self.run.sampler.sample(problems, FRESH).rewards.view(-1, FRESH).mean(1)  # [B]
        return problems

    def advantages(self, batch):
        super().advantages(batch)  # the critic's V, which is only compared
        return batch.rewards - self.chance  # [B]

    def update(self, batch):
        """The variance of R - b is E[p (1 - p)] + E[(p - b)^2], for the prompts' chances p. Returns what this
        predicts: its first part, and its second for b = a constant and for b = V. And what was measured:
        the mean of (R - b)^2 over this batch, for three baselines."""
        p, rewards, v = self.chance, batch.rewards, self.values
        # p is itself a mean of 32 rewards. So p (1 - p) is too small by 31 / 32 on average, and every square
        # of p's distance from something is too large by the variance of that mean.
        noise = (p * (1 - p)).mean().item() * FRESH / (FRESH - 1)
        return {"oracle/noise": noise,
                "oracle/spread": p.var().item() - noise / FRESH,
                "oracle/critic_error": (p - v).square().mean().item() - noise / FRESH,
                "oracle/variance_constant": (rewards - p.mean()).square().mean().item(),
                "oracle/variance_critic": (rewards - v).square().mean().item(),
                "oracle/variance_oracle": (rewards - p).square().mean().item(),
                **super().update(batch)}


if __name__ == "__main__":
    with clear_errors():
        train(TrainConfig.parse(__doc__, ["--output", "runs/oracle", *sys.argv[1:]]), Oracle)
