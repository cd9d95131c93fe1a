"""SPPO: Sequence-Level PPO for reasoning models (arXiv 2604.08865), top to bottom.

    python sppo.py                                                    the built-in model learns, on a laptop
    torchrun --nproc-per-node 8 sppo.py --model deepseek-ai/DeepSeek-R1-Distill-Qwen-7B --dataset ...     the real run

A response is one action, not thousands: sample *one* response y for each prompt s, verify it (R is 1 or 0), and
subtract what a scalar critic, which read the prompt alone, expected:

    A = R - V(s)                                   the same for every token of y; not normalised
    r_t = pi(y_t | s, y_<t) / pi_old(y_t | s, y_<t)
    maximise  min(r_t A, clip(r_t, 1 - eps, 1 + eps) A)      averaged over all tokens of the mini-batch
    fit V with binary cross-entropy against R

No group of samples per prompt as in GRPO, no value per token as in PPO. Reading order: `sequence_advantages` and
`clipped_policy_loss` are the mathematics, `SPPO` is the baseline, `train` is the loop; then critic.py, run.py (where
a batch is sampled), policy.py, rollout.py, reward.py. The other algorithms import the loop from here and bring their own
baseline.
"""
import importlib.util
import os
import random
import shutil
from dataclasses import dataclass
from typing import ClassVar, Literal

from cli import CommandLine, Stop, clear_errors, option  # before torch: it quiets what loads after it

# isort: split
import torch
from torch.distributed.elastic.multiprocessing.errors import record

import checkpoint
from critic import PromptCritic, calibration
from data import BUILTIN_MODEL, InputError
from pretrained import check_model
from run import Run, begin, evaluate, finish, next_batch, say_memory


