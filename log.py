"""What a run tells: how long its phases take, how far it is, and what it measured and sampled in each step.

    OUTPUT/metrics.jsonl    an object a step: all that was measured (docs/running.md explains each)
    OUTPUT/samples.jsonl    an object a response: the first of each step, with reward, V and advantage
    OUTPUT/curves.png       metrics.jsonl as curves, drawn when the run ends

`Clock` measures the phases of a step. `progress` draws the running phase on a terminal. `Log` writes the
files and a line a step, and sends the same to TensorBoard or Weights & Biases. Nothing here changes what is
trained, and only rank 0 writes.
"""
import contextlib
import dataclasses
import json
import math
import os
import secrets
import textwrap
import time
from pathlib import Path

import torch
from tqdm import tqdm

from cli import BUILTIN_MODEL, InputError, is_main, replace_file, say
from reward import decode

# ---- time --------------------------------------------------------------------------------------------------

class Clock:
    """Seconds of training: `total`, and in `phases` those of a step, by metric. What happens between steps
    (evaluation, saving) is not counted."""

    def __init__(self, device):
        self.device, self.total, self.phases = device, 0.0, {}

    def now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # kernels run asynchronously, or they would count for the next phase
        return time.perf_counter()

    def start_step(self):
        self.phases, self.started = {}, self.now()

    def end_step(self):
        self.phases["time/step"] = self.now() - self.started
        self.total += self.phases["time/step"]

    @contextlib.contextmanager
    def __call__(self, phase, rows=None):
        """`with clock("update"): ...` adds the seconds of its body to that phase. rows: for `Progress`."""
        start = self.now()
        with progress.phase(phase, rows):
            yield
        self.phases[f"time/{phase}"] = self.phases.get(f"time/{phase}", 0.0) + self.now() - start


class Progress:
    """What the running phase has done so far: a line on rank 0's terminal, after ten seconds, until it ends.

    Whoever does the work calls `add`, and need not know whether anybody looks.
    """
    bar, tokens, since = tqdm(disable=True), 0, 0.0

    @contextlib.contextmanager
    def phase(self, name, rows=None, **options):
        """rows: how many responses (or prompts) this rank will do, if that is known. options: tqdm's."""
        self.tokens, self.since = 0, time.monotonic()
        options = dict(leave=False, delay=10, disable=None if is_main() else True) | options
        with tqdm(desc=name, total=rows, unit="row", dynamic_ncols=True, miniters=0, **options) as self.bar:
            yield self.bar

    def add(self, rows=0, tokens=0):
        self.tokens += tokens
        seconds = max(time.monotonic() - self.since, 1e-3)
        self.bar.set_postfix_str(f"{self.tokens / seconds:,.0f} tokens/s", refresh=False)
        self.bar.update(rows)  # draws at most ten times a second


progress = Progress()


# ---- what a run prints and writes --------------------------------------------------------------------------

# The columns of a step's line: label, metric, format. A step without a metric has no such column.
COLUMNS = (
    ("reward", "reward", ".3f"), ("length", "response_tokens", ".1f"),
    ("clip", "policy/clip_fraction", ".3f"), ("critic", "critic/loss", ".3f"),
    ("auc", "critic/auc", ".2f"), ("skill", "critic/skill", ".2f"), ("all equal", "group/all_equal", ".2f"),
    ("seconds", "time/step", ".1f"), ("accuracy", "eval_accuracy", ".3f"))
# In the first line only: it shows at once whether engine and trainer compute the same.
FIRST_COLUMNS = (*COLUMNS[:3], ("gap", "policy/rollout_gap", ".0e"), *COLUMNS[3:])
HOPELESS = 5  # steps with nothing to learn from, until a warning says so


class Lines:
    """A file with a JSON object a line, each of which names its step.

    resumed_after: the last step of the checkpoint that the run resumes from. What an earlier process wrote
    about later steps is removed, since these steps are trained again.
    """

    def __init__(self, path, resumed_after):
        self.path, self.file, self.unwritten = path, path.open("ab", buffering=0), b""
        self.last_step = -1  # that an earlier process has written, also if it is removed here
        kept = 0  # bytes; a new run begins an empty file
        with path.open("rb") as lines:
            for line in lines if resumed_after else ():
                if not line.endswith(b"\n"):  # cut when the run was killed: it is of a later step
                    break
                self.last_step = json.loads(line)["step"]
                kept += len(line) if self.last_step <= resumed_after else 0
        self.file.truncate(kept)  # one call: a kill leaves the longer file or the shorter one

    def read(self):
        return [json.loads(line) for line in self.path.read_bytes().splitlines()]

    def write(self, *objects):
        self.unwritten += b"".join(json.dumps(line).encode() + b"\n" for line in objects)
        try:
            self._write()
        except OSError as error:
            say(f"warning: {self.path.name} cannot be written ({error}); the next step tries again")

    def _write(self):
        """Writes what is not written yet. A full disk may take a part; the rest is kept for the next time."""
        while self.unwritten:
            self.unwritten = self.unwritten[self.file.write(self.unwritten) :]

    def sync(self):
        """Returns when everything so far is on the disk; raises OSError if it cannot be written."""
        self._write()
        os.fsync(self.file.fileno())


