"""What goes into a run and what comes out: the command line, one line a step, metrics.jsonl. Plumbing, no algorithm."""
import argparse
import contextlib
import dataclasses
import json
import math
import os
import shutil
import signal
import sys
import textwrap
import time
import typing
from pathlib import Path

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when torch is loaded: it warns about NUMA and hooks

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

from data import BUILTIN_MODEL, InputError  # noqa: E402

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

def is_main():
    return os.environ.get("RANK", "0") == "0"


def say(text=""):
    """Prints once, whatever the number of ranks, above the progress bar if there is one."""
    with contextlib.suppress(OSError):  # the terminal was closed, or the disk under `> run.log` is full: no reason to die
        if is_main():
            tqdm.write(str(text), file=sys.stdout)
            sys.stdout.flush()


# ---- options --------------------------------------------------------------------------------------------------------

def option(default, help):
    """A field of a config dataclass: a command-line option with its default and its line in --help."""
    return dataclasses.field(default=default, metadata={"help": help})


class CommandLine:
    """Base of a config dataclass whose fields are the options. `BUILTIN` holds other defaults for built-in models."""

    @classmethod
    def parse(cls, description, arguments=None):
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                                         argument_default=argparse.SUPPRESS, allow_abbrev=False)
        for field in dataclasses.fields(cls):
            def shown(value):
                return " ".join(map(str, value)) if isinstance(value, tuple) else value
            kinds = [t for t in typing.get_args(field.type) if t not in (type(None), ...)] or [field.type]
            note = f" [{shown(field.default)}]" if field.default not in (None, (), BUILTIN_MODEL) else ""
            if field.name in cls.BUILTIN:
                note += f" [built-in model: {shown(cls.BUILTIN[field.name])}]"
            how = dict(type=kinds[0], metavar=kinds[0].__name__.upper()) if isinstance(kinds[0], type) else dict(choices=kinds)
            if field.type is bool:
                how = dict(action=argparse.BooleanOptionalAction)
            if isinstance(field.default, tuple):
                how["nargs"] = "+"
            text = (field.metadata["help"] + note).replace("%", "%%")
            parser.add_argument("--" + field.name.replace("_", "-"), help=text, **how)
        given = vars(parser.parse_args(arguments))
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
        builtin = Path(given.get("model", BUILTIN_MODEL)).resolve().is_relative_to(BUILTIN_MODEL)
        return cls(**{**(cls.BUILTIN if builtin else {}), **given})


@contextlib.contextmanager
def clear_errors():
    """Turns what is wrong with the user's input into one sentence and exit code 2; every other error keeps its trace."""
    try:
        yield
    except InputError as error:
        if not is_main():
            time.sleep(5)  # rank 0 most likely says the same, and then torchrun ends this one
        print(f"error: {error}", file=sys.stderr)
        sys.stderr.flush()
        sys.exit(2)


# ---- being told to stop ---------------------------------------------------------------------------------------------

class Stop:
    """SIGTERM or Ctrl-C: the running step is finished and saved. A second one ends the process at once; but not one that
    comes within two seconds, since schedulers and torchrun tell each process of a job by more than one way."""

    def __init__(self):
        self.requested = 0.0  # when
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
                os.write(2, b"\nStopping after this step and a checkpoint; once more, later, to stop at once.\n")

    def on_any_rank(self):
        """Whether any rank was told to: they must stop together."""
        requested = torch.tensor(int(self.requested > 0))
        dist.all_reduce(requested, op=dist.ReduceOp.MAX)
        return bool(requested)


# ---- time -----------------------------------------------------------------------------------------------------------

class Clock:
    """Seconds of training, by phase. What happens between the steps (evaluation, saving) does not count."""

    def __init__(self, device):
        self.device, self.total, self.phases = device, 0.0, {}

    def now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def start_step(self):
        self.phases, self.started = {}, self.now()

    def end_step(self):
        self.phases["step"] = self.now() - self.started
        self.total += self.phases["step"]

    def step_times(self):
        return {f"time/{phase}": seconds for phase, seconds in self.phases.items()}

    @contextlib.contextmanager
    def __call__(self, phase):
        start = self.now()
        yield
        self.phases[phase] = self.phases.get(phase, 0.0) + self.now() - start


# ---- what a run says and writes -------------------------------------------------------------------------------------

# The columns of a step's line: those of them that the algorithm reports.
COLUMNS = (("reward", "reward", ".3f"), ("length", "response_tokens", ".1f"), ("clip", "policy/clip_fraction", ".3f"),
           ("critic", "critic/loss", ".3f"), ("auc", "critic/auc", ".2f"), ("all equal", "group/all_equal", ".2f"),
           ("seconds", "time/step", ".1f"),
           ("accuracy", "eval_accuracy", ".3f"))


