"""SPPO: Sequence-Level PPO for reasoning models (arXiv 2604.08865), top to bottom.

    python sppo.py                            the built-in model learns, on a laptop
    python sppo.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset FILE.jsonl      your problems and answers
    torchrun --nproc-per-node 8 sppo.py --model deepseek-ai/DeepSeek-R1-Distill-Qwen-7B --dataset ...

Sample *one* response y for each prompt s and verify it: R is 1 or 0. Then subtract what a scalar critic
expected, which reads the prompt alone. So the whole response has one advantage, as if it were one action.
Ratio and clip are per token, as in PPO:

    A = R - V(s)                                   the same for every token of y; not normalised
    r_t = pi(y_t | s, y_<t) / pi_old(y_t | s, y_<t)
    maximise  min(r_t A, clip(r_t, 1 - eps, 1 + eps) A)      averaged over all tokens of the mini-batch
              where A < 0: the larger of this and 3 A        (the dual clip, --dual-clip)
    fit V with binary cross-entropy against R

This is the paper's algorithm. For the built-in model, some settings differ (`BUILTIN` in config.py).

There is no group of samples per prompt as in GRPO, and no value per token as in PPO. There is no KL penalty
either, and so no reference model: a program checks each answer, so there is no learned reward model that the
policy could exploit. The paper's runs of SPPO have none. (What a response says before its answer is not
checked.)

Read in this order: the mathematics, `SPPO`, `training_loop` and `policy_step`, all in this file;
docs/one-step.md follows one step through them, with numbers. Then critic.py, policy.py, sharded.py,
rollout.py, engines.py, reward.py. The other algorithms (grpo.py, ppo.py, spo.py) import the loop from here
and define their own baseline.
"""
import contextlib
import os
import shutil
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

import checkpoint
import data
from cli import InputError, clear_errors, is_main, replace_file, run_of, say
from config import TrainConfig
from critic import PromptCritic, value_metrics
from engines import make_engine
from eval import evaluate_policy, load_eval_benchmarks
from inflight import InFlight
from log import Clock, Log
from machine import check_ranks, compute_dtype, from_rank_0, init_distributed, load_tokenizer, seed_torch
from policy import Policy
from reward import Verifier
from rollout import Sampler, make_verifier
from sharded import mean_of, rows_like

# ---- the mathematics ---------------------------------------------------------------------------------------

def sequence_advantages(rewards, value_logits):
    """A = R - V(s), V = sigmoid(logit): one number per response (arXiv 2604.08865). Both [B] -> [B]."""
    return rewards - value_logits.sigmoid()


def decayed(lr, step, steps, decay):
    """The policy's learning rate in a step, from 1 to `steps`: lr, and over the last `decay` (0 to 1) of the
    steps a straight line from it towards 0, because smaller last updates leave less noise in the weights.
    decay 0: always lr."""
    left = (steps - step + 1) / steps  # the share of the run that is left, this step included: never 0
    return lr * min(1.0, left / decay) if decay else lr


def weigh_sequences(advantages, lengths):
    """Scales advantages [B] or [B, T] for `--loss-mean sequence`, so that each response counts the same in
    the loss, whatever its length. Without this, each token counts the same. lengths [B]."""
    weights = lengths.float().mean() / lengths
    return advantages * (weights if advantages.dim() == 1 else weights[:, None])


