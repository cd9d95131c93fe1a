"""What a run tells: how long its phases take, how far it is, and a line and a JSON object for each step.

`Clock` measures the phases of a step. `progress` draws the running phase on a terminal. `Log` turns a step's
metrics into a line on the screen and an object in metrics.jsonl. Nothing here changes what is trained.
"""
import contextlib
import dataclasses
import json
import math
import os
import textwrap
import time
from pathlib import Path

import torch
from tqdm import tqdm

from cli import BUILTIN_MODEL, is_main, say

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
        self.tokens, self.since = 0, time.time()
        options = dict(leave=False, delay=10, disable=None if is_main() else True) | options
        with tqdm(desc=name, total=rows, unit="row", dynamic_ncols=True, miniters=0, **options) as self.bar:
            yield self.bar

    def add(self, rows=0, tokens=0):
        self.tokens += tokens
        self.bar.set_postfix_str(f"{self.tokens / (time.time() - self.since):,.0f} tokens/s", refresh=False)
        self.bar.update(rows)  # draws at most ten times a second


progress = Progress()


# ---- what a run prints and writes --------------------------------------------------------------------------

# The columns of a step's line: label, metric, format. A step without a metric has no such column.
COLUMNS = (
    ("reward", "reward", ".3f"), ("length", "response_tokens", ".1f"),
    ("clip", "policy/clip_fraction", ".3f"), ("critic", "critic/loss", ".3f"),
    ("auc", "critic/auc", ".2f"), ("skill", "critic/skill", ".2f"), ("all equal", "group/all_equal", ".2f"),
    ("seconds", "time/step", ".1f"), ("accuracy", "eval_accuracy", ".3f"))


