"""Checkpoints: everything that a run needs to continue as if it had never stopped.

    OUTPUT/checkpoints/step-00000020/       state.json, and the shards of all tensors as .safetensors

Each rank writes its own shards (torch.distributed.checkpoint) into a folder that gets its name only when all
of it is on the disk: whenever the run is killed, the last complete checkpoint remains. Any number of ranks
can read it. Nothing is pickled, so reading one runs no code. `state.json` has everything that is no tensor,
and the size of every file, so that a truncated file is noticed.

Below them: `lock`, one run per folder, and `Stop`, for a run that is asked to stop.
"""
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from cli import InputError, is_main, say
from data import digest
from machine import from_rank_0

FORMAT = "sppo checkpoint 3"
FILE_BYTES = 8 << 30  # about, of all ranks together
KEEP = 2  # the newest checkpoints: the older one is a spare, in case the newer is damaged


# ---- saving ------------------------------------------------------------------------------------------------

def parts_of(run, baseline):
    """What has a state, by name: each has `state_dict` and `load_state_dict`. (Problems and seeds of a step
    are drawn from its number.)"""
    return {"policy": run.policy, "baseline": baseline, "in_flight": run.in_flight}


def options_of(run):
    """{option: value}, as a checkpoint tells them."""
    return {**json.loads(json.dumps(dataclasses.asdict(run.config))), "reward": run.verifier.code}


def describe(module, tokenizer):
    """What the shapes of its weights do not tell of a transformers model: {name: value}."""
    own = {"dtype", "transformers_version", "_name_or_path"}  # may differ where the model is the same
    texts = json.dumps([tokenizer.get_vocab(), tokenizer.chat_template], sort_keys=True)
    return {"tokenizer": hashlib.sha1(texts.encode()).hexdigest(),
            **{name: value for name, value in json.loads(module.config.to_json_string()).items()
               if name not in own}}


def models_of(run, baseline):
    """That of the policy and, if the baseline has one, of the critic. (One's own may be no transformer.)"""
    models, critic = {"model": describe(run.policy.module.lm, run.tokenizer)}, baseline.critic
    if critic and hasattr(critic.module, "backbone"):
        models["critic_model"] = describe(critic.module.backbone, getattr(critic, "tokenizer", run.tokenizer))
    return models


def state_of(run, baseline):
    """Everything that the next step depends on, as {name: value}; of a part, {part/name: value}."""
    return {"algorithm": type(baseline).__name__, "seconds": run.clock.total,
            "options": options_of(run), "models": models_of(run, baseline),
            "problems": digest(run.problems, run.config),
            **{f"{part}/{name}": value for part, owner in parts_of(run, baseline).items()
               for name, value in owner.state_dict().items()}}


def existing(output):
    """The checkpoints of a run's output folder, oldest first, complete or not."""
    return sorted(Path(output, "checkpoints").glob("step-" + 8 * "[0-9]"))


def check_output(output, resume):
    """Raises InputError if a new run would overwrite what an earlier one has learned, or if a run to resume
    has ended and left no checkpoint."""
    if existing(output):
        if not resume:
            raise InputError(f"{output}: holds checkpoints of a run; give --resume or another --output (to "
                             "train a finished one longer: --resume and more --steps)")
    elif Path(output, "model").exists():
        raise InputError(f"{output}: holds a finished run without checkpoints; give another --output (to "
                         f"train its model further, also --model {output})")
    elif _trained(output) and not resume:
        raise InputError(f"{output}: holds a run that was stopped before its first checkpoint; give another "
                         "--output, or --resume to start it anew from its beginning")


def _trained(output):
    """Whether the metrics in a run's output folder are of more than the evaluation before its first step."""
    try:
        lines = Path(output, "metrics.jsonl").read_text().splitlines()
    except OSError:
        return False
    return len(lines) > 1 or any('"step": 0,' not in line for line in lines)


def check_state(baseline):
    """Raises InputError if what a baseline remembers cannot be kept in a checkpoint: now, and not when the
    first one is due."""
    state, critic = baseline.state_dict(), baseline.critic
    of_critic = [*critic.state_dict()] if hasattr(critic, "state_dict") else []
    if of_critic and not any(name.endswith(of_critic[-1]) for name in state):
        raise InputError(f"{type(baseline).__name__}.state_dict: leaves out the critic, which --resume would "
                         "start anew; add what super().state_dict() gives, and call super().load_state_dict")
    for name, value in state.items():
        try:
            if not isinstance(value, torch.Tensor):
                json.dumps(value, default=number)
        except TypeError as error:
            raise InputError(f"{type(baseline).__name__}.state_dict: {name!r} cannot be kept in a checkpoint "
                             f"({error}); give tensors, numbers, texts, or lists of these") from None


def number(value):
    """For json.dumps: numpy's numbers as Python's."""
    if getattr(value, "shape", None) != ():
        raise TypeError(f"a {type(value).__name__} is no JSON")
    return value.item()