def clipped_policy_loss(logprobs, old_logprobs, advantages, mask, *, clip_low=0.2, clip_high=0.2,
                        dual_clip=3.0, num_tokens=None):
    """PPO's clipped surrogate, per token (arXiv 1707.06347, eq. 7):
    -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A).

    logprobs, old_logprobs [B, T]; advantages [B] (every token of a response has the same) or [B, T];
    mask [B, T] is 1 on response tokens. `dual_clip` bounds the objective from below by dual_clip * A
    where A < 0, so that one token that became far more likely cannot dominate a batch (arXiv
    1912.09729); None turns the bound off.
    Returns (loss, metrics): means over the mask, or sums divided by `num_tokens` where it is given.
    For a mini-batch in several micro-batches it is the count of all of them: then losses and metrics
    simply add up.
    """
    mask = mask.to(logprobs.dtype)
    advantages = advantages.to(logprobs.dtype)
    if advantages.dim() == 1:
        advantages = advantages[:, None]  # [B, 1]: the same for all tokens of a response
    num_tokens = mask.sum() if num_tokens is None else num_tokens
    log_ratio = (logprobs - old_logprobs) * mask  # 0 beyond a response's end
    ratio = log_ratio.clamp(-20, 20).exp()  # bounded, because exp(89) is infinite in float32
    unclipped, clipped = ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    # The smaller of the two: when the ratio has left the clip range in the direction that A asks for, the
    # objective is constant and the token has no gradient. In the other direction it has one, so that a
    # wrong move can be undone.
    objective = torch.minimum(unclipped, clipped)
    if dual_clip is not None:
        objective = torch.where(advantages < 0, torch.maximum(objective, dual_clip * advantages), objective)
    loss = -(objective * mask).sum() / num_tokens
    with torch.no_grad():
        def mean(x):
            return (x * mask).sum() / num_tokens
        metrics = {"clip_fraction": mean(clipped < unclipped),  # the minimum is the clipped one: no gradient
                   "kl": mean(ratio - 1 - log_ratio)}  # an estimate of KL(pi_old || pi)
        if dual_clip is not None:
            metrics["dual_clip_fraction"] = mean((advantages < 0) & (unclipped < dual_clip * advantages))
    return loss, metrics


def rollout_weights(old_logprobs, rollout_logprobs, mask, cap):
    """min(pi_old / pi_rollout, cap) of each token: truncated importance sampling (Yao et al. 2025,
    fengyao.notion.site/off-policy-rl).

    The engine samples from pi_rollout, which has the policy's weights but other kernels and roundings, and so
    draws some tokens more often than pi_old would, and others less often. These weights make up for it. The
    cap bounds what a single token can weigh. All three [B, T], mask 1 on response tokens -> [B, T], without
    gradient, 1 beyond a response's end.
    """
    log_ratio = ((old_logprobs - rollout_logprobs) * mask).detach()
    return log_ratio.exp().clamp(max=cap)


# ---- baselines: what is subtracted from the reward ---------------------------------------------------------

@dataclass
class Run:
    """The parts of a run, which `run_training` puts together. Loop, baselines and checkpoints use them."""
    config: TrainConfig  # the options
    device: torch.device  # this rank's
    tokenizer: object  # the policy's
    problems: list[data.Problem]  # to train on
    held_out: list[data.Problem]  # only evaluated on
    dropped: dict  # the rows of the dataset whose gold answer cannot be verified
    benchmarks: dict[str, list[data.Problem]]  # of --eval-benchmarks
    verifier: Verifier  # response, gold answer -> reward
    policy: Policy  # the model that is trained
    clock: Clock  # seconds of training, by phase
    closing: contextlib.ExitStack  # what is ended with the run, whether it succeeds or not
    # Made after the baseline:
    engine: object = None  # samples: vLLM, or transformers
    sampler: Sampler | None = None  # problems -> verified Batch
    in_flight: InFlight | None = None  # the same for --oversample