class Log:
    """Collects a step's metrics and samples, prints a line of them, and writes them to files and boards.

    resumed_after: the last step of the checkpoint that the run resumes from, or 0.
    """

    def __init__(self, config, resumed_after=0):
        # warned: the warnings that hold now, so that each is printed once
        self.config, self.step, self.metrics, self.warned = config, resumed_after, {}, set()
        self.first, self.last = None, None  # the first evaluation's metrics, the last one's Batch
        self.responses = 0  # of the last step
        self.samples, self.line = [], {}  # of the present step; what metrics.jsonl says of the last one
        self.columns = FIRST_COLUMNS
        if not is_main():
            return
        folder = Path(config.output)
        replace_file(folder / "config.json", json.dumps(dataclasses.asdict(config), indent=2) + "\n")
        self.lines = Lines(folder / "metrics.jsonl", resumed_after)
        self.sample_lines = Lines(folder / "samples.jsonl", resumed_after)
        earlier = self.lines.read()
        self.line = earlier[-1] if earlier else {}
        self.first = next((line for line in earlier if "eval_accuracy" in line), None)
        self.rewards = [line["reward"] for line in earlier if "reward" in line]  # each step's mean
        self.gaps = [gap for line in earlier if (gap := line.get("policy/rollout_gap")) is not None][:1]
        self.boards = [board(config, self.lines.last_step) for board, wanted in (
            (TensorBoard, config.tensorboard), (WandB, config.wandb)) if wanted]
        self.bar = tqdm(total=config.steps, disable=None, unit="step", leave=False, dynamic_ncols=True)

    def add(self, *metrics):
        for part in metrics:  # a baseline's may be tensors or numpy's numbers, or None: it has none
            for name, value in (part or {}).items():
                if math.prod(getattr(value, "shape", ())) > 1:
                    raise InputError(f"the metric {name} has shape {tuple(value.shape)}; give one number")
                self.metrics[name] = value.item() if hasattr(value, "item") else value

    def sampled(self, batch, advantages, values, tokenizer):
        """Takes a step's Batch. advantages [B] or [B, T]; values [B], [B, T] or None: what the baseline
        expected."""
        self.responses = len(batch.responses)
        if is_main():
            count = self.config.samples
            rows = range(len(batch.responses))[: None if count == "all" else int(count)]
            self.samples = [sample(batch, row, advantages, values, tokenizer) for row in rows]

    def evaluated(self, step, batch, tokenizer):
        """Takes an evaluation's Batch. That of step 0 also shows what the untrained model writes."""
        self.last = batch
        self.metrics["eval_accuracy"] = batch.rewards.mean().item()
        self.metrics["eval_response_tokens"] = batch.lengths.float().mean().item()
        if step == 0:
            self.first = self.metrics
            show_samples("Before training:", batch, tokenizer, self.config.reward)

    def write(self, step, seconds):
        """Ends a step: its metrics become a line on the screen and an object in metrics.jsonl."""
        self.step = step
        if is_main():
            line = {"step": step, "seconds": seconds, **self.metrics}
            if "reward" in line:
                if "critic/bce" in line:
                    line["critic/skill"] = skill(line["critic/bce"], line["reward"], self.rewards)
                self.rewards.append(line["reward"])
            line, *samples = map(finite, (line, *({"step": step, **s} for s in self.samples)))
            self.lines.write(line)
            self.sample_lines.write(*samples)
            self._send(step, line, samples)
            self._warn(line)
            text = [f"step {step:>{len(str(self.config.steps))}}/{self.config.steps}"]
            own = {"accuracy": "mean reward"} if self.config.reward else {}
            text += [f"{own.get(label, label)} {line[metric]:{form}}" for label, metric, form in self.columns
                     if line.get(metric) is not None]
            if len(text) > 1:  # step 0 has nothing to tell where nothing is evaluated
                say("  ".join(text))
            if "reward" in line:
                self.columns = COLUMNS
            if "eval_accuracy" in line and samples:
                say(shown(samples[0], self.config.reward))
            self.bar.update(step - self.bar.n)
            self.line = line
        self.metrics, self.samples = {}, []

    def sync(self):
        """Returns when everything so far is on the disk; raises OSError if it cannot be written."""
        if is_main():
            self.lines.sync()
            self.sample_lines.sync()

    def finish(self, tokenizer, seconds):
        """Ends the run: samples again, one paragraph on what happened and what to do next, and the curves."""
        if not is_main():
            return
        self.bar.close()
        for board in self.boards:
            board.close()
        c = self.config
        if self.step < c.steps:
            say(f"Stopped after step {self.step}, as asked. To continue, run the same command with --resume.")
            return
        text = f"Trained {c.model} for {c.steps} steps in {seconds:.0f} s of training."
        if self.first and self.last:
            show_samples("After training:", self.last, tokenizer, c.reward)
            accuracy, length = self.first["eval_accuracy"], self.first["eval_response_tokens"]
            rewards = self.last.rewards
            error = rewards.std(correction=0) / len(rewards) ** 0.5
            what = "the mean reward" if c.reward else "accuracy"
            text += (f" On {len(rewards)} held-out problems, {what} went from {accuracy:.3f} to "
                     f"{rewards.mean():.3f} ± {error:.3f} (its standard error), and the mean response from "
                     f"{length:.1f} to {self.last.lengths.float().mean():.1f} tokens.")
        text += (f" The model is in {c.output}/model, for transformers and vllm to load; all metrics are in "
                 f"{c.output}/metrics.jsonl, and responses of each step in {c.output}/samples.jsonl.")
        if c.model == BUILTIN_MODEL:
            text += (" Next: read sppo.py, change what it subtracts from the reward, and run it with another "
                     "--output; or train your own model with --model and --dataset (see the README).")
        say("\n".join(textwrap.wrap(text, 100, break_on_hyphens=False)))
        try:
            from curves import draw  # here, for matplotlib takes a second, which a run need not wait for
            say(f"Curves: {draw([c.output])}")
        except Exception as error:  # no matplotlib, a full disk, ...: the model is trained all the same
            say(f"warning: the curves could not be drawn ({error}); try python -m tools.curves {c.output}")

    def _send(self, step, line, samples):
        """To the boards. One that fails gets nothing more: it is no reason to end a training run."""
        numbers = {name: value for name, value in line.items() if value is not None and name != "step"}
        for board in [*self.boards]:
            try:
                board.send(step, numbers, samples)
            except Exception as error:  # whatever a network, a disk or a library can raise
                say(f"warning: {type(board).__name__} takes no more ({error})")
                self.boards.remove(board)

    def _warn(self, line):
        """Prints what looks wrong, once for as long as it lasts."""
        cut_off, limit = line.get("truncated", 0), self.config.max_response_tokens
        skipped = line.get("policy/skipped") or line.get("critic/skipped")
        empty = line.get("response_tokens", 2) < 1.5
        gap = line.get("policy/rollout_gap") or 0.0
        self.gaps = self.gaps or [gap] if gap else []  # the first, against which later ones are held
        # Below 0.02, a gap of one part in fifty of a probability, it is rounding, whatever the first was.
        # With --old-logprobs rollout it also holds how far the policy has moved.
        moved = self.config.old_logprobs == "rollout"
        grown = bool(self.gaps) and not moved and gap > max(0.02, 5 * self.gaps[0])
        failed = sum(line.get(f"reward/{why}", 0) for why in ("timeouts", "crashes", "errors"))
        last = self.rewards[-HOPELESS:] if len(self.rewards) >= HOPELESS else [0.5]
        warnings = {f"nearly all responses were cut off by --max-response-tokens {limit} and earn nothing: "
                    "it is too low, or the policy never stops": cut_off > 0.9,
                    "nearly all responses are empty: the policy has collapsed": empty,
                    "trainer and engine differ five times as much as in the first step (policy/rollout_gap): "
                    "the engine may sample from other weights than are trained": grown,
                    "an update was not finite and was skipped": skipped,
                    "most verifications of a step failed, and their responses earned 0 whatever they said "
                    "(reward/timeouts, reward/crashes, reward/errors)":
                        failed > self.responses / 2,
                    f"no response of the last {HOPELESS} steps earned anything, so nothing can be learned. "
                    f"Look at the responses in {self.config.output}/samples.jsonl: is the answer in the form "
                    "that --answer asks for, do they end within --max-response-tokens, and is any of these "
                    "problems within the model's reach?": not any(last),
                    f"every response of the last {HOPELESS} steps was right, so nothing can be learned; give "
                    "harder problems": all(reward == 1 for reward in last)}
        for text, holds in warnings.items():
            if holds and text not in self.warned:
                say(f"warning: {text}")
        self.warned = {text for text, holds in warnings.items() if holds}