class Log:
    """Collects a step's metrics, shows a line of them, and writes them to metrics.jsonl, TensorBoard and W&B.

    `begun`: the step after which a resumed run goes on; what an earlier one wrote about later steps is removed.
    """

    def __init__(self, config, begun=0):
        self.config, self.step, self.metrics, self.first, self.last, self.said = config, begun, {}, None, None, set()
        if not is_main():
            return
        folder = Path(config.output)
        kept = earlier_lines(folder / "metrics.jsonl", begun) if begun else []
        if kept and "eval_accuracy" in (first := json.loads(kept[0])):
            self.first = first
        for name, text in (("config.json", json.dumps(dataclasses.asdict(config), indent=2) + "\n"),
                           ("metrics.jsonl", "".join(kept))):
            with (folder / f"{name}.partial").open("w") as file:  # written beside and renamed: it is never half there
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            (folder / f"{name}.partial").replace(folder / name)
        self.file, self.unwritten = (folder / "metrics.jsonl").open("ab", buffering=0), b""
        self.writers = []
        with contextlib.suppress(ImportError, OSError):
            from torch.utils.tensorboard import SummaryWriter
            if not begun:
                shutil.rmtree(folder / "tensorboard", ignore_errors=True)  # like metrics.jsonl, it begins anew
            board = SummaryWriter(folder / "tensorboard", purge_step=begun + 1 if begun else None)
            self.writers.append(lambda step, values: [board.add_scalar(k, v, step) for k, v in values.items()])
        if config.wandb:
            import wandb
            wandb.init(project=config.wandb, dir=folder, config=dataclasses.asdict(config))
            self.writers.append(lambda step, values: wandb.log(values, step=step))
        self.bar = tqdm(total=config.steps, disable=None, unit="step", leave=False, dynamic_ncols=True)

    def add(self, *metrics):
        for part in metrics:
            self.metrics.update(part)

    def evaluated(self, step, batch, tokenizer):
        """An evaluation of step `step`. The first one also shows what the model writes before it has learned."""
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
            line = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}  # strict JSON
            self.unwritten += json.dumps(line).encode() + b"\n"
            self._write_what_there_is_room_for()
            for write in list(self.writers):
                try:
                    write(step, {k: v for k, v in line.items() if isinstance(v, int | float)})
                except OSError as error:
                    self.writers.remove(write)
                    say(f"warning: no more TensorBoard or W&B events ({error}); metrics.jsonl has everything")
            self._say_what_looks_wrong(line)
            shown = [f"{label} {line[key]:{form}}" for label, key, form in COLUMNS if line.get(key) is not None]
            say(f"step {step:>{len(str(self.config.steps))}}/{self.config.steps}  " + "  ".join(shown))
            self.bar.update(step - self.bar.n)
        self.metrics = {}

    def sync(self):
        """Everything so far is on the disk, or an OSError says why not."""
        if is_main():
            while self.unwritten:
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]
            os.fsync(self.file.fileno())

    def finish(self, tokenizer, seconds):
        """Ends the run: samples again, and one paragraph on what happened and what to do next."""
        if not is_main():
            return
        self.bar.close()
        c = self.config
        if self.step < c.steps:
            say(f"Stopped after step {self.step}, as told. The same command with --resume goes on from the last checkpoint.")
            return
        text = f"Trained {c.model} for {c.steps} steps in {seconds:.0f} s of training."
        if self.first and self.last:
            show_samples("After training:", self.last, tokenizer)
            text += (f" On {len(self.last.rewards)} held-out problems, one sampled response each, accuracy went from "
                     f"{self.first['eval_accuracy']:.3f} to {self.last.rewards.mean():.3f}, and the mean response from "
                     f"{self.first['eval_response_tokens']:.1f} to {self.last.lengths.float().mean():.1f} tokens.")
        text += (f" The model is in {c.output}/model, where transformers and vllm load it from, and every metric of every "
                 f"step in {c.output}/metrics.jsonl (or: tensorboard --logdir {c.output}).")
        if c.model == BUILTIN_MODEL:
            text += (" Next: read sppo.py, change what it subtracts from the reward, and run it again; or train a model of "
                     "yours with --model and --dataset (python sppo.py --help; the README has the paper's runs).")
        say("\n".join(textwrap.wrap(text, 100, break_on_hyphens=False)))


    def _write_what_there_is_room_for(self):
        try:
            while self.unwritten:
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]
        except OSError as error:
            say(f"warning: metrics.jsonl cannot be written ({error}); what is missing is kept, and tried again every step")

    def _say_what_looks_wrong(self, line):
        """Once for as long as it lasts."""
        cut_off, length = line.get("truncated", 0), line.get("response_tokens", 2)
        limit = self.config.max_response_tokens
        looks = {f"{100 * cut_off:.0f} % of the responses were cut off by --max-response-tokens {limit}, and earn nothing: the "
                 "policy never stops, or the limit is too low": cut_off > 0.9,
                 "nearly all responses are empty: the policy has collapsed": length < 1.5,
                 "an update was not finite, and was skipped": line.get("policy/skipped") or line.get("critic/skipped")}
        for number, (text, wrong) in enumerate(looks.items()):
            if wrong and number not in self.said:
                say(f"warning: {text}")
            (self.said.add if wrong else self.said.discard)(number)


def earlier_lines(path, begun):
    """The lines of a metrics.jsonl up to step `begun`, each once."""
    lines = {}
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []:
        with contextlib.suppress(ValueError):  # the last one was cut when the run was killed
            if (step := json.loads(line)["step"]) <= begun:
                lines.setdefault(step, line)
    return [lines[step] for step in sorted(lines)]


def show_samples(title, batch, tokenizer, count=3):
    say(f"\n{title}")
    for problem, response, reward in list(zip(batch.problems, batch.responses, batch.rewards, strict=True))[:count]:
        text = " | ".join(tokenizer.decode(response.ids, skip_special_tokens=True).split("\n"))
        text = text if len(text) <= 240 else f"{text[:120]} ... {text[-120:]}"
        verdict = "right" if reward else f"wrong: it is {problem.answer}" if response.finished else "cut off"
        say(f"  {problem.messages[-1]['content']}\n    {text}  [{verdict}]")
    say()