def save(run, baseline, log, step):
    """All ranks. Writes a checkpoint, and deletes all but the newest KEEP. Returns whether it was saved.

    If there is no room for it, a warning says so, the earlier ones remain, and the run continues.
    """
    import torch.distributed.checkpoint as dcp  # here: it takes a second, and --help should not wait for it
    folder = Path(run.config.output) / "checkpoints"
    final, partial = folder / f"step-{step:08d}", folder / f"partial-{step:08d}"
    state = state_of(run, baseline)
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    values = {name: value for name, value in state.items() if name not in tensors}
    # Files of some gigabytes each, since a rank holds one at a time in host memory while it is written.
    files = 1 + sum(t.numel() * t.element_size() for t in tensors.values()) // FILE_BYTES
    file_of = {name: 1 + i % files for i, name in enumerate(tensors)}
    writer = dcp.HuggingFaceStorageWriter(str(partial), file_of, save_distributed=True)
    problem = (first_disk_error(log.sync)  # or the checkpoint could be ahead of metrics.jsonl
               or first_disk_error(lambda: is_main() and _empty(partial))
               or first_disk_error(lambda: dcp.save(tensors, storage_writer=writer))
               or first_disk_error(lambda: is_main() and _complete(partial, final, step, values)))
    if problem:
        say(f"warning: no checkpoint of step {step} in {folder} ({problem}); earlier ones are untouched")
    if is_main():
        shutil.rmtree(partial, ignore_errors=True)
        if not problem:
            # Those of later steps are broken: this run skipped them when it was resumed.
            done = [path for path in existing(run.config.output) if path <= final]
            for old in {*existing(run.config.output)} - {*done[-KEEP :]}:
                with contextlib.suppress(OSError):
                    # Renamed first: an interrupted deletion leaves nothing that looks like a checkpoint.
                    shutil.rmtree(old.rename(old.with_name(f"partial-{old.name}")))
    return not problem


def first_disk_error(action):
    """Runs `action` on every rank. Returns, on all of them, the first rank's disk error as text, or None.

    All ranks must know of it, or those without an error would wait for the others in the next collective.
    Errors of other kinds are raised.
    """
    import torch.distributed.checkpoint as dcp
    problem = None
    try:
        action()
    except (OSError, SafetensorError) as error:
        problem = str(error)
    except dcp.CheckpointException as error:  # raised on all ranks, with the errors of each
        first = next(iter(error.failures.values()))[0]
        if isinstance(first, KeyboardInterrupt):  # the second Ctrl-C
            raise first from None
        if not isinstance(first, OSError):
            raise
        problem = str(first)
    problems = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    return next((p for p in problems if p), None)


def _empty(partial):
    for leftover in partial.parent.glob("partial-*"):  # of a run that was killed while it saved
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True, exist_ok=True)


def _complete(partial, final, step, values):
    """Writes state.json, waits until everything is on the disk, and gives the folder its name."""
    files = {f.name: f.stat().st_size for f in partial.iterdir()}
    state = {"format": FORMAT, "step": step, "files": files, "values": values}
    (partial / "state.json").write_text(json.dumps(state, default=number))
    for path in (*partial.iterdir(), partial):
        _onto_disk(path)
    if final.exists():  # broken, or this run was resumed from an older one
        shutil.rmtree(final)
    partial.rename(final)
    _onto_disk(final.parent)


def _onto_disk(path):
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


# ---- resuming ----------------------------------------------------------------------------------------------