def finite(line):
    """A dictionary with None for infinity and NaN, which JSON does not have."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}


def skill(bce, reward, earlier, window=8):
    """1 - BCE(V) / BCE(constant). The constant is the mean reward of the last `window` steps: what one would
    expect without reading the prompt. Above 0, the critic knows more; 1 is perfect. None at step 1, and where
    all rewards of the step are 0 or all are 1: then no prompt was easier than another, so that there was
    nothing to know.

    bce: of V in this step; reward: this step's mean; earlier: those of the steps before it.
    """
    if not earlier or not 0 < reward < 1:
        return None
    expected = sum(earlier[-window:]) / len(earlier[-window:])
    expected = min(max(expected, 0.01), 0.99)  # of 0 and 1 the logarithm is infinite
    return 1 - bce / -(reward * math.log(expected) + (1 - reward) * math.log(1 - expected))


# ---- samples -----------------------------------------------------------------------------------------------

def sample(batch, row, advantages=None, values=None, tokenizer=None):
    """Response number `row` of a Batch as samples.jsonl has it. Of an advantage per token it has the mean, of
    a value per token the first, which has read the prompt alone."""
    def of_row(x, place):
        if x is not None:
            x = torch.as_tensor(x[row])
            return round(float(place(x) if x.dim() else x), 4)
    response, problem = batch.responses[row], batch.problems[row]
    return {"problem": problem.id, "prompt": problem.messages[-1]["content"],
            "response": decode(response.ids, tokenizer, batch.prompts[row]), "answer": problem.answer,
            "reward": round(float(batch.rewards[row]), 6), "value": of_row(values, lambda x: x[0]),
            "advantage": of_row(advantages, lambda x: x[: len(response.ids)].mean()),
            "tokens": len(response.ids), "finished": response.finished}


def shown(s, own_reward):
    """A sample on two lines of the screen, shortened. own_reward: --reward, if there is one."""
    text = s["response"].replace("\n", " | ")
    text = text if len(text) <= 240 else f"{text[:120]} ... {text[-120:]}"
    verdict = ("cut off" if not s["finished"] else f"reward {s['reward']:.2f}" if own_reward else
               "right" if s["reward"] else f"wrong: it is {s['answer']}")
    columns = (("V", "value", ".2f"), ("A", "advantage", "+.2f"))
    notes = [f"{label} {s[name]:{form}}" for label, name, form in columns if s[name] is not None]
    return f"  {s['prompt']}\n    {text}  [{', '.join([verdict, *notes])}]"


def show_samples(title, batch, tokenizer, own_reward, count=3):
    """Prints the first `count` prompts of a Batch with their responses and verdicts."""
    say(f"\n{title}")
    for row in range(min(count, len(batch.responses))):
        say(shown(sample(batch, row, tokenizer=tokenizer), own_reward))
    say()


# ---- boards ------------------------------------------------------------------------------------------------

class TensorBoard:
    """--tensorboard: events in OUTPUT/tensorboard.

    last_step: that an earlier process of this run has sent, or -1. Only later ones are sent, so none twice.
    """

    def __init__(self, config, last_step):
        from torch.utils.tensorboard import SummaryWriter
        folder, self.last_step = Path(config.output, "tensorboard"), last_step
        # A new run hides what is left of another one in the folder.
        self.writer = SummaryWriter(folder, purge_step=0 if last_step < 0 else None)
        say(f"To see it: tensorboard --logdir {folder}")

    def send(self, step, numbers, samples):
        if step > self.last_step:
            for name, value in numbers.items():
                self.writer.add_scalar(name, value, step)
            if samples:
                self.writer.add_text("samples", markdown(samples), step)
            self.writer.flush()

    def close(self):
        self.writer.close()


class WandB:
    """--wandb PROJECT: a run at Weights & Biases, whose id OUTPUT/wandb-id keeps for --resume."""

    def __init__(self, config, last_step):
        import wandb
        file = Path(config.output, "wandb-id")
        if last_step < 0 or not file.exists():
            file.write_text(secrets.token_hex(4))
        try:
            self.run = wandb.init(project=config.wandb, id=file.read_text(), resume="allow",
                                  dir=config.output, config=dataclasses.asdict(config))
        except Exception as error:  # no account, no network: the library raises many kinds
            raise InputError(f"--wandb {config.wandb}: cannot be started ({error}); run `wandb login`, or "
                             "set WANDB_MODE=offline") from None
        self.table, self.last_step = wandb.Table, last_step

    def send(self, step, numbers, samples):
        if step > self.last_step:
            if samples:
                rows = [[*s.values()] for s in samples]
                numbers = {**numbers, "samples": self.table(columns=[*samples[0]], data=rows)}
            self.run.log(numbers, step=step)

    def close(self):
        self.run.finish()


def markdown(samples):
    """Samples as a table, which TensorBoard shows under Text."""
    def cell(value):
        return str(value).replace("|", "\\|").replace("\n", "<br>")
    rows = [[*samples[0]], ["---"] * len(samples[0]), *([cell(v) for v in s.values()] for s in samples)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
