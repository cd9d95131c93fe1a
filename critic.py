"""The scalar prompt critic (arXiv 2604.08865): a model that predicts the reward from the prompt alone.

A token-level critic must say how good every half-written proof is. This one answers a single question, "will
the policy solve this problem?", with one number per prompt. That is a classification, trained with binary
cross-entropy. The paper found that a model much smaller than the policy is enough for it.

V is the sigmoid of a logit. Without FSDP, mini-batches, clipped gradients, chat template and `start_from`, it
is this:

    import torch
    from transformers import AutoModel, AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    backbone = AutoModel.from_pretrained(MODEL, dtype=torch.float32)
    head = torch.nn.Linear(backbone.config.hidden_size, 1)
    torch.nn.init.zeros_(head.weight)                   # V = 1/2 for every prompt, until something is known
    torch.nn.init.zeros_(head.bias)
    learned = [*backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(learned, lr=LR)       # 5e-6, as in the paper; built-in model: 1e-3

    def logits(prompts):                                # texts -> the logits of V, at their last tokens [B]
        ids = [tokenizer(prompt).input_ids for prompt in prompts]
        last = torch.tensor([len(i) - 1 for i in ids])
        # Padded on the right, where the last token does not see it.
        rows = torch.tensor([i + [0] * (int(last.max()) + 1 - len(i)) for i in ids])
        hidden = backbone(rows).last_hidden_state
        return head(hidden[torch.arange(len(ids)), last])[:, 0]

    def update(prompts, rewards):                       # rewards [B], 1 or 0
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits(prompts), rewards)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()
"""
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from data import render
from machine import load, load_tokenizer
from sharded import ShardedModel, mean_of


class ValueModel(nn.Module):
    """A causal backbone (hub name or folder) and one linear layer: a number for every
    place that is asked for."""

    def __init__(self, model, trust_remote_code=False):
        super().__init__()
        self.backbone = load("AutoModel", model, trust_remote_code)
        self.head = nn.Linear(self.backbone.config.get_text_config().hidden_size, 1)
        nn.init.zeros_(self.head.weight)  # a logit of 0, V = 1/2 for every prompt, until something is known
        nn.init.zeros_(self.head.bias)

    def forward(self, ids, scored):
        """ids [b, L] right-padded; scored [n]: places in ids.flatten() -> the head's outputs there [n]."""
        hidden = self.backbone(input_ids=ids, use_cache=False).last_hidden_state  # [b, L, H]
        return self.head(hidden.flatten(0, 1)[scored]).squeeze(-1).float().clone()  # FSDP wants no views


class PromptCritic(ShardedModel):
    """V(s) = sigmoid(logit), from any causal Hugging Face model, with its own tokenizer and chat template."""

    def __init__(self, model, device, *, minibatch, trust_remote_code=False, **options):
        self.tokenizer = load_tokenizer(model, trust_remote_code)
        self.minibatch = minibatch
        super().__init__(ValueModel(model, trust_remote_code), device, **options)

    def start_from(self, rewards):
        """Before the first update: V = the mean of rewards [B], for every prompt.

        This is our addition to the paper. With V = 1/2, a policy that solves one problem in ten would get
        negative advantages for nearly all that it does, until the critic has learned better. (With
        --oversample, the responses in flight keep the 1/2 that they were started with.)
        """
        mean = (rewards.sum().item() + 0.5) / (len(rewards) + 1)  # never 0 or 1, whose logits are infinite
        self.module.reshard()  # or we would fill a gathered copy, which FSDP drops
        with torch.no_grad():
            self.module.head.bias.fill_(math.log(mean / (1 - mean)))

    def encode(self, problems):
        """Token ids of each problem's prompt, by this critic's own tokenizer."""
        return [render(p.messages, self.tokenizer) for p in problems]

    def forward(self, prompts):
        """Logits of V [b] for lists of token ids, with gradient. Without prompts it returns an empty
        tensor, and still runs the model, since all ranks must gather weights together."""
        rows = prompts or [[0]]
        ids = pad_sequence([torch.tensor(prompt) for prompt in rows], batch_first=True)
        last = torch.tensor([i * ids.shape[1] + len(prompt) - 1 for i, prompt in enumerate(rows)])
        return self.module(ids.to(self.device), last.to(self.device))[: len(prompts)]

    def logits(self, prompts):
        """Logits [B] of V, without gradient, on the CPU, the same on every rank."""
        return self.infer(self.forward, prompts, [len(p) for p in prompts], (len(prompts),))

    def update(self, prompts, rewards):
        """One epoch of BCE(V(s), R) in mini-batches. rewards [B] in [0, 1]. Returns metrics."""
        steps = []
        with self.on_device():
            for start in range(0, len(prompts), self.minibatch):
                chunk = prompts[start : start + self.minibatch]
                targets = rewards[start : start + self.minibatch]
                for rows in self.micro_batches([len(p) for p in chunk]):
                    logits = self.forward([chunk[row] for row in rows])
                    target = targets[rows].to(logits.device)
                    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="sum")
                    self.backward(loss / len(chunk), {})
                steps.append(self.step())
        return mean_of(steps, "critic/")


# ---- does the critic know which prompts are solvable? ------------------------------------------------------

def value_metrics(values, rewards):
    """How well V [B], in (0, 1), predicted the rewards [B] that it had not seen: BCE, AUC and explained
    variance. (log.py adds `critic/skill`, which needs the rewards of earlier steps.)"""
    return {"critic/bce": F.binary_cross_entropy(values, rewards).item(),
            "critic/auc": auc(values.numpy(), rewards.numpy()),
            "critic/explained_variance": explained_variance(values.numpy(), rewards.numpy())}


def auc(scores, labels):
    """The chance that of two prompts with different rewards the one with more is scored higher; ties count
    half. With rewards of 0 and 1: that a solved prompt is scored above an unsolved one. None if all are
    equal."""
    more = labels[:, None] > labels  # [B, B]
    return float(1 + np.sign(scores[:, None] - scores)[more].mean()) / 2 if more.any() else None


def explained_variance(values, targets):
    """1 - Var(R - V) / Var(R): 1 is perfect, 0 no better than a constant. None where R does not vary."""
    variance = targets.var() * (targets.min() < targets.max())  # 0, whatever its rounding
    return float(1 - (targets - values).var() / variance) if variance > 0 else None
