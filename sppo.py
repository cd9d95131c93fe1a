"""SPPO: Sequence-Level PPO for reasoning models (arXiv 2604.08865), top to bottom.

    python sppo.py                            the built-in model learns, on a laptop
    torchrun --nproc-per-node 8 sppo.py --model deepseek-ai/DeepSeek-R1-Distill-Qwen-7B --dataset ...

A response is one action, not thousands. Sample *one* response y for each prompt s, verify it (R is 1 or 0), and
subtract what a scalar critic, which has read the prompt alone, expected:

    A = R - V(s)                                   the same for every token of y; not normalised
    r_t = pi(y_t | s, y_<t) / pi_old(y_t | s, y_<t)
    maximise  min(r_t A, clip(r_t, 1 - eps, 1 + eps) A)      averaged over all tokens of the mini-batch
    fit V with binary cross-entropy against R

There is no group of samples per prompt as in GRPO, and no value per token as in PPO.

Read on in this order: the mathematics, `SPPO`, the loop `train`, the step `policy_step`, all in this file; then
critic.py, policy.py, sharded.py, rollout.py, engines.py, reward.py. The other algorithms (grpo.py, ppo.py, spo.py)
import the loop from here and bring a baseline of their own.
"""
import importlib.util
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar, Literal

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

import checkpoint
import data
from cli import BUILTIN_MODEL, Clock, CommandLine, InputError, Stop, clear_errors, option, say
from critic import PromptCritic, calibration
from engines import make_engine, stop_tokens
from eval import evaluate_policy, load_eval_benchmarks
from inflight import InFlight
from policy import Policy
from reward import Verifier
from rollout import Sampler
from sharded import compute_dtype, init_distributed, rows_like, seed_torch

# ---- the mathematics ----------------------------------------------------------------------------------------

def sequence_advantages(rewards, value_logits):
    """A = R - V(s), V = sigmoid(logit): one number per response (arXiv 2604.08865). rewards, value_logits [B] -> [B]."""
    return rewards - value_logits.sigmoid()


def clipped_policy_loss(logprobs, old_logprobs, advantages, mask, *, clip_low=0.2, clip_high=0.2, dual_clip=3.0,
                        num_tokens=None):
    """PPO's clipped surrogate, per token: -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) (arXiv 1707.06347, eq. 7).

    logprobs, old_logprobs [B, T]; advantages [B] (every token of a response has the same) or [B, T]; mask [B, T] is 1
    on response tokens. `dual_clip` bounds the objective from below by dual_clip * A where A < 0, so that one token
    that became far more likely cannot dominate a batch (arXiv 1912.09729); None turns the bound off.
    Returns (loss, metrics): means over the mask, or sums over `num_tokens` where it is given. A mini-batch cut into
    micro-batches passes the whole mini-batch's count, and its losses and metrics simply add up.
    """
    mask = mask.to(logprobs.dtype)
    advantages = advantages.to(logprobs.dtype)
    if advantages.dim() == 1:
        advantages = advantages[:, None]  # [B, 1]: one action, one advantage, whatever the number of its tokens
    num_tokens = mask.sum() if num_tokens is None else num_tokens
    log_ratio = (logprobs - old_logprobs) * mask  # beyond a response's end there is nothing to compare
    ratio = log_ratio.clamp(-20, 20).exp()  # exp(20) is clipped anyway, and exp(100) would be infinite
    free, clipped = ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    # The smaller of the two: once the ratio has left the clip range in the direction that A asks for, the objective is
    # constant and the token has no gradient. In the other direction it always has, so that mistakes can be undone.
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


# ---- baselines: what is subtracted from the reward ----------------------------------------------------------

