"""What would a perfect critic buy? SPPO, but the baseline is each prompt's true chance of success, measured.

    python examples/oracle.py --steps 10

Before each step it samples 32 more responses to each prompt from the current policy, and subtracts the share
of them that is right. That is far too dear for a real run: it is the bound for all baselines that know the
prompt only. SPPO's critic learns beside it from the same rewards, so that its error can be measured.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # sppo.py is in the folder above
from cli import clear_errors  # noqa: E402
from sppo import SPPO, TrainConfig, train  # noqa: E402

FRESH = 32  # responses per prompt that measure its chance of success


class Oracle(SPPO):
    def next_problems(self, first, count):
        problems = super().next_problems(first, count)
        # Here the engine is awake and has the current weights.
        self.chance = self.run.sampler.sample(problems, FRESH).rewards.view(-1, FRESH).mean(1)  # [B]
        return problems

    def advantages(self, batch):
        super().advantages(batch)  # the critic's V, which is only compared
        return batch.rewards - self.chance  # [B]

    def update(self, batch):
        """The variance of R - b is E[p (1 - p)] + E[(p - b)^2], for the prompts' chances p. Returns the first
        part, the second for two baselines b, and what was measured on this batch for each."""
        p, rewards, v = self.chance, batch.rewards, self.values
        noise = (p * (1 - p)).mean().item() * FRESH / (FRESH - 1)
        unsure = noise / FRESH  # what 32 responses leave open about p adds to each square
        return {"oracle/noise": noise,
                "oracle/spread": p.var().item() - unsure,  # b is the mean of p: a constant
                "oracle/critic_error": (p - v).square().mean().item() - unsure,  # b is V
                "oracle/variance_constant": (rewards - p.mean()).square().mean().item(),
                "oracle/variance_critic": (rewards - v).square().mean().item(),
                "oracle/variance": (rewards - p).square().mean().item(),
                **super().update(batch)}


if __name__ == "__main__":
    with clear_errors():
        train(TrainConfig.parse(__doc__, ["--output", "runs/oracle", *sys.argv[1:]]), Oracle)