class Baseline:
    """What differs between algorithms. A new one defines `advantages`. If it learns, it also defines
    `update`, and `state_dict` with `load_state_dict`: else --resume starts what it has learned anew."""
    samples_per_prompt = 1
    wants_greedy = False  # also sample each prompt's greedy response, in the same pass of the engine
    critic = None  # a ShardedModel that this baseline trains, if it does
    values = None  # [B] or [B, T]: what was expected of the last batch; samples.jsonl and --explain show it

    def __init__(self, run):
        self.run = run  # a Run

    def next_problems(self, first, count):
        """Problems number `first` to `first + count` of the run: by default each once an epoch, shuffled."""
        return data.shuffled_epochs(self.run.problems, first, count, self.run.config.seed)

    def advantages(self, batch):
        """What the policy loss multiplies: [B], or [B, T] for an algorithm with a value per token. What
        `update` will need of this batch, such as V, may be kept on self."""
        raise NotImplementedError

    def update(self, batch):
        """Learns from the batch that `advantages` has seen, after the policy did. Returns metrics."""
        return {}

    def expect(self, problems):
        """For --oversample: a number for each problem, asked when its response starts; it comes back as
        `batch.expected`. SPPO gives logits, SPO gives chances."""
        return [None] * len(problems)

    def state_dict(self):
        """What a checkpoint must keep, by name: tensors, and values that JSON can hold. (JSON turns the keys
        of a dictionary into text, and tuples into lists: `load_state_dict` gets them so.)"""
        return self.critic.state_dict() if self.critic else {}

    def load_state_dict(self, state):
        """Restores what `state_dict` returned. Sharded tensors (a critic's) are already filled in place."""
        if self.critic:
            self.critic.load_state_dict(state)


class SPPO(Baseline):
    """One sample per prompt; the baseline is a scalar critic's expectation."""

    def __init__(self, run):
        super().__init__(run)
        c = run.config
        model = c.critic_model or c.model
        self.critic = PromptCritic(model, run.device, **c.critic_options())
        self.critic.check_rows(model, c.max_prompt_tokens)

    def advantages(self, batch):
        if not self.critic.num_updates:  # in the first step, V becomes the mean of these rewards everywhere
            self.critic.start_from(batch.rewards)
        self.prompts = self.critic.encode(batch.problems)
        # It is V before this step's update, so it has not seen these rewards.
        logits = batch.expected  # with --oversample: from when these responses were started
        if logits is None:
            logits = self.critic.logits(self.prompts)
        self.values = logits.sigmoid()  # V: for `update`, and for samples.jsonl
        return sequence_advantages(batch.rewards, logits)

    def update(self, batch):
        before = value_metrics(self.values, batch.rewards)
        return {**before, **self.critic.update(self.prompts, batch.rewards)}

    def expect(self, problems):
        if not self.critic.num_updates:
            return [0.0] * len(problems)  # V = 1/2. To compute it, the critic would need memory that vLLM has
        return self.critic.logits(self.critic.encode(problems)).tolist()


def checked_advantages(baseline, batch):
    """The baseline's, without gradient. Raises InputError if they do not fit the batch."""
    rewards = batch.rewards.clone()
    advantages = baseline.advantages(batch)
    name, shape = type(baseline).__name__, getattr(advantages, "shape", type(advantages).__name__)
    if shape not in (batch.rewards.shape, batch.mask.shape):
        raise InputError(f"{name}.advantages gave {shape}; it must give a tensor of {batch.rewards.shape} or "
                         f"{batch.mask.shape}")
    if not torch.equal(rewards, batch.rewards):
        raise InputError(f"{name}.advantages changed batch.rewards; give a new tensor: batch.rewards - ...")
    return advantages.detach() if advantages.is_floating_point() else advantages.float()


# ---- the loop ----------------------------------------------------------------------------------------------

