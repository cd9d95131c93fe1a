"""PPO for language models, with a value for every token: what SPPO does away with.

    python ppo.py                          clipped squared error, as in PPO (arXiv 1707.06347)
    python ppo.py --value-loss bce         the papers' ablation: the same critic trained with cross-entropy

The loop is sppo.py's. What differs: a response is not one action but T of them. So the critic predicts
at every token how likely the response is to be right, GAE (arXiv 1506.02438) turns these values into
an advantage per token, and the advantages are whitened. The critic reads prompt and response. So it
must share the policy's tokenizer, and it costs as much to train as a policy of its size. SPPO's critic
reads the prompt alone.

The "tail effect" (arXiv 2604.08865): near a response's end the critic can see whether it is right.
There V(s_t) approaches R, which leaves no advantage for the tokens of the answer. Near the start it
cannot see it. `critic/auc_tenth_1` to `_10` show how well V(s_t) tells right responses from wrong ones,
by tenths of their length.
"""
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from cli import InputError, clear_errors, option
from critic import ValueModel, auc, value_metrics
from machine import check_model, load_tokenizer
from sharded import ShardedModel, mean_of, pad, rows_like, unflatten
from sppo import Baseline, TrainConfig, train

# ---- the mathematics ---------------------------------------------------------------------------------------