@dataclass
class Config(CommandLine):
    model: str = option(BUILTIN_MODEL, "policy to train: a Hugging Face name or folder (default: the built-in model)")
    critic_model: str | None = option(None, "where the critic starts from (default: the policy's model)")
    dataset: str = option("chain", "chain[:SIZE] (built in), reasoning_gym:NAME, FILE.jsonl, FILE.parquet, or HUB/NAME[:SPLIT]")
    answer: Literal["boxed", "any"] = option("boxed", "what is an answer: the last \\boxed{}, or failing that any last number")
    output: str = option("runs/sppo", "folder for metrics.jsonl, TensorBoard events and the trained model")
    steps: int = option(500, "training steps: one rollout and its updates each")
    prompts_per_step: int = option(256, "prompts sampled in a step")
    minibatch: int = option(128, "prompts, with all their samples, in one optimiser step")
    lr: float = option(1e-6, "learning rate of the policy")
    critic_lr: float = option(5e-6, "learning rate of the critic")
    weight_decay: float = option(0.01, "AdamW's weight decay")
    warmup_steps: int = option(10, "optimiser steps over which the learning rates rise to their constant values")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm")
    clip_low: float = option(0.2, "the ratio is clipped below 1 - this")
    clip_high: float = option(0.2, "the ratio is clipped above 1 + this")
    temperature: float = option(0.6, "sampling temperature; the ratio compares log-probabilities at it")
    max_prompt_tokens: int = option(1024, "longer prompts are dropped, aloud")
    max_response_tokens: int = option(8192, "a response that needs more has no answer")
    save_every: int = option(20, "steps between checkpoints (0: none, except when the run is told to stop)")
    keep: int = option(2, "checkpoints that are kept, the newest")
    resume: bool = option(False, "go on from the newest checkpoint in --output, if there is one")
    eval_every: int = option(10, "steps between evaluations on held-out problems (0: never)")
    eval_problems: int = option(256, "problems held out of the dataset, a fifth of it at most")
    eval_benchmarks: tuple[str, ...] = option((), "benchmarks of eval.py, by name or file, that evaluations sample as well")
    eval_samples: int = option(1, "responses per problem of a benchmark")
    old_logprobs: Literal["policy", "rollout"] = option("policy", "pi_old: computed, or as the engine said, for nothing")
    oversample: float = option(0.0, "prompts in flight beyond a step's, as a share; the first to finish are trained on")
    max_staleness: int = option(8, "steps after which a response that --oversample carries on is waited for")
    engine: Literal["auto", "vllm", "transformers"] = option("auto", "what samples; auto is vllm where it is installed")
    tensor_parallel: int = option(1, "neighbouring ranks that share one vLLM engine")
    vllm_memory: float = option(0.5, "vLLM's share of a GPU's memory while it samples")
    dtype: Literal["bfloat16", "float32"] = option("bfloat16", "compute type; weights and optimiser stay float32")
    micro_batch_tokens: int = option(16384, "tokens per forward and backward on a rank; lower it if memory runs out")
    checkpoint_activations: bool = option(True, "recompute activations in the backward: a third more compute, far less memory")
    compile: bool = option(False, "torch.compile what is neither attention nor matrix product: faster, after half a minute")
    replicas: int = option(1, "copies of the sharded model, say one a node: weights are then gathered within it (HSDP)")
    offload: bool = option(False, "keep parameters and optimiser state in host memory")
    offload_between: bool = option(False, "keep them there but for the one model that is being trained, which is faster")
    reward_workers: int = option(2, "verifier processes on each rank")
    reward_timeout: float = option(1.0, "processor seconds after which a verification is given up, and scores 0")
    trust_remote_code: bool = option(False, "run model code that comes with a checkpoint")
    wandb: str | None = option(None, "log to this Weights & Biases project")
    seed: int = option(0, "of data order and sampling")
    deterministic: bool = option(False, "the same command gives the same numbers, on the same CPU, at some cost in speed")

    # What differs when no --model is given: a model of 360k parameters wants other settings than one of 1.5 billion.
    BUILTIN: ClassVar[dict] = dict(
        steps=40, prompts_per_step=128, minibatch=32, lr=1.5e-4, critic_lr=1e-3, warmup_steps=0, clip_high=0.28,
        temperature=1.0, max_prompt_tokens=64, max_response_tokens=64, save_every=0, eval_every=5,
        dtype="float32", checkpoint_activations=False)

    def check(self):
        """Whatever can be seen to be wrong without loading a model or a dataset."""
        for name in ("steps", "prompts_per_step", "minibatch", "temperature", "max_response_tokens", "max_staleness",
                     "micro_batch_tokens", "reward_workers", "reward_timeout", "tensor_parallel", "eval_samples", "keep",
                     "replicas"):
            if not getattr(self, name) > 0:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be greater than 0")
        for name, package in (("engine", "vllm"), ("wandb", "wandb")):
            if getattr(self, name) not in (None, "auto", "transformers") and not importlib.util.find_spec(package):
                raise InputError(f"--{name} {getattr(self, name)} needs `pip install {package}`")
        if self.prompts_per_step % self.minibatch:
            raise InputError(f"--minibatch {self.minibatch} does not divide --prompts-per-step {self.prompts_per_step}; "
                             "choose a divisor, or the same number for one optimiser step a rollout")
        if self.compile and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
            raise InputError("--compile: needs a C++ compiler (g++ or clang++), and there is none; install one or leave it out")
        if self.offload and self.offload_between:
            raise InputError("--offload and --offload-between: one keeps all models on the host, the other all but one; choose")
        if self.oversample < 0 or self.oversample and self.old_logprobs != "rollout":
            raise InputError(f"--oversample {self.oversample}: must be 0 or more, and needs --old-logprobs rollout, since one "
                             "response may come from several policies")
        if not self.resume and checkpoint.existing(self.output):
            raise InputError(f"{self.output}: holds checkpoints of an earlier run; go on from them with --resume, give another "
                             "--output, or delete it")
        check_model(self.model, self.max_prompt_tokens + self.max_response_tokens, self.trust_remote_code)
        if self.critic_model:
            check_model(self.critic_model, self.max_prompt_tokens, self.trust_remote_code, "--max-prompt-tokens")

    def training_options(self):
        """What policy and critics are trained with alike."""
        return {name: getattr(self, name) for name in (
            "weight_decay", "warmup_steps", "max_grad_norm", "dtype", "micro_batch_tokens", "checkpoint_activations", "offload",
            "offload_between", "replicas", "compile", "trust_remote_code")}


# ---- the mathematics ------------------------------------------------------------------------------------------------

def sequence_advantages(rewards, value_logits):
    """A = R - V(s), V = sigmoid(logit): one number per response (arXiv 2604.08865). rewards, value_logits [B] -> [B]."""
    return rewards - value_logits.sigmoid()