class Baseline:
    """What tells one algorithm from another. A new one fills in `advantages`, and `update` if it learns."""
    samples_per_prompt = 1
    wants_greedy = False  # also sample each prompt's greedy response, in the same pass of the engine
    critic = None  # a ShardedModel that this baseline trains, if it does
    calibration = staticmethod(calibration)  # metrics of how well values [B] predicted rewards [B]

    def __init__(self, run):
        self.run = run  # the parts of the run by name, as `train` puts them together

    def next_problems(self, first, count):
        """The problems number `first` to `first + count` of the run: by default each once an epoch, shuffled."""
        return data.shuffled_epochs(self.run.problems, first, count, self.run.config.seed)

    def advantages(self, batch):
        """What the policy loss multiplies: [B], or [B, T] for an algorithm with a value per token."""
        raise NotImplementedError

    def update(self, batch):
        """Learns from the batch after the policy did. Returns metrics."""
        return {}

    def expect(self, problems):
        """For --oversample: a number per problem, kept until the response that starts now is trained on."""
        return [None] * len(problems)

    def state_dict(self):
        """What a checkpoint must keep: tensors, and what JSON can hold, in nested dictionaries."""
        return {"critic": self.critic.state_dict()} if self.critic else {}

    def load_state_dict(self, state):
        """Takes over what `state_dict` gave. Sharded tensors (a critic's) were filled in place before this."""
        if self.critic:
            self.critic.load_state_dict(state["critic"])


class SPPO(Baseline):
    """One sample per prompt, against a scalar critic's expectation."""

    def __init__(self, run):
        super().__init__(run)
        c = run.config
        self.critic = PromptCritic(c.critic_model or c.model, run.device, minibatch=c.minibatch, lr=c.critic_lr,
                                   **c.training_options())

    def advantages(self, batch):
        if not self.critic.updates:
            self.critic.start_from(batch.rewards)
        self.prompts = self.critic.encode(batch.problems)
        # V as it is before this step's update: it must not have seen the rewards that it is compared with.
        self.logits = self.critic.logits(self.prompts) if batch.expected is None else batch.expected
        return sequence_advantages(batch.rewards, self.logits)

    def update(self, batch):
        before = self.calibration(self.logits.sigmoid(), batch.rewards)
        return {**before, **self.critic.update(self.prompts, batch.rewards)}

    def expect(self, problems):
        return self.critic.logits(self.critic.encode(problems)).tolist()


# ---- the loop -----------------------------------------------------------------------------------------------