def training_loop(run, baseline, log, last_step):
    """Trains run.policy from the step after `last_step` on. `run_training`, below, puts the parts of `run`
    together."""
    c, policy, engine, clock = run.config, run.policy, run.engine, run.clock
    stop = run.closing.enter_context(checkpoint.Stop())
    engine.sync(policy.weights())  # wakes the engine. From here on it sleeps only while the models train
    if not last_step:
        evaluate_policy(run, log, 0)
    for step in range(last_step + 1, c.steps + 1):
        clock.start_step()
        run.sampler.random.seed(f"{c.seed}/{step}")  # with --deterministic, a resumed run samples the same

        # 1. Sample responses from the current policy, and verify them.
        if c.oversample:
            batch = run.in_flight.sample(baseline, step)
        else:
            problems = baseline.next_problems((step - 1) * c.prompts_per_step, c.prompts_per_step)
            batch = run.sampler.sample(problems, baseline.samples_per_prompt, baseline.wants_greedy)
        engine.sleep()
        if step == last_step + 1:
            policy.check_engine(batch, engine, continued=bool(c.oversample and last_step))

        # 2. pi_old, for the ratio. There is nothing to compute with one mini-batch, because then pi_old is
        # the policy itself, nor in --critic-warmup, because then the policy takes no step.
        minibatch_size = c.minibatch * baseline.samples_per_prompt  # responses in a mini-batch
        with clock("logprobs"):
            if c.old_logprobs == "rollout":
                batch.old_logprobs = batch.rollout_logprobs
            elif minibatch_size < len(batch.responses) and step > c.critic_warmup:
                batch.old_logprobs = policy.logprobs(batch.sequences)

        # 3. The advantage: the reward minus the baseline.
        with clock("critic"):
            advantages = checked_advantages(baseline, batch)

        # 4. One epoch of clipped policy steps. In the first --critic-warmup steps, only the critic learns.
        rows, losses = range(len(batch.responses)), []
        with clock("update"), policy.on_device():
            policy.optimizer.param_groups[0]["lr"] = decayed(c.lr, step, c.steps, c.lr_decay)
            for start in rows[::minibatch_size] if step > c.critic_warmup else ():
                minibatch = rows[start : start + minibatch_size]
                losses.append(policy_step(policy, batch, minibatch, advantages, c))

        # 5. The baseline learns from what happened.
        with clock("critic"):
            learned = baseline.update(batch)
            if step == last_step + 1:
                checkpoint.check_state(baseline)  # can what it has learned be saved?
        if c.oversample:  # asks V of the next prompts while the engine sleeps: the critic needs memory
            run.in_flight.start(baseline, step + 1)

        # 6. The engine takes the new weights.
        with clock("sync"):
            engine.sync(policy.weights())
        clock.end_step()

        # 7. The end: the log, at times an evaluation, and a checkpoint to continue from.
        log.add(batch.metrics(advantages), run.sampler.metrics, mean_of(losses), learned, clock.phases)
        log.sampled(batch, advantages, baseline.values, run.tokenizer)
        if c.eval_every and (step % c.eval_every == 0 or step == c.steps):
            evaluate_policy(run, log, step)
        log.write(step, clock.total)
        stopping = stop.on_any_rank() and step < c.steps
        if stopping or (c.save_every and (step % c.save_every == 0 or step == c.steps)):
            saved = checkpoint.save(run, baseline, log, step)
            if stopping and not saved:
                raise InputError(f"{c.output}: stopped after step {step}, with no room for its checkpoint")
        if stopping:
            break


def policy_step(policy, batch, rows, advantages, config):
    """One optimiser step on the mini-batch `rows` (numbers of responses). advantages [B] or [B, T].

    Returns metrics: the loss over all tokens, the others over those of responses that have a gradient.
    """
    rows = list(rows)
    if config.loss_mean == "sequence":
        advantages = advantages.clone()
        advantages[rows] = weigh_sequences(advantages[rows], batch.lengths[rows])
    # Responses without advantage have no gradient and are left out: in GRPO, groups with equal rewards. If
    # none is left, one is kept, because every rank must come to the optimiser step.
    kept = [i for i in rows if advantages[i].any()] or rows[:1]
    kept_tokens, all_tokens = batch.mask[kept].sum(), batch.mask[rows].sum()
    for places in policy.micro_batches([sum(map(len, batch.sequences[i])) for i in kept]):
        micro = [kept[place] for place in places]  # numbers of responses
        logprobs, entropy = policy.forward([batch.sequences[i] for i in micro])  # [b, t], with gradient
        rollout, mask, advantage = (rows_like(logprobs, micro, x)
                                    for x in (batch.rollout_logprobs, batch.mask, advantages))
        old = logprobs.detach()  # if pi_old is pi: the ratio is 1, and only its gradient matters
        if batch.old_logprobs is not None:
            old = rows_like(logprobs, micro, batch.old_logprobs)
        if config.rollout_correction:
            weights = rollout_weights(old, rollout, mask, config.rollout_correction)
            # A token's term of the loss is proportional to its advantage, so this is the same as to weigh it.
            advantage = weights * (advantage if advantage.dim() == 2 else advantage[:, None])
        loss, metrics = clipped_policy_loss(logprobs, old, advantage, mask, clip_low=config.clip_low,
                                            clip_high=config.clip_high, dual_clip=config.dual_clip or None,
                                            num_tokens=kept_tokens)
        metrics["entropy"] = (entropy * mask).sum() / kept_tokens
        # Engine and trainer compute the same, so a gap larger than rounding is a bug. But with
        # --old-logprobs rollout, this also holds how far the policy has moved since the tokens were sampled.
        trainer = logprobs.detach() if config.old_logprobs == "rollout" else old
        metrics["rollout_gap"] = ((trainer - rollout).abs() * mask).sum() / kept_tokens
        if config.rollout_correction:
            at_cap = weights == config.rollout_correction
            metrics["rollout_truncated"] = (at_cap * mask).sum() / kept_tokens
        # So far, loss and metrics are means over the tokens of `kept`. The loss becomes the mean over all of
        # the mini-batch's tokens: those left out add nothing to it, but count.
        policy.backward(loss * (kept_tokens / all_tokens), metrics)
    return {f"policy/{name}": value for name, value in policy.step().items()}