def clipped_policy_loss(logprobs, old_logprobs, advantages, mask, *, clip_low=0.2, clip_high=0.2, dual_clip=3.0,
                        num_tokens=None):
    """PPO's clipped surrogate, per token: -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A).

    logprobs, old_logprobs [B, T]; advantages [B] (every token of a response has the same) or [B, T]; mask [B, T] is 1
    on response tokens. `dual_clip` bounds the objective from below by dual_clip * A where A < 0, so that one token
    that became far more likely cannot dominate a batch (arXiv 1912.09729); None turns the bound off.
    Returns (loss, metrics): means over the mask, or sums over `num_tokens` where it is given. A mini-batch cut into
    micro-batches passes the whole mini-batch's count, and its losses and metrics simply add up.
    """
    mask = mask.to(logprobs.dtype)
    advantages = advantages.to(logprobs.dtype)
    if advantages.dim() == 1:
        advantages = advantages[:, None]
    num_tokens = mask.sum() if num_tokens is None else num_tokens
    log_ratio = (logprobs - old_logprobs) * mask  # beyond a response's end there is nothing to compare
    ratio = log_ratio.clamp(-20, 20).exp()
    free, clipped = ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    objective = torch.minimum(free, clipped)
    if dual_clip is not None:
        objective = torch.where(advantages < 0, torch.maximum(objective, dual_clip * advantages), objective)
    loss = -(objective * mask).sum() / num_tokens
    with torch.no_grad():
        def share(x):
            return (x * mask).sum() / num_tokens
        metrics = {"clip_fraction": share(clipped < free),
                   "kl": share(ratio - 1 - log_ratio)}  # how far this mini-batch has left the sampling policy
        if dual_clip is not None:
            metrics["dual_clip_fraction"] = share((advantages < 0) & (free < dual_clip * advantages))
    return loss, metrics


# ---- baselines: what is subtracted from the reward ------------------------------------------------------------------

class Baseline:
    """What tells one algorithm from another. `run` gives it the config, the problems, the policy and `run.sample`."""

    samples_per_prompt = 1
    wants_greedy = False  # also sample each prompt's greedy response, in the same pass of the engine

    def __init__(self, run):
        self.run = run

    def next_problems(self, drawn, count):
        """`count` problems, of a run that has drawn `drawn` before. By default every problem once an epoch, in an order
        of its own each time."""
        problems = self.run.problems
        places = [divmod(i, len(problems)) for i in range(drawn, drawn + count)]
        orders = {epoch: random.Random(f"{self.run.config.seed}/{epoch}").sample(problems, len(problems))
                  for epoch in {epoch for epoch, _ in places}}
        return [orders[epoch][i] for epoch, i in places]

    def expect(self, problems):
        """A number per problem, kept with a response that is started now and may be trained on some steps later
        (--oversample): `advantages` finds it as `batch.expected`. None for a baseline that needs none."""
        return [None] * len(problems)

    def advantages(self, batch):
        """What the policy loss multiplies: [B], or [B, T] for an algorithm with a value per token."""
        raise NotImplementedError

    def update(self, batch):
        """Learns from the batch after the policy did. Returns metrics."""
        return {}

    def state_dict(self):
        """What a checkpoint must keep: tensors and what JSON can hold, in nested dictionaries."""
        return {}

    def load_state_dict(self, state):
        """Takes up what `state_dict` gave. Sharded tensors, a critic's, were filled in place before this is called."""


class SPPO(Baseline):
    """One sample per prompt, against a scalar critic's expectation."""

    def __init__(self, run):
        super().__init__(run)
        c = run.config
        self.critic = PromptCritic(c.critic_model or c.model, run.device, minibatch=c.minibatch, lr=c.critic_lr,
                                   **c.training_options())

    def expect(self, problems):
        return self.critic.logits(self.critic.encode(problems)).tolist()

    def advantages(self, batch):
        if not self.critic.updates:
            self.critic.start_from(batch.rewards)
        self.prompts = self.critic.encode(batch.problems)  # as the critic's own tokenizer and template have it
        self.logits = self.critic.logits(self.prompts) if batch.expected is None else batch.expected
        return sequence_advantages(batch.rewards, self.logits)

    def update(self, batch):
        return {**calibration(self.logits.sigmoid(), batch.rewards), **self.critic.update(self.prompts, batch.rewards)}

    def state_dict(self):
        return {"critic": self.critic.state_dict()}

    def load_state_dict(self, state):
        self.critic.load_state_dict(state["critic"])


# ---- the loop -------------------------------------------------------------------------------------------------------

