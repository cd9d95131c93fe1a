"""The plumbing of every script: its options, its clock, what it prints and what it writes. No algorithm here.

`option` and `CommandLine` make a dataclass into a command line. `Log` turns the metrics of a step into a line
on the screen and an object in metrics.jsonl. This file imports no other of ours: all of them may import it.
"""
import argparse
import contextlib
import dataclasses
import json
import math
import os
import signal
import sys
import textwrap
import time
import typing
from pathlib import Path

import torch
from tqdm import tqdm

BUILTIN_MODEL = str(Path(__file__).resolve().parent / "builtin")


class InputError(Exception):
    """Something that the user gave cannot be used. The message is one sentence that says what to do."""


def is_main():
    """Whether this process is rank 0, which alone prints and writes the log."""
    return os.environ.get("RANK", "0") == "0"


def from_rank_0(compute):
    """What `compute()` returns on rank 0, on every rank: for what ranks could see differently."""
    found = [compute() if is_main() else None]
    torch.distributed.broadcast_object_list(found)
    return found[0]


def say(text=""):
    """Prints once, whatever the number of ranks, above the progress bar if there is one."""
    with contextlib.suppress(OSError):  # a closed terminal or a full disk is no reason to end a training run
        if is_main():
            tqdm.write(str(text), file=sys.stdout)
            sys.stdout.flush()


# ---- options -----------------------------------------------------------------------------------------------

def option(default, help, *, group=None, positive=False, most=math.inf):
    """A field of a config dataclass that is also a command-line option.

    default, help: its default, and its line in --help.
    group: the heading in --help under which this option and those after it stand.
    positive: a number must be greater than 0; without it, 0 or more. most: it may be this much at most.
    `CommandLine.check` refuses others.
    """
    return dataclasses.field(default=default, metadata=dict(help=help, group=group, limits=(positive, most)))


class CommandLine:
    """Base of a config dataclass whose fields are the options.

    `BUILTIN` has the defaults that differ where the built-in model is used.
    """

    BUILTIN = {}

    @classmethod
    def parse(cls, description, arguments=None):
        """The config that the command line (or a list of `arguments`) asks for."""
        parser = argparse.ArgumentParser(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
            usage="%(prog)s [OPTIONS]", argument_default=argparse.SUPPRESS)  # only what was typed
        groups, heading = {}, "options"
        for field in dataclasses.fields(cls):
            heading = field.metadata["group"] or heading
            if heading not in groups:
                groups[heading] = parser.add_argument_group(heading)
            groups[heading].add_argument("--" + field.name.replace("_", "-"), **cls._argument(field))
        given = {name: tuple(value) if isinstance(value, list) else value
                 for name, value in vars(parser.parse_args(arguments)).items()}
        # The built-in model has its own defaults. What was typed has precedence over all defaults.
        builtin = Path(given.get("model", BUILTIN_MODEL)).resolve().is_relative_to(BUILTIN_MODEL)
        return cls(**{**(cls.BUILTIN if builtin else {}), **given})

    @classmethod
    def _argument(cls, field):
        """The keyword arguments of argparse's `add_argument` for a field."""
        def shown(value):
            return " ".join(map(str, value)) if isinstance(value, tuple) else value
        note = f" [{shown(field.default)}]" if field.default not in (None, (), BUILTIN_MODEL) else ""
        if field.name in cls.BUILTIN:
            note += f" [built-in model: {shown(cls.BUILTIN[field.name])}]"
        help = (field.metadata["help"] + note).replace("%", "%%")
        if field.type is bool:
            return dict(help=help, action=argparse.BooleanOptionalAction)
        # `str | None` is a str, `tuple[str, ...]` is several, and `Literal["a", "b"]` is a choice.
        kinds = [t for t in typing.get_args(field.type) if t not in (type(None), ...)] or [field.type]
        several = dict(nargs="+") if isinstance(field.default, tuple) else {}
        if isinstance(kinds[0], type):
            return dict(help=help, type=kinds[0], metavar=kinds[0].__name__.upper(), **several)
        return dict(help=help, choices=kinds, **several)

    def check(self):
        """Raises InputError for a number that no run can use. Scripts add their own checks."""
        for field in dataclasses.fields(self):
            value, (positive, most) = getattr(self, field.name), field.metadata["limits"]
            if isinstance(value, int | float) and not (0 <= value <= most and (value or not positive)):
                allowed = "greater than 0" if positive else "0 or more"
                allowed += "" if most == math.inf else f" and at most {most}"
                raise InputError(f"--{field.name.replace('_', '-')} {value}: must be {allowed}")


@contextlib.contextmanager
def clear_errors():
    """Turns an InputError into one sentence and exit code 2. Other errors are bugs: they
    keep their traceback."""
    try:
        yield
    except InputError as error:
        if not is_main():
            time.sleep(5)  # rank 0 most likely says the same, and then torchrun ends this process
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


# ---- stopping early ----------------------------------------------------------------------------------------

class Stop:
    """After SIGTERM or Ctrl-C the running step is finished and saved; a second signal ends the process.

    A second one within two seconds is ignored: schedulers and torchrun often send two for one request.
    """

    def __init__(self):
        self.requested = 0.0  # when the first signal came; 0 if none has
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._request)

    def _request(self, number, frame):
        now = time.monotonic()
        if self.requested and now - self.requested > 2:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.requested = self.requested or now
        with contextlib.suppress(OSError):
            if is_main():
                # Not `print`: the signal may have interrupted a print, which cannot be entered twice.
                os.write(2, b"\nStopping after this step and a checkpoint; once more to stop at once.\n")

    def on_any_rank(self):
        """Whether any rank was asked to stop. All must stop in the same step: a rank that stopped by itself
        would leave the others waiting for it in a collective."""
        requested = torch.tensor(int(self.requested > 0))
        torch.distributed.all_reduce(requested, op=torch.distributed.ReduceOp.MAX)
        return bool(requested)


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
        verdict = "right" if reward else f"wrong: it is {problem.answer}" if response.finished else "cut off"
        say(f"  {problem.messages[-1]['content']}\n    {text}  [{verdict}]")
    say()
