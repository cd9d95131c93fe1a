"""The plumbing of every script: its options, its clock, what it prints and what it writes. No algorithm here.

`option` and `CommandLine` make a dataclass into a command line. `Log` turns the metrics of a step into a line
on the screen and an object in metrics.jsonl. This file imports no other of ours: all of them may import it.
"""
import argparse
import contextlib
import dataclasses
import math
import os
import sys
import time
import typing
from pathlib import Path

from tqdm import tqdm

BUILTIN_MODEL = str(Path(__file__).resolve().parent / "builtin")


class InputError(Exception):
    """Something that the user gave cannot be used. The message is one sentence that says what to do."""


def is_main():
    """Whether this process is rank 0, which alone prints and writes the log."""
    return os.environ.get("RANK", "0") == "0"


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
