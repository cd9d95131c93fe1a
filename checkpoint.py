"""Checkpoints: everything that a run needs to go on as if it had never stopped.

    OUTPUT/checkpoints/step-00000020/       state.json, and the shards of all tensors as .safetensors

Each rank writes its own shards (torch.distributed.checkpoint), into a folder that gets its name only when all of it is
on the disk: a kill at any instant leaves the last good one. Any number of ranks can read it. Nothing is pickled, so
reading one runs no code. `state.json` has what is no tensor, and the size of every file: what was cut short is noticed.
"""
import contextlib
import dataclasses
import json
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from cli import is_main, say
from data import InputError
from policy import Diverged

FORMAT = "sppo checkpoint 1"


def state_of(run, baseline):
    """Everything that the next step depends on. (Problems and seeds of a step are drawn from its number.)"""
    return {"policy": run.policy.state_dict(), "baseline": baseline.state_dict(), "seconds": run.clock.total,
            "given_up": [run.verifier.timeouts, run.verifier.crashes], "options": dataclasses.asdict(run.config)}


def save(run, baseline, step):
    """All ranks. Writes a checkpoint, and deletes all but the newest `--keep`. If there is no room for it, a warning
    says so, those that exist remain, and the run goes on."""
    folder = Path(run.config.output) / "checkpoints"
    final, partial = folder / f"step-{step:08d}", folder / f"partial-{step:08d}"
    tensors, values = _flatten(state_of(run, baseline))
    problem = first_problem(lambda: is_main() and _empty(partial))
    problem = problem or first_problem(
        lambda: dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(partial), save_distributed=True)))
    problem = problem or first_problem(lambda: is_main() and _complete(partial, final, step, values))
    if problem:
        say(f"warning: no checkpoint of step {step} in {folder} ({problem}); earlier ones are untouched")
    if is_main():
        shutil.rmtree(partial, ignore_errors=True)
        for old in sorted(folder.glob("step-*"))[: -run.config.keep]:
            # Renamed first: a checkpoint is there or it is not, also when this is interrupted.
            shutil.rmtree(old.rename(old.with_name(f"partial-{old.name}")), ignore_errors=True)


def resume(run, baseline):
    """All ranks. Takes up the newest complete checkpoint, if `--resume` asks for it and there is one. Returns the step
    after which it was saved, or 0. Broken checkpoints are passed over with a warning; one that belongs to another model
    or algorithm is refused with an InputError before anything of it is read."""
    folder = Path(run.config.output) / "checkpoints"
    candidates = sorted(folder.glob("step-*"), reverse=True) if run.config.resume else []
    complete = (path for path in candidates if _is_complete(path))
    path = next(complete, None)
    if path is None:
        if candidates:
            raise InputError(f"{folder}: has no complete checkpoint; delete it to start anew, or give another --output")
        if run.config.resume:
            say(f"{folder}: no checkpoint yet, so this run starts at the beginning")
        return 0
    tensors, _ = _flatten(state_of(run, baseline))
    reader = HuggingFaceStorageReader(str(path))
    saved = reader.read_metadata().state_dict_metadata
    differing = sorted(tensors.keys() ^ saved.keys()) or sorted(
        name for name, ours in tensors.items() if isinstance(ours, DTensor) and ours.shape != saved[name].size)
    if differing:
        raise InputError(f"{path}: belongs to another model or algorithm ({differing[0]} differs); resume with the command "
                         "that wrote it, or give another --output")
    for name, ours in tensors.items():
        if not isinstance(ours, DTensor):  # small, and of whatever length: every rank reads all of it
            tensors[name] = torch.empty(saved[name].size, dtype=saved[name].properties.dtype)
    dcp.load(tensors, storage_reader=reader)  # sharded ones are filled in place
    meta = json.loads((path / "state.json").read_text())
    state = _unflatten({**meta["values"], **tensors})
    run.policy.load_state_dict(state["policy"])
    baseline.load_state_dict(state.get("baseline", {}))
    run.clock.total = state["seconds"]
    if is_main():  # the others count from 0; only sums are reported
        run.verifier.timeouts, run.verifier.crashes = state["given_up"]
    options = json.loads(json.dumps(dataclasses.asdict(run.config)))
    changed = [f"--{name.replace('_', '-')} {options[name]} (was {was})" for name, was in state["options"].items()
               if name not in ("resume", "output") and options.get(name) != was]
    say(f"Going on after step {meta['step']}" + (f", with {', '.join(changed)}" if changed else ""))
    return meta["step"]


@contextlib.contextmanager
def saved_if_diverged(batch, step, config):
    """Ten updates in a row that were not finite end the run, with the batch of the last one left for inspection."""
    try:
        yield
    except Diverged as error:
        path = Path(config.output) / "diverged.jsonl"
        if is_main():
            rows = zip(batch.problems, batch.prompts, batch.responses, batch.rewards.tolist(), strict=True)
            path.write_text("".join(json.dumps({
                "problem": problem.id, "prompt_ids": prompt, "reward": reward, **dataclasses.asdict(response)}) + "\n"
                for problem, prompt, response, reward in rows))
        raise InputError(f"step {step}: {error}; its batch is in {path}. Go on from an earlier checkpoint with --resume and "
                         "a lower --lr or --critic-lr") from None


def _flatten(state, prefix=""):
    """({path: tensor}, {path: other value}) of nested dictionaries; paths are joined with a slash."""
    tensors, values = {}, {}
    for name, value in state.items():
        if isinstance(value, dict):
            inner = _flatten(value, f"{prefix}{name}/")
            tensors |= inner[0]
            values |= inner[1]
        else:
            (tensors if isinstance(value, torch.Tensor) else values)[f"{prefix}{name}"] = value
    return tensors, values


def _unflatten(flat):
    state = {}
    for path, value in flat.items():
        *parents, name = path.split("/")
        inner = state
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[name] = value
    return state


def first_problem(action):
    """Runs `action`, and tells all ranks the first rank's trouble with the disk, if any; other errors are errors."""
    problem = None
    try:
        action()
    except (OSError, SafetensorError) as error:
        problem = str(error)
    except CheckpointException as error:  # has every rank's error; all ranks raise it
        first = next(iter(error.failures.values()))[0]
        if not isinstance(first, OSError):
            raise
        problem = str(first)
    problems = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    return next((p for p in problems if p), None)


def _empty(partial):
    for leftover in partial.parent.glob("partial-*"):  # of a run that was killed while it saved
        shutil.rmtree(leftover)
    partial.mkdir(parents=True)


def _complete(partial, final, step, values):
    """The last file, everything onto the disk, and the name."""
    meta = {"format": FORMAT, "step": step, "files": {f.name: f.stat().st_size for f in partial.iterdir()}, "values": values}
    (partial / "state.json").write_text(json.dumps(meta))
    for path in (*partial.iterdir(), partial):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    if final.exists():  # of a run that was resumed from an older one
        shutil.rmtree(final)
    partial.rename(final)


def _is_complete(path):
    """Whether a checkpoint is one of ours and all of it is there; says so if not."""
    try:
        meta = json.loads((path / "state.json").read_text())
        problem = None if meta["format"] == FORMAT else f"its format is {meta['format']!r}"
        for name, size in meta["files"].items():
            if (path / name).stat().st_size != size:
                problem = f"{name} is not as long as it was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"it is no complete checkpoint ({type(error).__name__}: {error})"
    if problem:
        say(f"warning: {path} is passed over: {problem}")
    return not problem
