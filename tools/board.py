"""Sends a run's metrics.jsonl to TensorBoard or to Weights & Biases, and follows it while the run goes on.

    python -m tools.board runs/sppo                    TensorBoard events (pip install tensorboard)
    python -m tools.board runs/sppo --wandb PROJECT    Weights & Biases (pip install wandb)

It runs beside the training, or after it, and ends with Ctrl-C or, with --once, at the end of the file.
"""
import contextlib
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from cli import CommandLine, InputError, clear_errors, option, say


@dataclass
class BoardConfig(CommandLine):
    output: str = option("runs/sppo", "the run's folder: what its --output was")
    wandb: str | None = option(None, "send to this Weights & Biases project, instead of TensorBoard")
    once: bool = option(False, "send what is there, and end")


def writer(c):
    """A function (step, {name: number}) that sends a step's metrics."""
    folder = Path(c.output)
    try:
        if c.wandb:
            import wandb
            wandb.init(project=c.wandb, dir=folder, config=json.loads((folder / "config.json").read_text()))
            return lambda step, values: wandb.log(values, step=step)
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError(f"{error}; pip install {'wandb' if c.wandb else 'tensorboard'}") from None
    board = SummaryWriter(folder / "tensorboard")
    say(f"To see it: tensorboard --logdir {folder}")

    def write(step, values):
        for name, value in values.items():
            board.add_scalar(name, value, step)
        board.flush()
    return write


def lines(path, once):
    """The complete lines of a file, as they are written."""
    sent = 0
    while True:
        whole = path.read_bytes().rpartition(b"\n")[0].splitlines()  # the last line may be half written
        yield from whole[sent:]
        sent = len(whole)
        if once:
            return
        time.sleep(2)


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--output", *arguments]
    c = BoardConfig.parse(__doc__, arguments)
    with clear_errors(), contextlib.suppress(KeyboardInterrupt):
        path = Path(c.output) / "metrics.jsonl"
        if not path.exists():
            raise InputError(f"{path}: no such file; give the --output folder of a run")
        write = writer(c)
        for line in lines(path, c.once):
            metrics = json.loads(line)
            step = metrics.pop("step")
            write(step, {name: value for name, value in metrics.items() if isinstance(value, int | float)})


if __name__ == "__main__":
    main()