@record  # so that torchrun shows the first error of any rank last
@clear_errors()
def train(config, make_baseline):
    """Trains `config.model`, with what `make_baseline(run)` returns subtracted from the reward."""
    run = Run(config)
    baseline = make_baseline(run)
    begun, log = begin(run, baseline)
    policy, engine, clock, stop = run.policy, run.engine, run.clock, Stop()
    engine.sync(policy.weights())  # wakes it: from here on it is only asleep while the others train
    if not begun:
        evaluate(run, log, 0)
    stopping = saved = False
    for step in range(begun + 1, config.steps + 1):
        clock.start_step()
        run.random.seed(f"{config.seed}/{step}")
        # 1. Sample responses from the current policy, and verify them.
        batch, sampled = next_batch(run, baseline, step)
        engine.sleep()

        # 2. pi_old. With a single mini-batch the policy has not moved when its gradient is taken: none is needed.
        size = config.minibatch * baseline.samples_per_prompt
        with clock("logprobs"):
            if config.old_logprobs == "rollout":
                batch.old_logprobs = batch.rollout_logprobs
            elif size < len(batch.responses):
                batch.old_logprobs = policy.logprobs(batch.sequences)

        # 3. The advantage: the reward less the baseline.
        with clock("critic"):
            advantages = baseline.advantages(batch)

        with checkpoint.saved_if_diverged(batch, step, config):
            # 4. One epoch of clipped policy steps.
            with clock("update"):
                updates = [policy_step(policy, batch, slice(i, i + size), advantages, config)
                           for i in range(0, len(batch.responses), size)]

            # 5. The baseline learns from what happened.
            with clock("critic"):
                learned = baseline.update(batch)

        # 6. The engine takes the new weights.
        with clock("sync"):
            engine.sync(policy.weights())
        clock.end_step()

        log.add(describe(batch), sampled, run.given_up, mean_of(updates), learned, clock.step_times())
        if config.eval_every and (step % config.eval_every == 0 or step == config.steps):
            evaluate(run, log, step)
        log.write(step, clock.total)
        say_memory(run)

        # 7. From here the run could go on after a kill.
        stopping = stop.on_any_rank() and step < config.steps
        if stopping or config.save_every and step % config.save_every == 0:
            saved = checkpoint.save(run, baseline, log, step)
        if stopping:
            break
    finish(run, log, lost=stopping and not saved)


def policy_step(policy, batch, rows, advantages, config):
    """One optimiser step on the mini-batch `rows` (a slice). Returns metrics: means over all tokens that have a gradient."""
    rows = list(range(len(batch.responses)))[rows]
    # Without an advantage, no gradient: what GRPO sampled for a group whose rewards agree need not be read again.
    useful = [i for i in rows if advantages[i].any()] or rows[:1]
    sequences, mask, rollout = [batch.sequences[i] for i in useful], batch.mask[useful], batch.rollout_logprobs[useful]
    old = None if batch.old_logprobs is None else batch.old_logprobs[useful]
    num_tokens = mask.sum()  # of the whole mini-batch, over all ranks and micro-batches
    advantages = advantages[useful] * (num_tokens / batch.mask[rows].sum())  # so that the loss is a mean over all rows

    def loss_of(micro):
        logprobs, entropy = policy.score([sequences[i] for i in micro])

        def here(x):  # this micro-batch's rows, as long as its longest response
            return x[micro, : logprobs.shape[1]].to(logprobs.device)
        before = logprobs.detach() if old is None else here(old)
        loss, metrics = clipped_policy_loss(
            logprobs, before, here(advantages) if advantages.dim() == 2 else advantages[micro].to(logprobs.device),
            here(mask), clip_low=config.clip_low, clip_high=config.clip_high, num_tokens=num_tokens)
        metrics["entropy"] = (entropy * here(mask)).sum() / num_tokens
        # What the engine thought of its samples and what the trainer thinks: 0 but for rounding, or a bug.
        ours = logprobs.detach() if config.old_logprobs == "rollout" else before
        metrics["rollout_gap"] = ((ours - here(rollout)).abs() * here(mask)).sum() / num_tokens
        return loss, {"loss": loss.detach(), **metrics}

    metrics = policy.optimize([len(p) + len(r) for p, r in sequences], loss_of)
    return {f"policy/{name}": value for name, value in metrics.items()}


def describe(batch):
    """What a batch of responses was like."""
    return {"reward": batch.rewards.mean().item(), "response_tokens": batch.lengths.float().mean().item(),
            "truncated": sum(not r.finished for r in batch.responses) / len(batch.responses)}


def mean_of(dicts):
    return {key: sum(d[key] for d in dicts) / len(dicts) for key in dicts[0]}


if __name__ == "__main__":
    train(Config.parse(__doc__), SPPO)
