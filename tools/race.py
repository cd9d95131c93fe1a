"""The race: every algorithm on the same problems, and the figures and tables of what happened.

    python -m tools.race                    all algorithms at the papers' batch, at one learning rate for all
                                            and, once the grid has run, each at its own best rate
    python -m tools.race --part grid        the learning rates, on a seed that the race does not use
    python -m tools.race --part batches     what a baseline buys by the prompts per step: a constant, SPO's
                                            tracker, SPPO's critic, an oracle; and GRPO beside them
    python -m tools.race --part contrast    SPPO and a constant on chains of 1 and of 14 operations only
    python -m tools.race --part quick       one seed of SPPO and GRPO at the papers' batch
    python -m tools.race --redraw           figures and tables from the committed results, without training
    python -m tools.race --model M --dataset D -- --max-response-tokens 8192 ...
                                            any model (--algorithms: some only); what follows -- is given to
                                            every run

Every run is a command that a user could give, in a process of its own. After a kill, the same command
continues with the runs that had not finished. All runs have the same loop, engine, optimiser, problems and
evaluation. What differs is the algorithm, and how many samples it takes of a prompt. Time is that of training
steps: evaluations do not count.

For other batches than the papers', the learning rate grows with the square root of the batch, the usual rule
for Adam, and the number of steps shrinks by the same factor.
"""
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import ClassVar, Literal

import torch

from checkpoint import lock
from cli import BUILTIN_MODEL, CommandLine, InputError, clear_errors, option, say
from tools.race_results import (
    BASELINES,
    CONSTANT,
    EQUAL,
    GROUP,
    ORACLE,
    best_rates,
    draw,
    merged,
    report,
    table,
)

ROOT = Path(__file__).resolve().parent.parent
ALGORITHMS = {  # name: the script and the options that make it this algorithm
    "SPPO": ["sppo.py"], "SPPO, small critic": ["sppo.py"], CONSTANT: ["examples/running_mean.py"],
    ORACLE: ["examples/oracle.py"],
    "SPO": ["spo.py"], "PPO": ["ppo.py"], "PPO + BCE": ["ppo.py", "--value-loss", "bce"],
    "GRPO": ["grpo.py"], EQUAL: ["grpo.py"], "RLOO": ["grpo.py", "--baseline", "rloo"],
    "ReMax": ["grpo.py", "--baseline", "remax"]}
SAMPLES = {"GRPO": GROUP, EQUAL: GROUP, "RLOO": GROUP, "ReMax": 2}  # a prompt; the others take one
KEPT = ("group/all_right", "group/all_wrong", "critic/auc", "critic/skill", "advantage/variance",
        *(f"oracle/{name}" for name in ("noise", "spread", "critic_error", "variance_constant",
                                        "variance_critic", "variance_oracle")),
        *(f"critic/auc_tenth_{k}" for k in range(1, 11)))  # the metrics that race.json keeps
PHASES = ("rollout", "reward", "logprobs", "critic", "update", "sync")
EVALUATIONS = 20  # in a run


@dataclass
class RaceConfig(CommandLine):
    part: Literal["race", "grid", "batches", "contrast", "quick"] = option("race", "which runs to make")
    model: str = option(BUILTIN_MODEL, "policy to train: a Hugging Face name or folder [the built-in model]")
    small_critic: str | None = option(None, "where the small critic starts from; without it, there is none")
    dataset: str = option("chain:1280", "as sppo.py's")
    output: str = option("runs/race", "folder of the runs")
    results: str | None = option(None, "folder for race.json, figures and tables [--output]")
    algorithms: tuple[str, ...] = option((), f"of {', '.join(ALGORITHMS)} [all of the part]")
    seeds: int = option(3, "runs of each algorithm", positive=True)
    lr: str = option("1e-6", "the one learning rate for all; the grid also has half of it and twice it")
    steps: int = option(400, "training steps", positive=True)
    group_steps: int = option(100, "training steps of GRPO and RLOO, each with eight times the samples",
                              positive=True)
    prompts_per_step: int = option(256, "prompts of a step, for all; a mini-batch is half", positive=True)
    batches: tuple[int, ...] = option((64, 256), "prompts of a step in --part batches and contrast")
    ranks: int = option(1, "processes of each run (torchrun)", positive=True)
    jobs: int = option(1, "runs at once; with more than idle cores, times mean nothing", positive=True)
    redraw: bool = option(False, "draw what --results holds, and train nothing")

    BUILTIN: ClassVar[dict] = dict(small_critic=f"{BUILTIN_MODEL}/small", results="results", lr="3e-4",
                                   steps=40, group_steps=16, batches=(16, 64, 512))

    def check(self):
        super().check()
        if self.prompts_per_step % (2 * GROUP):
            raise InputError(f"--prompts-per-step {self.prompts_per_step}: must be a multiple of "
                             f"{2 * GROUP}, so that half of it can be samples of groups of {GROUP}")
        if not {*self.algorithms} <= ALGORITHMS.keys():
            raise InputError(f"--algorithms {' '.join(self.algorithms)}: must be names that --help lists")
        if self.part == "race" and self.algorithms and not {"SPPO", "GRPO"} <= {*self.algorithms}:
            raise InputError(f"--algorithms {' '.join(self.algorithms)}: costs are compared between SPPO and "
                             "GRPO; name both, or choose another --part")
        if any(size < 2 or size % 2 for size in self.batches):
            raise InputError(f"--batches {self.batches}: a mini-batch is half of each; give even numbers")