@record  # so that torchrun shows the first error of any rank last
@clear_errors()
def train(config, make_baseline):
    """Trains `config.model`, with what `make_baseline(run)` returns subtracted from the reward."""
    # The parts of the run. Baselines and checkpoints know them by these names.
    c, run = config, SimpleNamespace(config=config)
    c.check()
    say(f"Loading {c.model} and its engine; the first line of training follows in some seconds.")
    run.tokenizer = data.load_tokenizer(c.model, c.trust_remote_code)
    run.problems, run.held_out = data.training_problems(c, run.tokenizer)  # chat messages and gold answers
    run.benchmarks = load_eval_benchmarks(c, run.tokenizer)  # for --eval-benchmarks
    run.device = init_distributed()  # every rank runs this same function, on a GPU of its own
    c.check_ranks(dist.get_world_size())
    c.dtype = compute_dtype(c.dtype, run.device)
    seed_torch(c.seed, c.deterministic)
    run.clock = Clock(run.device)
    run.verifier = Verifier(c.reward_workers, c.reward_timeout, c.answer)  # response and gold answer in, 1 or 0 out
    data.check_answers(run.problems + run.held_out, run.verifier, c.dataset)
    # The engine goes before the policy: on a GPU it sizes its cache by what is free, and then sleeps.
    run.engine = make_engine(
        c.engine, c.model, run.device, stop=stop_tokens(c.model, run.tokenizer), dtype=c.dtype, seed=c.seed,
        max_tokens=c.max_prompt_tokens + c.max_response_tokens, tensor_parallel=c.tensor_parallel,
        memory=c.vllm_memory, trust_remote_code=c.trust_remote_code)
    run.engine.sleep()
    run.sampler = Sampler(c, run.tokenizer, run.engine, run.verifier, run.clock)  # problems in, a verified Batch out
    run.in_flight = InFlight(c, run.sampler, run.problems)  # the same for --oversample
    run.policy = Policy(c.model, run.device, temperature=c.temperature, lr=c.lr, compile=c.compile,
                        **c.training_options())
    baseline = make_baseline(run)
    last_step, log = checkpoint.begin(run, baseline)  # with --resume, from the newest checkpoint

    policy, engine, clock, stop = run.policy, run.engine, run.clock, Stop()
    engine.sync(policy.weights())  # wakes the engine: from here on it only sleeps while the others train
    if not last_step:
        evaluate_policy(run, log, 0)
    stopping = saved = False
    for step in range(last_step + 1, c.steps + 1):
        clock.start_step()
        run.sampler.random.seed(f"{c.seed}/{step}")  # so that a resumed run samples what it would have sampled

        # 1. Sample responses from the current policy, and verify them.
        if c.oversample:
            batch = run.in_flight.sample(baseline, step)
        else:
            problems = baseline.next_problems((step - 1) * c.prompts_per_step, c.prompts_per_step)
            batch = run.sampler.sample(problems, baseline.samples_per_prompt, baseline.wants_greedy)
        engine.sleep()

        # 2. pi_old. With a single mini-batch the policy has not moved when its gradient is taken: none is needed.
        size = c.minibatch * baseline.samples_per_prompt  # responses in a mini-batch
        with clock("logprobs"):
            if c.old_logprobs == "rollout":
                batch.old_logprobs = batch.rollout_logprobs
            elif size < len(batch.responses):
                batch.old_logprobs = policy.logprobs(batch.sequences)

        # 3. The advantage: the reward minus the baseline.
        with clock("critic"):
            advantages = baseline.advantages(batch)

        with checkpoint.kept_if_diverged(batch, step, c):
            # 4. One epoch of clipped policy steps.
            with clock("update"), policy.on_device():
                updates = [policy_step(policy, batch, range(i, min(i + size, len(batch.responses))), advantages, c)
                           for i in range(0, len(batch.responses), size)]

            # 5. The baseline learns from what happened.
            with clock("critic"):
                learned = baseline.update(batch)

        # 6. The engine takes the new weights.
        with clock("sync"):
            engine.sync(policy.weights())
        clock.end_step()

        log.add(batch.metrics(), run.sampler.metrics, mean_of(updates), learned, clock.step_times())
        if c.eval_every and (step % c.eval_every == 0 or step == c.steps):
            evaluate_policy(run, log, step)
        log.write(step, clock.total)

        # 7. A checkpoint: a run that is killed after it loses nothing.
        stopping = stop.on_any_rank() and step < c.steps
        if stopping or c.save_every and step % c.save_every == 0:
            saved = checkpoint.save(run, baseline, log, step)
        if stopping:
            break
    checkpoint.finish(run, log, lost=stopping and not saved)