@record  # so that torchrun ends what it prints with the error that came first
def train(config, make_baseline):
    """Trains `config.model`. `make_baseline(run)` builds the algorithm: `SPPO`, or another `Baseline`.

    Returns (the last line of metrics.jsonl as a dictionary, the trained model's folder). The first is empty
    on all ranks but 0; the second is None if the run was stopped. Raises InputError for what a user can put
    right. From a notebook:

        from sppo import SPPO, TrainConfig, train
        config = TrainConfig(model="Qwen/Qwen2.5-0.5B-Instruct", dataset="my.jsonl", output="runs/mine")
        metrics, folder = train(config, SPPO)
    """
    with contextlib.ExitStack() as closing:
        try:
            return run_training(config, make_baseline, closing)
        except BaseException:
            if dist.is_initialized() and dist.get_world_size() > 1:
                closing.pop_all()  # torchrun ends all ranks; closing could wait for the others for ever
            raise


def run_training(c, make_baseline, closing):
    """Puts the parts of a run together, trains, and saves. What must be ended with the run goes into
    `closing`, which ends the last first."""
    c.check()
    say(f"Loading {c.model}, {c.dataset} and the engine: seconds for small models, minutes for large ones.")
    tokenizer = load_tokenizer(c.model, c.trust_remote_code)
    verifier = make_verifier(c)  # response, gold answer -> reward in [0, 1]
    closing.callback(verifier.close)
    device = init_distributed()  # every rank runs this same function, on a GPU of its own
    closing.callback(lambda: dist.is_initialized() and dist.destroy_process_group())
    check_ranks(tensor_parallel=c.tensor_parallel, replicas=c.replicas)
    # Problems are chat messages and gold answers. Those held out are only evaluated on.
    problems, held_out = from_rank_0(lambda: data.training_problems(c, tokenizer))
    benchmarks = load_eval_benchmarks(c, tokenizer)  # for --eval-benchmarks
    c.dtype = compute_dtype(c.dtype, device)
    dropped = data.drop_unverifiable(problems, held_out, verifier, c)
    seed_torch(c.seed, c.deterministic)
    policy = Policy(c.model, device, temperature=c.temperature, **c.training_options())
    policy.check_rows(c.model, c.max_prompt_tokens + c.max_response_tokens)
    policy.check_saving(tokenizer)
    run = Run(c, device, tokenizer, problems, held_out, dropped, benchmarks, verifier, policy, Clock(device),
              closing)
    baseline = make_baseline(run)
    checkpoint.check_state(baseline)
    if c.oversample and (baseline.samples_per_prompt > 1 or baseline.wants_greedy):
        raise InputError(f"--oversample {c.oversample}: {type(baseline).__name__} compares the responses to "
                         "a prompt, so it must wait for all of them; leave it out")
    # The engine comes last: on a GPU it takes what the models leave free, as it will when they have trained.
    run.engine = make_engine(c, c.model, tokenizer, device, c.max_prompt_tokens + c.max_response_tokens)
    closing.callback(run.engine.close)  # before the process group, which vLLM may end itself
    run.engine.sleep()
    run.sampler = Sampler(c, tokenizer, run.engine, verifier, run.clock)
    run.in_flight = InFlight(c, run.sampler, problems)
    last_step, log = begin(run, baseline)  # with --resume, from the newest checkpoint
    training_loop(run, baseline, log, last_step)
    return finish(run, log)