def runs_of(c, results):
    """The runs of a part: (algorithm, learning rate, seed, prompts per step) of each, in their order."""
    of_part = {"batches": ("GRPO", EQUAL, *BASELINES), "contrast": (CONSTANT, "SPPO")}
    names = [name for name in c.algorithms or of_part.get(c.part) or [n for n in ALGORITHMS if n != ORACLE]
             if c.small_critic or name != "SPPO, small critic"]
    if c.part == "quick":
        return [(name, c.lr, 0, c.prompts_per_step) for name in ("GRPO", "SPPO")]
    if c.part == "grid":
        return [(name, lr, c.seeds, c.prompts_per_step)
                for lr in (f"{float(c.lr) / 2:g}", c.lr, f"{float(c.lr) * 2:g}") for name in names]
    if c.part in of_part:  # the slowest first, so that no core idles at the end
        rates = {size: f"{float(c.lr) * math.sqrt(size / c.prompts_per_step):.3g}" for size in c.batches}
        rates[c.prompts_per_step] = c.lr  # as in the race, whose runs are shown with these
        return [(name, rates[size], seed, size) for size in sorted(c.batches, reverse=True)
                for seed in range(c.seeds) for name in names]
    best = best_rates(results["grid"]["runs"]) if "grid" in results else {}
    rates = {name: dict.fromkeys((c.lr, best.get(name, c.lr))) for name in names}  # once if they are the same
    return [(name, lr, seed, c.prompts_per_step)
            for seed in range(c.seeds) for name in names for lr in rates[name]]


def contrast(file):
    """Writes the problems of the built-in task that have 1 operation, and as many that have 14. Returns the
    file's name."""
    rows = dict.fromkeys(Path(BUILTIN_MODEL, "chain.jsonl").read_text().splitlines())  # each once
    short, long = ([row for row in rows if len(re.findall(r"[-+*]", json.loads(row)["problem"])) == n]
                   for n in (1, 14))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(short + long[: len(short)]) + "\n")
    return str(file)