def resume(run, baseline):
    """All ranks. Loads the newest complete checkpoint, if `--resume` asks for it and there is one. Returns
    the step after which it was saved, or 0.

    Broken checkpoints are skipped with a warning. One that belongs to another model or algorithm is refused
    with an InputError before any of its tensors is read.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.tensor import DTensor
    c = run.config
    if not c.resume:
        return 0
    path = from_rank_0(lambda: next((p for p in reversed(existing(c.output)) if _is_complete(p)), None))
    if path is None and existing(c.output):
        raise InputError(f"{c.output}: has no complete checkpoint; delete its folder checkpoints to start "
                         "anew, or give another --output")
    if path is None:
        say(f"{c.output}: no checkpoint yet, so this run starts at the beginning")
        return 0
    if problem := first_disk_error(lambda: (path / "state.json").read_text()):
        raise InputError(f"{path}: cannot be read on every rank ({problem}); give an --output all nodes see")
    meta = json.loads((path / "state.json").read_text())
    theirs, ours = meta["values"]["algorithm"], type(baseline).__name__
    other = "resume with the command that wrote it, or give another --output"
    if theirs != ours:
        raise InputError(f"{path}: is of a run of {theirs}, and this is {ours}; {other}")
    if meta["step"] > c.steps:
        raise InputError(f"{path}: is of a later step than --steps {c.steps}; raise it")
    now, values = state_of(run, baseline), meta["values"]
    for option, model in now["models"].items():
        was = values.get("models", {}).get(option, model)
        if now["options"][option] != values["options"][option] and was != model:
            name = min(name for name in {*was, *model} if was.get(name) != model.get(name))
            raise InputError(f"{path}: belongs to another --{option.replace('_', '-')} ({name} differs); "
                             f"{other}")
    reader = dcp.HuggingFaceStorageReader(str(path))
    saved = reader.read_metadata().state_dict_metadata
    tensors = {name: tensor for name, tensor in now.items() if isinstance(tensor, DTensor)}  # of the models
    # A baseline's own may be None before its first step, in this run or in the saved one.
    others = {name for name, tensor in now.items() if isinstance(tensor, torch.Tensor)} - tensors.keys()
    differing = sorted({*(saved.keys() - now.keys()), *(tensors.keys() - saved.keys()),
                        *(others - saved.keys() - values.keys())}) or sorted(
        name for name, tensor in tensors.items() if tensor.shape != saved[name].size)
    if differing:
        raise InputError(f"{path}: belongs to another model ({differing[0]} differs); {other}")
    for name in saved.keys() - tensors.keys():  # small, perhaps of another length: every rank reads it all
        tensors[name] = torch.empty(saved[name].size, dtype=saved[name].properties.dtype)
    dcp.load(tensors, storage_reader=reader)  # fills the sharded ones in place
    state = {**values, **tensors}
    for part, owner in parts_of(run, baseline).items():
        owner.load_state_dict({name.removeprefix(f"{part}/"): value for name, value in state.items()
                               if name.startswith(f"{part}/")})
    run.clock.total = state["seconds"]
    options = options_of(run)
    changed = [f"--{name.replace('_', '-')} {options[name]} (was {was})"
               for name, was in state["options"].items()
               if name in options.keys() - {"resume", "output"} and options[name] != was]
    say(f"Resuming after step {meta['step']}" + (f", with {', '.join(changed)}" if changed else ""))
    if state.get("problems", now["problems"]) != now["problems"]:  # older checkpoints do not tell
        say("The problems, their order or their answers are not those that this run has trained on so far.")
    if options["prompts_per_step"] != state["options"]["prompts_per_step"]:
        say("Step k takes the k-th share of the problems, and the shares have another size now: in this "
            "epoch, some problems come twice or not at all.")
    return meta["step"]


def _is_complete(path):
    """Whether a checkpoint is one of ours and all of it is there; says so if not."""
    try:
        meta = json.loads((path / "state.json").read_text())
        problem = None if meta["format"] == FORMAT else f"its format is {meta['format']!r}"
        for name, size in meta["files"].items():
            if (path / name).stat().st_size != size:
                problem = f"{name} is not as long as it was written"
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"it is no complete checkpoint ({type(error).__name__}: {error})"
    except OSError as error:  # it may be whole, and would be deleted as broken if the run went on without it
        raise InputError(f"{path}: cannot be read now ({error}); try again, or delete it") from None
    if problem:
        say(f"warning: {path} is passed over: {problem}")
    return not problem


# ---- one run per folder, and a run that is asked to stop ---------------------------------------------------

def unwritable(output):
    """Why nothing can be written into this output folder, or None; makes no folder."""
    output = Path(output).absolute()
    there = next(path for path in (output, *output.parents) if path.exists())
    if not there.is_dir():
        return f"{there} is a file"
    return None if os.access(there, os.W_OK | os.X_OK) else f"{there} is not writable"


def lock(output):
    """Keeps other runs from writing into this output folder for as long as this process
    lives, or until the file that it returns is closed. Rank 0 calls it."""
    Path(output).mkdir(parents=True, exist_ok=True)
    held = open(Path(output) / "lock", "w")  # noqa: SIM115 - open until the run ends
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OSError("another run is writing into it; wait for it, or give another --output") from None
    except OSError as error:  # some network file systems have no locks
        say(f"warning: {output} cannot be locked ({error}): let no other run write into it")
    return held


class Stop:
    """`with Stop() as stop`: after SIGTERM or Ctrl-C the running step is finished and saved. A second Ctrl-C
    raises KeyboardInterrupt, which leaves a notebook alive; a second SIGTERM ends the process.

    A second one within two seconds is ignored: schedulers and torchrun often send two for one request.
    """
    requested = 0.0  # when the first signal came; 0 if none has

    def __enter__(self):
        in_main = threading.current_thread() is threading.main_thread()  # no other thread is told of signals
        self.found = {n: signal.signal(n, self._request)
                      for n in (signal.SIGTERM, signal.SIGINT) if in_main}
        return self

    def __exit__(self, *_):
        for number, handler in self.found.items():
            signal.signal(number, handler)

    def _request(self, number, frame):
        now = time.monotonic()
        if self.requested and now - self.requested > 2:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
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
        dist.all_reduce(requested, op=dist.ReduceOp.MAX)
        return bool(requested)
