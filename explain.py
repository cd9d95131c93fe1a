"""What `python sppo.py --explain` prints: one training step, told for two of its prompts.

    python sppo.py --explain [OPTIONS]        also grpo.py, ppo.py, spo.py, or an algorithm of your own

The script trains as always, for one step. Only its log is another: `Watch` notes what the policy and the
baseline return, and prints it in the end. Nothing is written to a file.
"""
import math
import textwrap

import torch
import torch.distributed as dist

from cli import InputError, say
from reward import decode, last_boxed

WIDTH = 100  # columns of the screen


def watch(owner, name, note):
    """From now on, each call of the method owner.name also calls note(its result, *its arguments)."""
    method = getattr(owner, name)

    def watched(*arguments):
        result = method(*arguments)
        note(result, *arguments)
        return result
    setattr(owner, name, watched)


class Ratios:
    """Notes, for the present step, each token's ratio at the moment when its gradient is taken."""

    def __init__(self, run, baseline, policy_loss):
        self.run, self.policy_loss = run, policy_loss  # sppo.py's clipped_policy_loss
        watch(baseline, "advantages", self.on_advantages)
        watch(run.policy, "forward", self.on_forward)
        watch(run.policy, "step", self.on_step)

    def on_advantages(self, advantages, batch):
        self.batch, self.advantages = batch, advantages  # [B] or [B, T]
        self.rows = {id(sequence): i for i, sequence in enumerate(batch.sequences)}
        self.logprobs, self.minibatch = {}, {}  # by the number of a response; the second counts from 0
        self.updates = []  # the metrics of each mini-batch

    def on_forward(self, result, sequences):
        if result[0].requires_grad:  # without gradient, it is pi_old that is computed
            for sequence, logprobs in zip(sequences, result[0].detach().cpu(), strict=True):
                row = self.rows[id(sequence)]
                self.logprobs[row], self.minibatch[row] = logprobs[: len(sequence[1])], len(self.updates)

    def on_step(self, metrics):
        self.updates.append(metrics)

    def old(self, row):
        """Log-probabilities under pi_old of a response with n tokens [n]."""
        old = self.batch.old_logprobs  # None with a single mini-batch: then pi_old is the policy itself
        return self.logprobs[row] if old is None else old[row, : len(self.logprobs[row])]

    def ratio(self, row):
        """pi / pi_old of each token [n]."""
        return (self.logprobs[row] - self.old(row)).exp()

    def loss(self, row):
        """(mean loss of the response's tokens, how many of them were clipped, by either clip)."""
        c, n = self.run.config, len(self.logprobs[row])
        advantage = self.advantages[row].expand(n) if self.advantages.dim() == 1 else self.advantages[row, :n]
        loss, metrics = self.policy_loss(
            self.logprobs[row][None], self.old(row)[None], advantage[None], torch.ones(1, n),
            clip_low=c.clip_low, clip_high=c.clip_high, dual_clip=c.dual_clip or None)
        clipped = metrics["clip_fraction"] + metrics.get("dual_clip_fraction", 0)
        return loss.item(), round(float(clipped) * n)


class Watch(Ratios):
    """Stands in for the log of a run, which it cuts to one step."""
    step, line = 0, {}  # of a log that has not reached its last step, no model is saved

    def __init__(self, run, baseline, policy_loss):
        if dist.get_world_size() > 1:
            raise InputError("--explain: tells of one process; leave out torchrun")
        super().__init__(run, baseline, policy_loss)
        self.baseline = baseline
        run.config.steps, run.config.eval_every, run.config.save_every = 1, 0, 0
        run.config.critic_warmup = 0  # or the policy would keep still, and there would be no loss to tell of
        run.held_out, run.benchmarks = [], {}  # nothing is evaluated

    def add(self, *metrics):
        pass

    def sampled(self, *batch):
        pass

    def write(self, step, seconds):
        pass

    def chosen(self):
        """Two responses to different prompts, whose ratio has moved: from the last mini-batch if it has two,
        clipped ones first, then those that moved far. One is right and one wrong, if there are such."""
        problems, rewards = self.batch.problems, self.batch.rewards
        rows = sorted(self.logprobs, key=lambda row: (
            -self.minibatch[row], self.loss(row)[1] == 0, -self.ratio(row).log().abs().max()))
        last = [row for row in rows if self.minibatch[row] == self.minibatch[rows[0]]]
        for candidates in (last, rows):
            others = [row for row in candidates if problems[row] != problems[rows[0]]]
            unlike = [row for row in others if rewards[row] != rewards[rows[0]]]
            if others:
                return [rows[0], (unlike or others)[0]]
        return rows[:1]

    def finish(self, tokenizer, seconds):
        """Prints everything. sppo.py calls it at the end of a run."""
        batch, last, bound = self.batch, self.updates[-1], self.run.config.max_grad_norm or math.inf
        say(f"\nOne step of {type(self.baseline).__name__}: {len(batch.responses)} responses, "
            f"{len({p.id for p in batch.problems})} prompts. What happened to two of them, in order:")
        for row in self.chosen():
            self.tell(row, tokenizer)
        say("\nTHE LAST MINI-BATCH")
        clipped, norm = f"{last['clip_fraction']:.1%} of them were clipped", last["grad_norm"]
        say(line("loss", f"{last['loss']:+.4f}, the mean over all its tokens; {clipped}"))
        say(line("gradient", f"norm {norm:.3f}, {'cut to' if norm > bound else 'below'} --max-grad-norm "
                             f"{bound:g}; then AdamW took its step"))

    def tell(self, row, tokenizer):
        """Prints what happened to one response."""
        batch, c, minibatch = self.batch, self.run.config, self.minibatch[row]
        response, answer, reward = batch.responses[row], batch.problems[row].answer, batch.rewards[row].item()
        expected, advantage, now = about(self.baseline, batch, row, self.advantages[row])
        prompt = batch.prompts[row]
        text = decode(response.ids, tokenizer, prompt)
        ending = "with its end" if response.finished else "cut off, so it earns nothing"
        box = f"{'there is none' if (box := last_boxed(text)) is None else short(box)}; "
        ratio, (loss, clipped) = self.ratio(row), self.loss(row)
        furthest = int(ratio.log().abs().argmax())
        verdict = {0: "wrong", 1: "right"}.get(reward, "partly right")
        say(f"\nRESPONSE {row + 1}, {verdict}; in mini-batch {minibatch + 1} of "
            f"{len(self.updates)}")
        for label, told in (
                ("prompt", f"{short(tokenizer.decode(prompt))} ({len(prompt)} tokens)"),
                ("response", f"{short(text)} ({len(response.ids)} tokens {ending})"),
                ("reward" if c.reward else "box",
                 f"{'' if c.reward else box}the gold answer is {short(answer)}: R = {reward:g}"),
                ("baseline", expected), ("advantage", advantage),
                ("ratio", f"pi / pi_old, after {minibatch} updates: {ratio.min():.3f} to {ratio.max():.3f}; "
                          f"{ratio[furthest]:.3f} at token {furthest + 1}, "
                          f"{tokenizer.decode(response.ids[furthest])!r}"),
                ("clipped", f"{clipped} of {len(ratio)} tokens, which have no gradient (A > 0 and ratio > "
                            f"{1 + c.clip_high:g}, or A < 0 and < {1 - c.clip_low:g})"),
                ("loss", f"{loss:+.4f}, the mean of -ratio A over its tokens, clipped"),
                ("afterwards", now)):
            say(line(label, told))


