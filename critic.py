"""The scalar prompt critic (arXiv 2604.08865): a model that reads the prompt alone and predicts the chance of success.

A token-level critic must say how good every half-written proof is. This one answers a single question, "will the
policy solve this problem?", with one number per prompt; that is a classification, trained with cross-entropy, and a
model much smaller than the policy can learn it.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel

from data import load_tokenizer, render
from policy import Trained
from pretrained import load


class ValueModel(nn.Module):
    """A causal backbone (hub name or folder) and one linear layer: a number for every state that is asked for."""

    def __init__(self, model, trust_remote_code=False):
        super().__init__()
        self.backbone = load(AutoModel, model, trust_remote_code)
        self.head = nn.Linear(self.backbone.config.hidden_size, 1, bias=True)
        nn.init.zeros_(self.head.weight)  # a logit of 0, V = 1/2 for every prompt, until something is known
        nn.init.zeros_(self.head.bias)

    def forward(self, ids, scored):
        """ids [b, L] right-padded; scored [n]: places in ids.flatten() -> the head's outputs there [n]."""
        hidden = self.backbone(input_ids=ids, use_cache=False).last_hidden_state
        return self.head(hidden.flatten(0, 1)[scored]).squeeze(-1).float().clone()  # FSDP wants no views


class PromptCritic(Trained):
    """V(s_p) = sigmoid(logit), from any causal Hugging Face model, with its own tokenizer and chat template."""

    def __init__(self, model, device, *, minibatch, trust_remote_code=False, **options):
        self.tokenizer = load_tokenizer(model, trust_remote_code)
        self.minibatch = minibatch
        super().__init__(ValueModel(model, trust_remote_code), device, **options)

    def start_from(self, rewards):
        """Before the first update: V = the mean reward [B], for every prompt. Our addition: from V = 1/2, a policy that
        solves a tenth would be pushed away from nearly all that it does until the critic has learned that tenth. (With
        --oversample, what is in flight by then keeps the 1/2 that it was started with.)"""
        mean = (rewards.sum().item() + 0.5) / (len(rewards) + 1)  # never 0 or 1
        self.module.reshard()  # or a gathered copy would be filled, and dropped
        with torch.no_grad():
            self.module.head.bias.fill_(math.log(mean / (1 - mean)))

    def encode(self, problems):
        """Token ids of each problem's prompt as this critic reads it."""
        return [render(p.messages, self.tokenizer) for p in problems]

    def score(self, prompts):
        """Logits [b] of V for lists of token ids, with gradient; [0] for no prompts, which still runs the model."""
        rows = prompts or [[0]]
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for i, prompt in enumerate(rows):
            ids[i, : len(prompt)] = torch.tensor(prompt)
        last = torch.tensor([i * ids.shape[1] + len(prompt) - 1 for i, prompt in enumerate(rows)])
        return self.module(ids.to(self.device), last.to(self.device))[: len(prompts)]

    def logits(self, prompts):
        """Logits [B] of V, without gradient, on the CPU, the same on every rank."""
        return self.infer([len(p) for p in prompts], 1, lambda rows: self.score([prompts[row] for row in rows])[:, None])[:, 0]

    def update(self, prompts, rewards):
        """One epoch of L_V = BCE(V(s_p), R) in mini-batches. rewards [B] in {0, 1}. Returns metrics."""
        done = []
        for start in range(0, len(prompts), self.minibatch):
            chunk, targets = prompts[start : start + self.minibatch], rewards[start : start + self.minibatch]

            def loss_of(rows, chunk=chunk, targets=targets):
                logits = self.score([chunk[row] for row in rows])
                loss = F.binary_cross_entropy_with_logits(
                    logits, targets[rows].to(logits.device), reduction="sum") / len(chunk)
                return loss, {"loss": loss.detach()}

            done.append(self.optimize([len(p) for p in chunk], loss_of))
        return {f"critic/{name}": float(np.mean([d[name] for d in done])) for name in done[0]}


# ---- does the critic know which prompts are solvable? ---------------------------------------------------------------

def calibration(values, rewards):
    """How well V [B], in (0, 1), predicted the rewards [B] that it had not seen: BCE, AUC and explained variance."""
    return {"critic/bce": F.binary_cross_entropy(values, rewards).item(),
            "critic/auc": auc(values.numpy(), rewards.numpy()),
            "critic/explained_variance": explained_variance(values.numpy(), rewards.numpy())}


def auc(scores, labels):
    """The chance that a solved prompt is scored above an unsolved one, ties counting half. None with one class only."""
    positive, negative = scores[labels > 0.5], np.sort(scores[labels <= 0.5])
    if not len(positive) or not len(negative):
        return None
    below, not_above = np.searchsorted(negative, positive, "left"), np.searchsorted(negative, positive, "right")
    return float((below + not_above).mean() / 2 / len(negative))


def explained_variance(values, targets):
    """1 - Var(R - V) / Var(R): 1 is perfect, 0 no better than a constant. None where R does not vary."""
    variance = targets.var()
    return float(1 - (targets - values).var() / variance) if variance > 0 else None
