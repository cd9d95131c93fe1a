"""GRPO, RLOO and ReMax: baselines made of more samples, where SPPO's is made by a critic.

    python grpo.py                        GRPO  (arXiv 2402.03300): 8 samples a prompt, (R - mean) / std
    python grpo.py --no-normalize         the same without the std (arXiv 2503.20783)
    python grpo.py --baseline rloo        RLOO  (arXiv 2402.14740): minus the mean of the other samples
    python grpo.py --baseline remax       ReMax (arXiv 2310.10505): minus the reward of the greedy response

The loop is sppo.py's. What differs: the baseline is not learned, and there is no second model. Each prompt
costs more samples instead. Where all samples of a prompt are right, or all wrong, every advantage is zero and
the group has no gradient: `group/all_equal` is the share of such prompts, too easy or too hard.
"""
from dataclasses import dataclass
from typing import Literal

from cli import InputError, clear_errors, option
from sppo import Baseline, TrainConfig, train

# ---- the mathematics ---------------------------------------------------------------------------------------

def all_equal(groups):
    """Whether all rewards of a group are equal: groups [B, N] -> [B, 1]. Asked of the rewards themselves,
    because their mean is rounded: that of eight times 0.7 is not 0.7."""
    return (groups == groups[:, :1]).all(1, keepdim=True)


def group_advantages(rewards, group_size, normalize=True):
    """(R - mean) / (std + 1e-6) of each group, std with N - 1 (arXiv 2402.03300, eq. 3).
    rewards [B*N] -> [B*N].

    The N = group_size samples of a prompt are adjacent. Without `normalize`, R - mean.
    """
    groups = rewards.view(-1, group_size)  # [B, N]
    advantages = groups - groups.mean(1, keepdim=True)
    if normalize:
        advantages = advantages / (groups.std(1, keepdim=True) + 1e-6)
    # Equal rewards say nothing, and their rounding, divided by a std near 0, must not either.
    return advantages.masked_fill(all_equal(groups), 0).flatten()


def rloo_advantages(rewards, group_size):
    """R minus the mean of the group's N - 1 other rewards (arXiv 2402.14740). rewards [B*N] -> [B*N]."""
    groups = rewards.view(-1, group_size)  # [B, N]
    others = (groups.sum(1, keepdim=True) - groups) / (group_size - 1)
    return (groups - others).masked_fill(all_equal(groups), 0).flatten()


def remax_advantages(rewards, greedy_rewards):
    """R minus the reward of the same prompt's greedy response (arXiv 2310.10505). Both [B] -> [B]."""
    return rewards - greedy_rewards


# ---- the baselines -----------------------------------------------------------------------------------------

class GRPO(Baseline):
    """The other samples of a prompt are its baseline."""

    def __init__(self, run):
        super().__init__(run)
        self.samples_per_prompt = run.config.group_size

    def advantages(self, batch):
        return group_advantages(batch.rewards, self.samples_per_prompt, self.run.config.normalize)

    def update(self, batch):
        # Nothing is learned, but a user wants to know how many prompts gave no gradient.
        groups = batch.rewards.view(-1, self.samples_per_prompt)
        equal, right, wrong = (which.float().mean().item() for which in (
            all_equal(groups), (groups == 1).all(1), (groups == 0).all(1)))
        return {"group/all_equal": equal, "group/all_right": right, "group/all_wrong": wrong}

    def state_dict(self):
        return {}  # `update` learns nothing


class RLOO(GRPO):
    """R minus the mean of the group's other responses: GRPO's R - mean, times N / (N - 1)."""

    def advantages(self, batch):
        return rloo_advantages(batch.rewards, self.samples_per_prompt)


class ReMax(Baseline):
    """The greedy response is the baseline. It is sampled together with the other one, and not trained on."""

    wants_greedy = True

    def advantages(self, batch):
        return remax_advantages(batch.rewards, batch.greedy_rewards)

    def update(self, batch):
        return {"group/all_equal": (batch.rewards == batch.greedy_rewards).float().mean().item(),
                "greedy_reward": batch.greedy_rewards.mean().item()}

    def state_dict(self):
        return {}  # as in GRPO


# ---- the options -------------------------------------------------------------------------------------------

@dataclass
class GRPOConfig(TrainConfig):
    output: str | None = option(None, "folder for metrics.jsonl and the trained model [runs/BASELINE]")
    baseline: Literal["grpo", "rloo", "remax"] = option("grpo", "what is subtracted", group="algorithm")
    group_size: int = option(8, "responses per prompt (grpo, rloo)")
    normalize: bool = option(True, "divide by the standard deviation of the group (grpo)")

    # Fewer prompts than sppo.py, since each has a group of responses: the demo still takes only minutes.
    BUILTIN = TrainConfig.BUILTIN | {"steps": 20, "prompts_per_step": 64, "minibatch": 32}

    def __post_init__(self):
        super().__post_init__()
        self.output = self.output or f"runs/{self.baseline}"

    def check(self):
        self.without_critic(self.baseline)
        super().check()
        if self.baseline != "remax" and self.group_size < 2:
            raise InputError(f"--group-size {self.group_size}: the samples are compared; give 2 or more")
        if self.oversample:
            raise InputError(f"--oversample {self.oversample}: {self.baseline} compares the responses to a "
                             "prompt, so it must wait for all of them; leave it out")
        if self.baseline == "remax":
            self.tell_unused(("group_size",), "remax has one response per prompt")
        if self.baseline != "grpo":
            self.tell_unused(("normalize",), "only grpo divides")


if __name__ == "__main__":
    with clear_errors():
        config = GRPOConfig.parse(__doc__)
        train(config, {"grpo": GRPO, "rloo": RLOO, "remax": ReMax}[config.baseline])