class Log:
    """Collects a step's metrics, prints a line of them, and writes them to metrics.jsonl.

    resumed_after: the last step of the checkpoint that the run resumes from. What an earlier process wrote
    about later steps is removed, since these steps are trained again.
    """

    def __init__(self, config, resumed_after=0):
        # warned: the warnings that hold now, so that each is printed once
        self.config, self.step, self.metrics, self.warned = config, resumed_after, {}, set()
        self.first, self.last = None, None  # the first evaluation's metrics, the last one's Batch
        if not is_main():
            return
        folder = Path(config.output)
        (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
        self.file, self.unwritten = (folder / "metrics.jsonl").open("ab", buffering=0), b""
        # A line without an end was cut when the run was killed: it is of a later step.
        lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith(b"\n") and json.loads(line)["step"] <= resumed_after]
        kept = kept if resumed_after else []  # a new run begins an empty file
        self.file.truncate(sum(map(len, kept)))  # one call: a kill leaves the longer file or the shorter one
        earlier = [json.loads(line) for line in kept]
        self.first = next((line for line in earlier if "eval_accuracy" in line), None)
        self.rewards = [line["reward"] for line in earlier if "reward" in line]  # each step's mean
        self.bar = tqdm(total=config.steps, disable=None, unit="step", leave=False, dynamic_ncols=True)

    def add(self, *metrics):
        for part in metrics:
            self.metrics.update(part)

    def evaluated(self, step, batch, tokenizer):
        """Takes an evaluation's Batch. That of step 0 also shows what the untrained model writes."""
        self.last = batch
        self.metrics["eval_accuracy"] = batch.rewards.mean().item()
        self.metrics["eval_response_tokens"] = batch.lengths.float().mean().item()
        if step == 0:
            self.first = self.metrics
            show_samples("Before training:", batch, tokenizer)

    def write(self, step, seconds):
        """Ends a step: its metrics become a line on the screen and an object in metrics.jsonl."""
        self.step = step
        if is_main():
            line = {"step": step, "seconds": seconds, **self.metrics}
            if "reward" in line:
                if "critic/bce" in line:
                    line["critic/skill"] = skill(line["critic/bce"], line["reward"], self.rewards)
                self.rewards.append(line["reward"])
            # JSON has no infinity and no NaN.
            line = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
            self.unwritten += json.dumps(line).encode() + b"\n"
            try:
                self._write_lines()
            except OSError as error:
                say(f"warning: metrics.jsonl cannot be written ({error}); the next step tries again")
            self._warn(line)
            shown = [f"step {step:>{len(str(self.config.steps))}}/{self.config.steps}"]
            shown += [f"{label} {line[m]:{form}}" for label, m, form in COLUMNS if line.get(m) is not None]
            say("  ".join(shown))
            self.bar.update(step - self.bar.n)
        self.metrics = {}

    def sync(self):
        """Returns when everything so far is on the disk; raises OSError if it cannot be written."""
        if is_main():
            self._write_lines()
            os.fsync(self.file.fileno())

    def finish(self, tokenizer, seconds):
        """Ends the run: samples again, and one paragraph on what happened and what to do next."""
        if not is_main():
            return
        self.bar.close()
        c = self.config
        if self.step < c.steps:
            say(f"Stopped after step {self.step}, as asked. To continue, run the same command with --resume.")
            return
        text = f"Trained {c.model} for {c.steps} steps in {seconds:.0f} s of training."
        if self.first and self.last:
            show_samples("After training:", self.last, tokenizer)
            accuracy, length = self.first["eval_accuracy"], self.first["eval_response_tokens"]
            text += (f" On {len(self.last.rewards)} held-out problems, accuracy went from {accuracy:.3f} to "
                     f"{self.last.rewards.mean():.3f}, and the mean response from {length:.1f} to "
                     f"{self.last.lengths.float().mean():.1f} tokens.")
        text += (f" The model is in {c.output}/model, for transformers and vllm to load; all metrics are in "
                 f"{c.output}/metrics.jsonl (for TensorBoard or W&B: python -m tools.board {c.output}).")
        if c.model == BUILTIN_MODEL:
            text += (" Next: read sppo.py, change what it subtracts from the reward, and run it again; or "
                     "train your own model with --model and --dataset (see the README).")
        say("\n".join(textwrap.wrap(text, 100, break_on_hyphens=False)))

    def _write_lines(self):
        """Writes what is not written yet. A full disk may take a part; the rest is kept for the next time."""
        while self.unwritten:
            self.unwritten = self.unwritten[self.file.write(self.unwritten) :]

    def _warn(self, line):
        """Prints what looks wrong, once for as long as it lasts."""
        cut_off, limit = line.get("truncated", 0), self.config.max_response_tokens
        skipped = line.get("policy/skipped") or line.get("critic/skipped")
        empty = line.get("response_tokens", 2) < 1.5
        warnings = {f"nearly all responses were cut off by --max-response-tokens {limit} and earn nothing: "
                    "it is too low, or the policy never stops": cut_off > 0.9,
                    "nearly all responses are empty: the policy has collapsed": empty,
                    "an update was not finite and was skipped": skipped}
        for text, holds in warnings.items():
            if holds and text not in self.warned:
                say(f"warning: {text}")
        self.warned = {text for text, holds in warnings.items() if holds}


def skill(bce, reward, earlier, window=8):
    """1 - BCE(V) / BCE(constant). The constant is the mean reward of the last `window` steps: what one would
    expect without reading the prompt. Above 0, the critic knows more; 1 is perfect. None at step 1.

    bce: of V in this step; reward: this step's mean; earlier: those of the steps before it.
    """
    if not earlier:
        return None
    expected = sum(earlier[-window:]) / len(earlier[-window:])
    expected = min(max(expected, 0.01), 0.99)  # of 0 and 1 the logarithm is infinite
    return 1 - bce / -(reward * math.log(expected) + (1 - reward) * math.log(1 - expected))


def show_samples(title, batch, tokenizer, count=3):
    """Prints the first `count` prompts of a Batch with their responses and verdicts."""
    say(f"\n{title}")
    rows = zip(batch.problems[:count], batch.responses[:count], batch.rewards[:count], strict=True)
    for problem, response, reward in rows:
        text = tokenizer.decode(response.ids, skip_special_tokens=True).replace("\n", " | ")
        text = text if len(text) <= 240 else f"{text[:120]} ... {text[-120:]}"
        wrong = f"wrong: it is {textwrap.shorten(problem.answer, 60)}" if response.finished else "cut off"
        verdict = "right" if reward == 1 else f"reward {reward:.2f}" if reward else wrong
        say(f"  {problem.messages[-1]['content']}\n    {text}  [{verdict}]")
    say()