def line(label, text):
    return textwrap.fill(text, WIDTH, initial_indent=f"  {label:<11}", subsequent_indent=13 * " ",
                         max_lines=2)


def short(text):
    """At most 110 characters, on one line."""
    text = text.replace("\n", " | ")
    return text if len(text) <= 110 else f"{text[:65]} ... {text[-40:]}"


def about(baseline, batch, row, advantage):
    """Three sentences: what the baseline expected of a response, its advantage, and what it expects now."""
    kind, reward, n = type(baseline).__name__, batch.rewards[row].item(), len(batch.responses[row].ids)
    each, nothing = ", the same for all its tokens", "this baseline learns nothing"
    if kind == "SPPO":
        before = baseline.values[row]
        now = baseline.critic.logits([baseline.prompts[row]])[0].sigmoid()
        return (f"V(prompt) = {before:.3f}: so far, the critic knows only the step's mean reward",
                f"A = R - V = {reward:g} - {before:.3f} = {advantage:+.3f}{each}",
                f"V(prompt) = {now:.3f}: the critic has learned from the step's rewards")
    if kind == "PPO":
        def along(values, form):
            places = zip(("first token", "middle", "last"), (0, n // 2, n - 1), strict=True)
            return ", ".join(f"{values[t]:{form}} at the {place}" for place, t in places)
        now = baseline.critic.values([batch.sequences[row]])[0]
        return (f"V(s_t) = {along(baseline.values[row], '.3f')}",
                f"R - V(s_t) by GAE, then whitened: {along(advantage, '+.3f')}",
                f"V(s_t) = {along(now, '.3f')}")
    if kind == "SPO":
        before, now = baseline.values[row], baseline.tracker.values([batch.problems[row].id])[0]
        return (f"v = {before:.3f}, remembered of this prompt",
                f"R - v = {reward - before:+.3f}; normalised over the step: A = {advantage:+.3f}{each}",
                f"v = {now:.3f}: the tracker has counted this reward")
    if kind == "ReMax":
        greedy = batch.greedy_rewards[row].item()
        return (f"the greedy response to this prompt earned {greedy}",
                f"A = R - R(greedy) = {reward:g} - {greedy:g} = {advantage:+g}{each}", nothing)
    if kind in ("GRPO", "RLOO"):
        size = baseline.samples_per_prompt
        group = batch.rewards[row // size * size :][:size]
        mean, others = group.mean(), (group.sum() - reward) / (size - 1)
        return (f"the {size} responses to this prompt earned {' '.join(f'{r:g}' for r in group.tolist())}",
                (f"A = R - mean of the others = {reward:g} - {others:.3f}" if kind == "RLOO" else
                 f"A = (R - mean) / std = ({reward:g} - {mean:.3f}) / {group.std():.3f}"
                 if baseline.run.config.normalize else f"A = R - mean = {reward:g} - {mean:.3f}")
                + f" = {advantage:+.3f}{each}", nothing)
    told = "this baseline keeps no `values`"
    if baseline.values is not None:
        told = ("V = {:.3f}" if baseline.values.dim() == 1 else "V of the first token = {:.3f}").format(
            baseline.values[row].flatten()[0])
    told_advantage = (f"A = {advantage:+.3f}{each}" if advantage.dim() == 0 else
                      f"A = {advantage[:n].mean():+.3f}, the mean over its tokens")
    return told, told_advantage, f"see {kind}.update"
