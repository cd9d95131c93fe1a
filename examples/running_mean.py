"""A new algorithm is one small file: SPPO with one number for all prompts in the critic's place.

    python examples/running_mean.py

The number is an exponential mean of the rewards: after each step it moves a quarter of the way to that step's
mean reward. This is what SPPO must beat, whose V(s) differs between prompts.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # sppo.py is in the folder above
from cli import clear_errors  # noqa: E402
from sppo import Baseline, TrainConfig, train  # noqa: E402


class RunningMean(Baseline):
    mean = None  # of the rewards so far

    def advantages(self, batch):
        if self.mean is None:
            self.mean = batch.rewards.mean().item()  # SPPO's critic starts from the same number
        return batch.rewards - self.mean  # [B]

    def update(self, batch):
        self.mean += (batch.rewards.mean().item() - self.mean) / 4
        return {"baseline/mean": self.mean}  # for metrics.jsonl

    def state_dict(self):  # for checkpoints
        return {"mean": self.mean}

    def load_state_dict(self, state):
        self.mean = state["mean"]


if __name__ == "__main__":
    with clear_errors():  # bad input ends in one sentence; an --output that is typed comes last, and wins
        train(TrainConfig.parse(__doc__, ["--output", "runs/mean", *sys.argv[1:]]), RunningMean)
