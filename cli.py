"""The plumbing of every script: its options, and its errors. No algorithm here.

`option` and `CommandLine` make a dataclass into a command line, and fill in the defaults that belong to a
model. `InputError` is what a user can put right. This file imports no other of ours: all may import it.
"""
import argparse
import contextlib
import dataclasses
import difflib
import functools
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


def replace_file(path, text):
    """Writes a text file whole or not at all, whenever the process is killed."""
    partial = Path(f"{path}.partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


# ---- options -----------------------------------------------------------------------------------------------

def option(default, help, *, group=None, positive=False, most=math.inf, empty=False):
    """A field of a config dataclass that is also a command-line option.

    default, help: its default, and its line in --help. The field itself is None until `CommandLine` knows
        which model is used, because a model can have defaults of its own.
    group: the heading in --help under which this option and those after it stand.
    positive: a number must be greater than 0; without it, 0 or more. most: it may be this much at most.
    empty: a text may be empty. (Where None is allowed, an empty text means None.)
    `CommandLine.check` refuses others.
    """
    return dataclasses.field(default=None, metadata=dict(
        default=default, help=help, group=group, limits=(positive, most), empty=empty))


def run_of(model):
    """The output folder of the run that trained `model`, which is this folder or its `model/`; or None."""
    path = Path(model)
    places = (path, path.parent) if path.name == "model" else (path,)
    return next((run for run in places if (run / "metrics.jsonl").is_file()), None)


def behind(run):
    """(step of a run's model, the last step in its metrics) if the run went on after the model was saved."""
    with contextlib.suppress(OSError, ValueError, IndexError, KeyError):  # an older run; a line half written
        saved = int((run / "model" / "step").read_text())
        last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]
        return (saved, last) if last > saved else None


KINDS = {int: "a whole number", float: "a number", str: "text", bool: "True or False",
         tuple: "a list of texts"}  # of options, as errors name them


