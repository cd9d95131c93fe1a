"""The scalar prompt critic (arXiv 2604.08865): a model that reads the prompt alone and predicts the chance of success.

A token-level critic must say how good every half-written proof is. This one answers a single question, "will the
policy solve this problem?", with one number per prompt; that is a classification, trained with cross-entropy, and a
model much smaller than the policy can learn it.
"""
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel

from data import load_tokenizer, render
from policy import Trained, micro_batches


class ValueModel(nn.Module):
    """A backbone and one linear layer: the logit of V at the prompt's last token."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.config.hidden_size, 1, bias=True)
        nn.init.zeros_(self.head.weight)  # V = 1/2 for every prompt, until something was learned
        nn.init.zeros_(self.head.bias)

    def forward(self, ids, last):
        """ids [b, L] right-padded, last [b]: position of each prompt's last token -> logits [b]."""
        hidden = self.backbone(input_ids=ids, use_cache=False).last_hidden_state
        return self.head(hidden[torch.arange(len(ids), device=ids.device), last]).squeeze(-1).clone()  # FSDP wants no views


class PromptCritic(Trained):
    """V(s_p) = sigmoid(logit), from any causal Hugging Face model, with its own tokenizer and chat template."""

    def __init__(self, model, device, *, minibatch, trust_remote_code=False, **options):
        self.tokenizer = load_tokenizer(model, trust_remote_code)
        self.minibatch = minibatch
        backbone = AutoModel.from_pretrained(
            model, dtype="auto", attn_implementation="sdpa", trust_remote_code=trust_remote_code)
        super().__init__(ValueModel(backbone), device, **options)

    def encode(self, problems):
        """Token ids of each problem's prompt as this critic reads it."""
        return [render(p.messages, self.tokenizer) for p in problems]

    def score(self, prompts):
        """Logits [b] of V for lists of token ids, with gradient; [0] for no prompts, which still runs the model."""
        rows = prompts or [[0]]
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for i, prompt in enumerate(rows):
            ids[i, : len(prompt)] = torch.tensor(prompt)
        last = torch.tensor([len(prompt) - 1 for prompt in rows])
        return self.module(ids.to(self.device), last.to(self.device)).float()[: len(prompts)]

    @torch.no_grad()
    def logits(self, prompts):
        """Logits [B] of V, on the CPU, the same on every rank; the ranks share the work."""
        result = torch.zeros(len(prompts))
        for rows in micro_batches([len(p) for p in prompts], self.micro_batch_tokens):
            logits = self.score([prompts[row] for row in rows])
            if rows:
                result[rows] = logits.cpu()
        dist.all_reduce(result)
        return result

    def update(self, prompts, rewards):
        """One epoch of L_V = BCE(V(s_p), R) in mini-batches. rewards [B] in {0, 1}. Returns metrics."""
        losses, norms = [], []
        for start in range(0, len(prompts), self.minibatch):
            chunk, targets = prompts[start : start + self.minibatch], rewards[start : start + self.minibatch]

            def loss_of(rows, chunk=chunk, targets=targets):
                logits = self.score([chunk[row] for row in rows])
                loss = F.binary_cross_entropy_with_logits(
                    logits, targets[rows].to(logits.device), reduction="sum") / len(chunk)
                return loss, {"loss": loss.detach()}

            metrics = self.optimize([len(p) for p in chunk], loss_of)
            losses.append(metrics["loss"])
            norms.append(metrics["grad_norm"])
        return {"critic/loss": float(np.mean(losses)), "critic/grad_norm": float(np.mean(norms))}


# ---- does the critic know which prompts are solvable? ---------------------------------------------------------------

def calibration(logits, rewards):
    """How well V predicted the rewards [B] that it had not seen: BCE, AUC and explained variance."""
    values = logits.sigmoid()
    return {"critic/bce": F.binary_cross_entropy_with_logits(logits, rewards).item(),
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