def gae(rewards, values, mask, gamma=1.0, lam=1.0):
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16), and the returns that values are fitted to.

    rewards, values, mask [B, T] -> advantages, returns [B, T], both 0 where mask is; not whitened.
        delta_t = r_t + gamma V(s_t+1) - V(s_t)       A_t = delta_t + gamma lam A_t+1       returns = A + V
    A masked position is skipped: what follows a token is the next unmasked one. V is 0 after the last.
    """
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])  # [B]
    for t in reversed(range(values.shape[1])):
        inside = mask[:, t].bool()
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(inside, delta + gamma * lam * next_advantage, next_advantage)
        next_value = torch.where(inside, values[:, t], next_value)
        advantages[:, t] = next_advantage
    return advantages * mask, (advantages + values) * mask


def whiten(x, mask):
    """x [B, T] minus its mean over the mask, divided by its standard deviation there; 0 outside. In float64,
    or equal numbers would become rounding divided by rounding."""
    x = x.double()
    inside = x[mask.bool()]
    spread = inside.std(correction=min(1, len(inside) - 1))  # of a single token: 0, and so its advantage
    return (x - inside.mean()) / (spread + 1e-8) * mask


def value_loss(outputs, old_values, returns, mask, num_tokens, kind, clip):
    """Sum over the mask / num_tokens of each token's loss; all [B, T]. `outputs` are the head's: V for "mse",
    its logit for "bce". The squared error is the larger of V's and of V's clipped to old_values +- clip
    (arXiv 1707.06347 does the same with the ratio)."""
    if kind == "bce":  # returns are mixtures of R and V, both in [0, 1]; the clamp is for rounding
        losses = F.binary_cross_entropy_with_logits(outputs, returns.clamp(0, 1), reduction="none")
    else:
        clipped = old_values + (outputs - old_values).clamp(-clip, clip)
        losses = torch.maximum((outputs - returns) ** 2, (clipped - returns) ** 2) / 2
    return (losses * mask).sum() / num_tokens


# ---- the critic and the baseline ---------------------------------------------------------------------------

class TokenCritic(ShardedModel):
    """V(s_t) for every state of a response: the prompt, and the prompt with the first t tokens."""

    def __init__(self, model, device, *, kind, clip, minibatch, trust_remote_code=False, **options):
        self.kind, self.clip, self.minibatch = kind, clip, minibatch
        super().__init__(ValueModel(model, trust_remote_code), device, **options)

    def forward(self, sequences):
        """The head's outputs [b, T] at the states of (prompt ids, response ids) pairs, with gradient; 0
        past the end of a response."""
        ids, scored, mask = pad(sequences, self.device)
        # The policy's last ids may stand for no token, and a smaller critic may have fewer of these.
        ids.clamp_(max=self.module.backbone.config.get_text_config().vocab_size - 1)
        return unflatten(self.module(ids, scored), mask)

    def values(self, sequences):
        """V(s_t) [B, T] without gradient, on the CPU, the same on every rank."""
        width = max(len(response) for _, response in sequences)
        outputs = self.infer(self.forward, sequences, [len(p) + len(r) for p, r in sequences],
                             (len(sequences), width))
        return outputs.sigmoid() if self.kind == "bce" else outputs

    def update(self, batch, old_values, returns):
        """One epoch over the batch in mini-batches. old_values, returns [B, T]. Returns metrics."""
        steps, lengths = [], [len(p) + len(r) for p, r in batch.sequences]
        with self.on_device():
            for start in range(0, len(lengths), self.minibatch):
                chunk = range(len(lengths))[start : start + self.minibatch]
                num_tokens = batch.mask[chunk.start : chunk.stop].sum()  # of the mini-batch, over all ranks
                for rows in self.micro_batches([lengths[i] for i in chunk]):
                    rows = [chunk[row] for row in rows]
                    outputs = self.forward([batch.sequences[i] for i in rows])  # [b, t]
                    parts = [rows_like(outputs, rows, x) for x in (old_values, returns, batch.mask)]
                    self.backward(value_loss(outputs, *parts, num_tokens, self.kind, self.clip), {})
                steps.append(self.step())
        return mean_of(steps, "critic/")


class PPO(Baseline):
    """One sample per prompt, against a value per token."""

    def __init__(self, run):
        super().__init__(run)
        c = run.config
        model = c.critic_model or c.model
        self.critic = TokenCritic(model, run.device, kind=c.value_loss, clip=c.value_clip,
                                  **c.critic_options())
        self.critic.check_rows(model, c.max_prompt_tokens + c.max_response_tokens)

    def advantages(self, batch):
        c = self.run.config
        self.values = self.critic.values(batch.sequences)
        rewards = torch.zeros_like(self.values)
        rewards[torch.arange(len(rewards)), batch.lengths - 1] = batch.rewards  # earned with the last token
        advantages, self.returns = gae(rewards, self.values, batch.mask, lam=c.lam)
        return whiten(advantages, batch.mask)  # over the whole batch, as the papers' code does, then cut

    def update(self, batch):
        # V(s_0) has read the prompt alone, like SPPO's. With squared errors it may lie outside of (0, 1).
        return {**value_metrics(self.values[:, 0].clamp(0.01, 0.99), batch.rewards),
                **tail_effect(self.values, batch.lengths, batch.rewards),
                **self.critic.update(batch, self.values, self.returns)}


def tail_effect(values, lengths, rewards):
    """AUC of V(s_t) [B, T] between right and wrong responses at the middle of each tenth
    of their lengths [B]."""
    rows, middles = torch.arange(len(lengths)), [((k + 0.5) / 10 * lengths).long() for k in range(10)]
    return {f"critic/auc_tenth_{k}": auc(values[rows, places].numpy(), rewards.numpy())
            for k, places in enumerate(middles, 1)}


# ---- the options -------------------------------------------------------------------------------------------

@dataclass
class PPOConfig(TrainConfig):
    output: str | None = option(None, "folder for metrics and the trained model [runs/ppo or runs/ppo-bce]")
    value_loss: Literal["mse", "bce"] = option("mse", "squared error or cross-entropy", group="algorithm")
    value_clip: float = option(0.5, "with mse: values are clipped to this distance from those when sampled")
    lam: float = option(1.0, "GAE's lambda: 1 is R - V(s_t), 0 the one-step temporal difference", most=1)
    # As in the SPPO paper's runs of PPO: a value per token takes longer to learn.
    critic_lr: float = option(1e-5, "learning rate of the critic")
    critic_warmup: int = option(50, "first steps, in which the critic learns and the policy does not")

    BUILTIN = TrainConfig.BUILTIN | {"critic_warmup": 0}

    def __post_init__(self):
        super().__post_init__()
        self.output = self.output or {"mse": "runs/ppo", "bce": "runs/ppo-bce"}[self.value_loss]

    def check(self):
        super().check()
        if self.oversample:
            raise InputError(f"--oversample {self.oversample}: PPO needs finished responses; leave it out")
        if self.critic_model:
            tokens = self.max_prompt_tokens + self.max_response_tokens
            check_model(self.critic_model, tokens, self.trust_remote_code)
            policy, critic = (load_tokenizer(model, self.trust_remote_code).get_vocab()
                              for model in (self.model, self.critic_model))
            if policy != critic:  # a value per token needs the policy's own tokens
                raise InputError(f"--critic-model {self.critic_model}: reads other tokens than {self.model}; "
                                 "choose a model of the same family")


if __name__ == "__main__":
    with clear_errors():
        train(PPOConfig.parse(__doc__), PPO)