def policy_step(policy, batch, rows, advantages, config):
    """One optimiser step on the mini-batch `rows` (numbers of responses). advantages [B] or [B, T].

    Returns metrics: means over the tokens of all responses that have a gradient.
    """
    # A response without advantage has no gradient, and is not read again: in GRPO, groups whose rewards all agree.
    useful = [i for i in rows if advantages[i].any()] or [rows[0]]
    # The loss is the mean over all tokens of the mini-batch, whatever the rank and the micro-batch they are in.
    num_tokens = batch.mask[useful].sum()
    advantages = advantages * (num_tokens / batch.mask[list(rows)].sum())
    for micro in policy.micro_batches([len(p) + len(r) for p, r in (batch.sequences[i] for i in useful)]):
        micro = [useful[i] for i in micro]
        logprobs, entropy = policy.forward([batch.sequences[i] for i in micro])  # [b, t], with gradient
        mask, rollout = rows_like(logprobs, micro, batch.mask), rows_like(logprobs, micro, batch.rollout_logprobs)
        if batch.old_logprobs is None:
            old = logprobs.detach()  # pi_old is pi: the ratio is 1, and only its gradient matters
        else:
            old = rows_like(logprobs, micro, batch.old_logprobs)
        loss, metrics = clipped_policy_loss(
            logprobs, old, rows_like(logprobs, micro, advantages), mask, clip_low=config.clip_low,
            clip_high=config.clip_high, num_tokens=num_tokens)
        metrics["entropy"] = (entropy * mask).sum() / num_tokens
        # The engine's log-probabilities against the trainer's: they differ by rounding, or there is a bug.
        trainer = logprobs.detach() if config.old_logprobs == "rollout" else old
        metrics["rollout_gap"] = ((trainer - rollout).abs() * mask).sum() / num_tokens
        policy.backward(loss, metrics)
    return {f"policy/{name}": value for name, value in policy.step().items()}


def mean_of(dicts):
    return {key: sum(d[key] for d in dicts) / len(dicts) for key in dicts[0]}


# ---- the options --------------------------------------------------------------------------------------------