class CommandLine:
    """Base of a config dataclass whose fields are the options.

    A field that is not given, on the command line or in Python, takes the first of these defaults: what the
    model's own run was trained with (if `model` is the folder of a run, and the option not in
    `NOT_INHERITED`), `BUILTIN` (if it is the built-in model, or was trained on its task), and the option's
    own.
    """

    NOT_INHERITED, BUILTIN = (), {}
    MUST_BE_TYPED = ()  # options that let code run, which no file of a run may bring along

    def __post_init__(self):
        own, options = self.defaults(), {}
        for name, default in own.items():  # in Python, a path may be a Path, several values a list
            value = getattr(self, name)
            if isinstance(value, Path) or isinstance(default, str) and type(value) is int:
                setattr(self, name, str(value))
            elif isinstance(value, list) and isinstance(default, tuple):
                setattr(self, name, tuple(value))
        defaults = dict(own)
        model = getattr(self, "model", None) or own.get("model")
        if model and (run := run_of(model)):
            if not (run / "model" / "config.json").is_file():
                raise InputError(f"{model}: is a run that has not ended, so it has no model yet; continue it "
                                 "with --resume")
            model = self.model = str(run / "model")
            options = self.options_of(run)
        critic = getattr(self, "critic_model", None)
        if critic and (its_run := run_of(critic)):
            self.critic_model = str(its_run / "model")
        task = str(options.get("dataset", "")).partition(":")[0]
        family = any(name and Path(name).resolve().is_relative_to(BUILTIN_MODEL)
                     for name in (model, options.get("model")))
        if model and (family or task == "chain"):
            defaults |= self.BUILTIN
        missing = [name for name in own if getattr(self, name) is None]
        for name in self.MUST_BE_TYPED:
            if name in missing and options.get(name):
                raise InputError(f"{run}: was trained with --{name} {options[name]}; type it again, because "
                                 f"it runs code (or --{name} '' for none)")
        stays = {*self.NOT_INHERITED, *self.MUST_BE_TYPED}
        brought = {name: options[name] for name in missing
                   if name not in stays and options.get(name) is not None}
        self.usual = {**defaults, **brought}  # {option: what it is unless it is given}
        for name in missing:
            setattr(self, name, self.usual[name])
        for field in dataclasses.fields(self):
            if getattr(self, field.name) == "" and type(None) in typing.get_args(field.type):
                setattr(self, field.name, None)
        # What `check` tells. Not a field: config.json has the values, whoever brought them.
        self.brought = ", ".join(f"--{name.replace('_', '-')} {as_typed(value)}"
                                 for name, value in brought.items() if value != own[name])

    @classmethod
    def defaults(cls):
        """{name: default} of all options, as they are for a model that brings none of its own."""
        return {field.name: field.metadata["default"] for field in dataclasses.fields(cls)}

    @staticmethod
    def options_of(run):
        """{name: value} of the options that a run (its folder) was given, as it has written them down."""
        try:
            options = json.loads((run / "config.json").read_text())
        except (OSError, ValueError) as error:
            raise InputError(f"{run}/config.json: cannot be read ({error}); copy the run's model/ elsewhere, "
                             "and give that") from None
        return {name: tuple(v) if isinstance(v, list) else v for name, v in options.items()}

    @classmethod
    def parse(cls, description, arguments=None, positional=None):
        """The config that the command line (or a list of `arguments`) asks for.

        positional: the option that may also be given without its name, anywhere among the others.
        """
        width = shutil.get_terminal_size().columns - 2
        layout = functools.partial(argparse.RawDescriptionHelpFormatter, width=width, max_help_position=30)
        parser = argparse.ArgumentParser(
            description=fitted(description or "", width), formatter_class=layout, allow_abbrev=False,
            usage="%(prog)s [OPTIONS]", argument_default=argparse.SUPPRESS)  # only what was typed
        groups, heading = {}, "options"
        for field in dataclasses.fields(cls):
            heading = field.metadata["group"] or heading
            if heading not in groups:
                groups[heading] = parser.add_argument_group(heading)
            groups[heading].add_argument("--" + field.name.replace("_", "-"), **cls._argument(field))
        given, unknown = parser.parse_known_args(arguments)
        given = {name: tuple(v) if isinstance(v, list) else v for name, v in vars(given).items()}
        if positional and unknown and not unknown[0].startswith("-"):
            given.setdefault(positional, unknown.pop(0))
        if unknown:
            name = unknown[0].partition("=")[0]
            near = difflib.get_close_matches(name, ["--" + f.replace("_", "-") for f in cls.defaults()], 1)
            parser.error(f"{name}: there is no such option" + (f"; did you mean {near[0]}?" if near else
                                                               "; --help lists all of them"))
        return cls(**given)

    @classmethod
    def _argument(cls, field):
        """The keyword arguments of argparse's `add_argument` for a field."""
        default = field.metadata["default"]
        note = f" [{as_typed(default)}]" if default not in (None, (), BUILTIN_MODEL) else ""
        if field.name in cls.BUILTIN:
            note += f" [built-in model: {as_typed(cls.BUILTIN[field.name])}]"
        help = (field.metadata["help"] + note).replace("%", "%%")
        if field.type is bool:
            return dict(help=help, action=argparse.BooleanOptionalAction)
        # `str | None` is a str, `tuple[str, ...]` is several, and `Literal["a", "b"]` is a choice.
        kinds = [t for t in typing.get_args(field.type) if t not in (type(None), ...)] or [field.type]
        several = dict(nargs="+") if isinstance(default, tuple) else {}
        if isinstance(kinds[0], type):
            return dict(help=help, type=kinds[0], metavar=kinds[0].__name__.upper(), **several)
        return dict(help=help, choices=kinds, **several)

    def check(self):
        """Raises InputError for a value that no run can use. Scripts add their own checks."""
        for field in dataclasses.fields(self):
            value, (positive, most) = getattr(self, field.name), field.metadata["limits"]
            name, kinds = f"--{field.name.replace('_', '-')}", typing.get_args(field.type) or (field.type,)
            if typing.get_origin(field.type) is typing.Literal:
                if value not in kinds:
                    raise InputError(f"{name} {value}: must be one of {', '.join(kinds)}")
                continue
            kind = tuple if typing.get_origin(field.type) is tuple else kinds[0]
            is_kind = isinstance(value, int | float if kind is float else kind) and (
                (kind is bool) == isinstance(value, bool))
            if not is_kind and not (value is None and type(None) in kinds):
                raise InputError(f"{name} {value!r}: must be {KINDS[kind]}")
            if value == "" and not field.metadata["empty"]:
                raise InputError(f"{name}: is empty; give a value, or leave the option out")
            if isinstance(value, int | float) and not (
                    0 <= value <= most and (value or not positive) and math.isfinite(value)):
                allowed = "greater than 0" if positive else "0 or more"
                allowed += " and finite" if most == math.inf else f" and at most {most}"
                raise InputError(f"{name} {value}: must be {allowed}")
        model = getattr(self, "model", None)
        if model and (run := run_of(model)) and (older := behind(run)):
            say(f"warning: {run}: its model is of step {older[0]}, but the run has gone on to step "
                f"{older[1]}; --resume finishes it")
        if self.brought:
            say(f"{run_of(self.model)}: was trained with {self.brought}: these are the defaults here")

    def tell_unused(self, names, why):
        """Says which of these options, that change nothing here, have another value than the usual one."""
        for name in names:
            if (value := getattr(self, name)) != self.usual[name]:
                typed = f"no-{name}" if value is False else f"{name.replace('_', '-')} {as_typed(value)}"
                say(f"warning: --{typed} changes nothing: {why}")


def as_typed(value):
    """A value as one would type it."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def fitted(text, width):
    """A docstring with its paragraphs broken anew, if the terminal is narrower than they are."""
    parts = text.split("\n\n")
    return "\n\n".join(part if part.startswith(" ") or max(map(len, part.splitlines()), default=0) <= width
                       else textwrap.fill(part, width) for part in parts)


@contextlib.contextmanager
def clear_errors():
    """Turns an InputError into one sentence and exit code 2, and Ctrl-C into its usual exit code.
    Other errors are bugs: they keep their traceback."""
    try:
        yield
    except InputError as error:
        if not is_main():
            time.sleep(5)  # rank 0 most likely says the same, and then torchrun ends this process
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