def one_run(c, extra, name, lr, seed, prompts):
    """The record of a run: accuracy over seconds and responses, and metrics. A finished one is only read."""
    share = GROUP if name == EQUAL else 1
    scale = math.sqrt(c.prompts_per_step / prompts)  # fewer prompts per step: a lower rate, and more steps
    steps = round(scale * (c.group_steps if name in ("GRPO", "RLOO") else c.steps))
    critic = ["--critic-model", c.small_critic] if name == "SPPO, small critic" else []
    command = [
        *ALGORITHMS[name], *critic, "--model", c.model, "--dataset", c.dataset, "--lr", lr, "--seed", seed,
        "--steps", steps, "--save-every", 0, "--eval-every", max(1, steps // EVALUATIONS),
        "--prompts-per-step", prompts // share, "--minibatch", prompts // 2 // share,
        "--lr-decay", 0, "--loss-mean", "token", *extra]  # as in the papers, unlike the built-in defaults
    words = name.replace(",", "").replace(" + ", " ").split()
    folder = Path(c.output) / "-".join(map(str, [*words, prompts, lr, steps, seed]))
    lines = metrics_of(folder, command, c.ranks)
    evaluated = [m for m in lines if "eval_accuracy" in m]
    say(f"{folder.name:<36} accuracy {evaluated[0]['eval_accuracy']:.3f} -> "
        f"{evaluated[-1]['eval_accuracy']:.3f} in {lines[-1]['seconds']:>4.0f} s")
    # SPO also samples every problem eight times before its first step.
    first = lines[1].get("tracker/init_samples", 0)
    responses = prompts // share * SAMPLES.get(name, 1)
    return {"algorithm": name, "lr": lr, "seed": seed, "prompts": prompts, "machine": machine(),
            "command": " ".join(map(str, command)).replace(f"{ROOT}/", ""),
            "seconds": [round(m["seconds"], 2) for m in evaluated],
            "responses": [m["step"] and first + responses * m["step"] for m in evaluated],
            "accuracy": [round(m["eval_accuracy"], 4) for m in evaluated],
            "phases": {phase: round(sum(m.get(f"time/{phase}", 0) for m in lines), 2) for phase in PHASES},
            "metrics": {key: [m[key] and round(m[key], 4) for m in lines if key in m]
                        for key in KEPT if key in lines[-1]}}


def metrics_of(folder, command, ranks=1, threads=1):
    """The lines of metrics.jsonl after `python COMMAND --output FOLDER`.

    ranks: processes of the run; threads: of each process.
    If the same command has finished in this folder before, it is not run again. Only the command is
    compared: after a change of the code, begin with an empty folder.
    """
    (script, *options), file = [str(word) for word in command], folder / "command.json"
    this = {"command": [script, *options], "ranks": ranks, "threads": threads}
    if not (file.exists() and json.loads(file.read_text()) == this):
        try:
            lock(folder).close()
        except OSError as error:  # a run of a race that was killed may live on
            raise InputError(f"{folder}: {error}") from None
        shutil.rmtree(folder, ignore_errors=True)
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        ended = subprocess.run(
            [sys.executable, *(torchrun if ranks > 1 else []), ROOT / script, *options, "--output", folder],
            text=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
        # A run that was told to stop ends with code 0, but without a trained model.
        if ended.returncode or not (folder / "model").exists():
            raise InputError(
                f"`python {' '.join(this['command'])}` ended with code {ended.returncode} before its last "
                f"step; the same command continues from here. It said: {ended.stderr.strip()[-1500:]}")
        shutil.rmtree(folder / "model", ignore_errors=True)
        file.write_text(json.dumps(this))  # last, so that a run that was killed has none
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def machine():
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    return f"{os.cpu_count()} cores ({models[0] if models else 'CPU'}), no GPU"


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    c, extra = RaceConfig.parse(__doc__, arguments[:cut]), arguments[cut + 1 :]
    with clear_errors():
        c.check()
        if c.part == "quick":  # half of a run's steps are enough to see who is ahead
            c = replace(c, steps=max(1, c.steps // 2), group_steps=max(1, c.group_steps // 2))
        folder = Path(c.results or c.output)
        file = folder / "race.json"
        if c.redraw and not file.exists():
            raise InputError(f"{file}: there are no results to draw; run the race first (without --redraw)")
        results = json.loads(file.read_text()) if file.exists() else {}
        rate = results.get(c.part, {}).get("settings", {}).get("lr", c.lr)
        if c.part in ("batches", "contrast") and rate != c.lr and not c.redraw:
            raise InputError(f"--lr {c.lr}: {file} has this part at {rate}, and its tables have one rate for "
                             "each size; give another --results")
        if not c.redraw:
            if c.part == "contrast":
                c = replace(c, output=f"{c.output}-contrast")
                c = replace(c, dataset=contrast(Path(c.output, "problems.jsonl")))
            with ThreadPool(c.jobs) as pool:
                runs = list(pool.imap(lambda run: one_run(c, extra, *run), runs_of(c, results)))
            if c.part == "quick":
                say("\n" + table(runs))
                return
            settings = {k: str(v).replace(f"{ROOT}/", "") for k, v in asdict(c).items()
                        if k not in ("output", "results", "redraw")}
            command = shlex.join(["python", "-m", "tools.race", *arguments]).replace(f"{ROOT}/", "")
            commands, old = [command], results.get(c.part, {})
            if old.get("extra") == extra:  # runs that this command did not ask for stay
                runs = merged(old["runs"], runs)
                commands = list(dict.fromkeys([*old.get("commands", []), *commands]))
            results[c.part] = {"commands": commands, "settings": settings, "extra": extra, "runs": runs}
        folder.mkdir(parents=True, exist_ok=True)
        # A line for each run.
        file.write_text(json.dumps(results).replace('{"algorithm"', '\n{"algorithm"') + "\n")
        draw(results, folder)
        (folder / "race.md").write_text(report(results))
        say("\n" + report(results) + f"\nFigures and tables are in {folder}.")


if __name__ == "__main__":
    main()