@dataclass
class TrainConfig(CommandLine):
    """The options of every training script. Algorithms add theirs in a subclass."""
    model: str = option(BUILTIN_MODEL, "policy to train: a Hugging Face name or folder [the built-in model]",
                        group="what to train on")
    dataset: str = option("chain", "chain[:SIZE], reasoning_gym:NAME, FILE.jsonl, FILE.parquet, HUB/NAME[:SPLIT]")
    output: str = option("runs/sppo", "folder for metrics.jsonl, TensorBoard events and the trained model")
    critic_model: str | None = option(None, "model that the critic starts from [the policy's]")
    max_prompt_tokens: int = option(1024, "problems with longer prompts are dropped, with a message")
    max_response_tokens: int = option(8192, "a response that needs more has no answer", positive=True)
    answer: Literal["boxed", "any"] = option("boxed", "the last \\boxed{}; any: without a box, the last number")

    steps: int = option(500, "training steps: one rollout and its updates", group="algorithm", positive=True)
    prompts_per_step: int = option(256, "prompts sampled in a step", positive=True)
    minibatch: int = option(128, "prompts, with all their samples, in one optimiser step", positive=True)
    lr: float = option(1e-6, "learning rate of the policy")
    critic_lr: float = option(5e-6, "learning rate of the critic")
    weight_decay: float = option(0.01, "AdamW's weight decay")
    warmup_steps: int = option(10, "optimiser steps in which the learning rates rise to their constant value")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm")
    clip_low: float = option(0.2, "the ratio is clipped below 1 - this")
    clip_high: float = option(0.2, "the ratio is clipped above 1 + this")
    old_logprobs: Literal["policy", "rollout"] = option("policy", "pi_old: computed anew, or the engine's (free)")
    seed: int = option(0, "of data order and sampling")

    temperature: float = option(0.6, "sampling temperature; the ratio is taken at it too", group="sampling",
                                positive=True)
    engine: Literal["auto", "vllm", "transformers"] = option("auto", "auto is vllm where it is installed")
    tensor_parallel: int = option(1, "neighbouring ranks that share one vLLM engine", positive=True)
    vllm_memory: float = option(0.5, "vLLM's share of a GPU's memory while it samples")
    oversample: float = option(0.0, "prompts in flight beyond a step's, as a share: train on the first to finish")
    max_staleness: int = option(8, "with --oversample: steps after which a response is waited for", positive=True)
    reward_workers: int = option(2, "verifier processes on each rank", positive=True)
    reward_timeout: float = option(1.0, "processor seconds after which a verification scores 0", positive=True)

    dtype: Literal["auto", "bfloat16", "float32"] = option(
        "auto", "compute type; auto is bfloat16 where the processor has it, else float32", group="memory and speed")
    micro_batch_tokens: int = option(16384, "tokens in one forward and backward on a rank", positive=True)
    checkpoint_activations: bool = option(True, "compute activations again in the backward: saves memory")
    compile: bool = option(False, "torch.compile the softmax over the vocabulary; needs a C++ compiler")
    replicas: int = option(1, "copies of the sharded model, say one a node (HSDP)", positive=True)
    offload: bool = option(False, "keep weights and optimiser state in host memory")
    offload_between: bool = option(False, "keep them there except for the model that is being trained: faster")

    eval_every: int = option(10, "steps between evaluations on held-out problems (0: never)", group="running")
    eval_problems: int = option(256, "problems held out of the dataset, a fifth of it at most")
    eval_benchmarks: tuple[str, ...] = option((), "benchmarks of eval.py, by name or file, to evaluate on too")
    eval_samples: int = option(1, "responses per problem of a benchmark", positive=True)
    save_every: int = option(20, "steps between checkpoints (0: only when the run is told to stop)")
    keep: int = option(2, "checkpoints that are kept, the newest", positive=True)
    resume: bool = option(False, "continue from the newest checkpoint in --output, if there is one")
    deterministic: bool = option(False, "the same command gives the same numbers on the same CPU; slower")
    trust_remote_code: bool = option(False, "run model code that comes with a checkpoint")
    wandb: str | None = option(None, "log to this Weights & Biases project")

    # Where no --model is given. A model of 360k parameters wants other settings than one of 1.5 billion.
    BUILTIN: ClassVar[dict] = dict(
        steps=40, prompts_per_step=128, minibatch=32, lr=1.5e-4, critic_lr=1e-3, warmup_steps=0, clip_high=0.28,
        temperature=1.0, max_prompt_tokens=64, max_response_tokens=64, save_every=0, eval_every=5,
        dtype="float32", checkpoint_activations=False)

    def check(self):
        super().check()
        if self.wandb and not importlib.util.find_spec("wandb"):
            raise InputError("--wandb needs `pip install wandb`")
        if self.prompts_per_step % self.minibatch:
            raise InputError(
                f"--minibatch {self.minibatch} does not divide --prompts-per-step {self.prompts_per_step}; choose a "
                "divisor, or the same number for one optimiser step a rollout")
        if self.offload and self.offload_between:
            raise InputError("--offload and --offload-between: one keeps all models on the host, the other all but "
                             "one; choose")
        if self.oversample < 0 or self.oversample and self.old_logprobs != "rollout":
            raise InputError(f"--oversample {self.oversample}: must be 0 or more, and needs --old-logprobs rollout, "
                             "since one response may come from several policies")
        if not self.resume and checkpoint.existing(self.output):
            raise InputError(f"{self.output}: holds checkpoints of an earlier run; continue from them with --resume, "
                             "give another --output, or delete it")
        data.check_model(self.model, self.max_prompt_tokens + self.max_response_tokens, self.trust_remote_code)
        if self.critic_model:
            data.check_model(self.critic_model, self.max_prompt_tokens, self.trust_remote_code, "--max-prompt-tokens")

    def check_ranks(self, ranks):
        for name, size in (("--tensor-parallel", self.tensor_parallel), ("--replicas", self.replicas)):
            if ranks % size:
                raise InputError(f"{name} {size} does not divide the {ranks} ranks")

    def training_options(self):
        """What policy and critics are trained with alike: the keyword arguments of `ShardedModel`."""
        return {name: getattr(self, name) for name in (
            "weight_decay", "warmup_steps", "max_grad_norm", "dtype", "micro_batch_tokens", "checkpoint_activations",
            "offload", "offload_between", "replicas", "trust_remote_code")}


if __name__ == "__main__":
    train(TrainConfig.parse(__doc__), SPPO)