def begin(run, baseline):
    """(the step after which the run resumes, or 0; its Log). Until then, nothing is written
    into the output folder."""
    c = run.config
    if c.explain:  # another log, and nothing is written
        from explain import Watch
        return 0, Watch(run, baseline, clipped_policy_loss)

    def lock():  # an open file: until it is closed with the run, it keeps other runs out of the folder
        if is_main():
            run.closing.enter_context(checkpoint.lock(c.output))

    log = None

    def start_files():
        nonlocal log
        log = Log(c, step)
        if is_main():  # eval.py evaluates the trained model on what was held out here
            data.write_split(run.problems, run.held_out, run.dropped, c, resumed=step > 0)

    if error := checkpoint.first_disk_error(lock):
        raise InputError(f"{c.output}: {error}")
    step = checkpoint.resume(run, baseline)
    # A baseline that defines `update` alone may have learned what no checkpoint holds.
    own = [getattr(type(baseline), name) is not getattr(Baseline, name) for name in ("update", "state_dict")]
    if step and own == [True, False] and not baseline.critic:
        say(f"warning: {type(baseline).__name__} has no `state_dict`, so what `update` had learned is lost")
    earlier = c.output if step else run_of(c.model)  # a run that trained this policy
    seen = from_rank_0(lambda: data.trained_on(earlier, run.held_out, c, before=not step)) if earlier else 0
    if seen:
        about = (f"{earlier} or a run before it has trained on {seen} of the {len(run.held_out)} problems to "
                 "be held out now; give the --seed and --eval-problems that it had (and the same code)")
        if step:
            raise InputError(about)
        say(f"warning: {about}, or accuracy will be too high")
    if error := checkpoint.first_disk_error(start_files):
        raise InputError(f"{c.output}: cannot be written ({error})")
    say(f"{type(run.policy.module.lm).__name__}, {run.policy.size / 1e6:,.2f}M parameters, from {c.model}; "
        f"{c.dtype}; engine {run.engine.name}; {dist.get_world_size()} x {run.device.type}; "
        f"{len(run.problems):,} problems of {c.dataset}, {len(run.held_out)} more held out")
    return step, log


def finish(run, log):
    """Saves the model for transformers and vLLM, and says what happened. Returns what `train` does."""
    c, folder = run.config, f"{run.config.output}/model"
    partial = f"{folder}.partial"  # a run that is killed here leaves nothing that looks like a model

    def complete():
        if is_main():
            run.tokenizer.save_pretrained(partial)
            replace_file(f"{partial}/step", f"{log.step}")  # a run that goes on is ahead of its model
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(partial, folder)

    if log.step == c.steps:
        actions = log.sync, lambda: run.policy.save(partial), complete
        error = next(filter(None, map(checkpoint.first_disk_error, actions)), None)
        if error:
            advice = ("make room, and run the same command with --resume" if checkpoint.existing(c.output)
                      else "there is no checkpoint: this training is lost")
            raise InputError(f"{folder}: the trained model could not be saved ({error}); {advice}")
    log.finish(run.tokenizer, run.clock.total)
    return log.line, folder if log.step == c.steps else None


if __name__ == "__main__":
    with clear_errors():
        train(TrainConfig.parse(__doc__), SPPO)
