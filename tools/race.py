"""The race: every algorithm on the same problems, and the papers' figures drawn from what happened.

    python -m tools.race             all of it, on the built-in models; after a kill, run it again
    python -m tools.race --quick     one seed of SPPO and GRPO: is SPPO sooner as good as GRPO's best?
    python -m tools.race --redraw    figures and tables from the committed results, without training
    python -m tools.race --model M --dataset D -- --max-response-tokens 8192 ...
                                     any model; what follows -- is given to every run

Every run is a command that a user could give, in a process of its own. Runs take turns, so that a busy
machine slows all algorithms alike. All have the same loop, engine, optimiser, prompts per step and
evaluation. What differs is the algorithm and its learning rate. The rate is chosen for each algorithm from
the same grid, by whole runs on a seed that the race does not use. (Runs of half the length chose rates that
later diverged.) With a single rate in --lrs, all have that one. The race over long responses uses the same
rates. Time is that of training steps: evaluations do not count.
"""
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import ClassVar

import torch

from cli import BUILTIN_MODEL, CommandLine, InputError, clear_errors, option, say
from tools.race_results import EQUAL, draw, of, report, smooth, speed

ROOT = Path(__file__).resolve().parent.parent
GROUP = 8  # samples per prompt of GRPO and RLOO
ALGORITHMS = {  # name: the script and the options that make it this algorithm
    "SPPO": ["sppo.py"], "SPPO, small critic": ["sppo.py"], "SPO": ["spo.py"], "PPO": ["ppo.py"],
    "PPO + BCE": ["ppo.py", "--value-loss", "bce"], "GRPO": ["grpo.py"], EQUAL: ["grpo.py"],
    "RLOO": ["grpo.py", "--baseline", "rloo"], "ReMax": ["grpo.py", "--baseline", "remax"]}
LONG = ("SPPO", "PPO", EQUAL)  # the algorithms that race over long responses
KEPT = ("group/all_equal", "critic/auc", "reward", "response_tokens",  # the metrics that race.json keeps
        *(f"critic/auc_tenth_{k}" for k in range(1, 11)))


@dataclass
class RaceConfig(CommandLine):
    model: str = option(BUILTIN_MODEL, "policy to train: a Hugging Face name or folder [the built-in models]")
    small_critic: str | None = option(None, "where the small critic starts from; without it, there is none")
    dataset: str = option("chain:1280", "as sppo.py's")
    output: str = option("runs/race", "folder of the runs")
    results: str | None = option(None, "folder for race.json, figures and tables [--output]")
    seeds: int = option(3, "runs of each algorithm", positive=True)
    lrs: tuple[str, ...] = option(("5e-7", "1e-6", "2e-6"), "learning rates to try, or one for all")
    steps: int = option(400, "training steps", positive=True)
    group_steps: int = option(100, "training steps of GRPO and RLOO, each with eight times the samples",
                              positive=True)
    prompts_per_step: int = option(256, "prompts of a step, for all", positive=True)
    minibatch: int = option(64, "prompts of an optimiser step, for all", positive=True)
    evaluations: int = option(20, "evaluations in a run", positive=True)
    long_steps: int = option(0, "training steps of the second race, on builtin/long; 0: none")
    ranks: int = option(1, "processes of each run (torchrun)", positive=True)
    threads: int = option(1, "threads of each process; more do not help the built-in models", positive=True)
    jobs: int = option(1, "runs at once; with more than idle cores, times mean nothing", positive=True)
    quick: bool = option(False, "one seed of SPPO and GRPO, at the middle learning rate")
    redraw: bool = option(False, "draw what --results holds, and train nothing")

    BUILTIN: ClassVar[dict] = dict(
        small_critic=f"{BUILTIN_MODEL}/small", results="results", lrs=("3.75e-5", "7.5e-5", "1.5e-4", "3e-4"),
        steps=40, group_steps=10, prompts_per_step=64, minibatch=16, evaluations=10, long_steps=20)

    def check(self):
        super().check()
        if self.prompts_per_step % self.minibatch or self.minibatch % GROUP:
            raise InputError(
                f"--minibatch {self.minibatch}: must divide --prompts-per-step {self.prompts_per_step} and "
                f"be a multiple of {GROUP}, so that groups of {GROUP} can make as many samples")


def race(c, extra):
    """Trains what has not been trained yet. extra: options for every run. Returns what race.json holds."""
    names = [name for name in ALGORITHMS if c.small_critic or name != "SPPO, small critic"]
    lrs, grid, long, seeds = dict.fromkeys(names, c.lrs[len(c.lrs) // 2]), [], [], range(c.seeds)
    if c.quick:
        names, seeds = ["SPPO", "GRPO"], range(1)
    elif len(c.lrs) > 1:
        grid = run_all((c, extra, name, lr, c.seeds, "grid") for lr in c.lrs for name in names)
        for name in names:
            lrs[name] = max(of(grid, name), key=lambda run: smooth(run["accuracy"])[-1])["lr"]
    part = "quick" if c.quick else "race"
    runs = run_all((c, extra, name, lrs[name], seed, part) for seed in seeds for name in names)
    if c.long_steps and not c.quick:
        long = run_all((c, extra, name, lrs[name], seed, "long") for seed in seeds for name in LONG)
    return {"settings": {k: str(v).replace(f"{ROOT}/", "") for k, v in asdict(c).items()}, "extra": extra,
            "machine": machine(), "grid": grid, "race": runs, "long": long}


def run_all(runs):
    """The records of all runs, in their order. runs: the arguments of `one_run` for each."""
    runs = list(runs)
    with ThreadPool(runs[0][0].jobs) as pool:
        return list(pool.imap(lambda run: one_run(*run), runs))


def one_run(c, extra, name, lr, seed, part):
    """The record of one run: accuracy over seconds, and metrics. A finished one is read again."""
    share = GROUP if name == EQUAL else 1
    steps = c.long_steps if part == "long" else c.group_steps if name in ("GRPO", "RLOO") else c.steps
    evaluations = 5 if part == "long" else c.evaluations  # they take long, there
    if part == "long":
        model = ["--model", f"{BUILTIN_MODEL}/long", "--max-response-tokens", 600]
    else:
        model = ["--model", c.model]
    critic = ["--critic-model", c.small_critic] if name == "SPPO, small critic" else []
    command = [
        *ALGORITHMS[name], *critic, *model, "--dataset", c.dataset, "--lr", lr, "--seed", seed,
        "--steps", steps, "--save-every", 0, "--eval-every", max(1, steps // evaluations),
        "--prompts-per-step", c.prompts_per_step // share, "--minibatch", c.minibatch // share, *extra]
    words = name.replace(",", "").replace(" + ", " ").split()
    folder = Path(c.output) / "-".join([part, *words, lr, str(seed)])
    lines = metrics_of(folder, command, c.ranks, c.threads)
    evaluated = [m for m in lines if "eval_accuracy" in m]
    say(f"{folder.name:<36} accuracy {evaluated[0]['eval_accuracy']:.3f} -> "
        f"{evaluated[-1]['eval_accuracy']:.3f} in {lines[-1]['seconds']:>4.0f} s")
    samples = GROUP if name in ("GRPO", EQUAL, "RLOO") else 2 if name == "ReMax" else 1
    return {"algorithm": name, "lr": lr, "seed": seed,
            "command": " ".join(map(str, command)).replace(f"{ROOT}/", ""),
            "seconds": [round(m["seconds"], 2) for m in evaluated],
            # None for SPO, which samples every prompt several times before its first step.
            "responses": None if name == "SPO" else [
                c.prompts_per_step // share * samples * m["step"] for m in evaluated],
            "accuracy": [round(m["eval_accuracy"], 4) for m in evaluated],
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


def quick_answer(runs):
    """One sentence: how long GRPO takes to its best accuracy, as a multiple of SPPO's time."""
    best = f"GRPO's best smoothed accuracy, {max(smooth(of(runs, 'GRPO')[0]['accuracy'])):.3f},"
    ratio, = speed(runs)["GRPO"]
    if ratio > 0:
        return f"To {best} GRPO takes {ratio:.1f} times as long as SPPO."
    # 0 if SPPO never reaches it; not a number if SPPO has it from the start.
    return f"{best} SPPO {'does not reach in' if ratio == 0 else 'has from the start of'} this race."


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    c, extra = RaceConfig.parse(__doc__, arguments[:cut]), arguments[cut + 1 :]
    with clear_errors():
        c.check()
        folder = Path(c.results or c.output)
        file = folder / "race.json"
        if c.redraw and not file.exists():
            raise InputError(f"{file}: there are no results to draw; run the race first (without --redraw)")
        results = json.loads(file.read_text()) if c.redraw else race(c, extra)
        if c.quick:
            say("\n" + quick_answer(results["race"]))
            return
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(results, indent=1) + "\n")
        draw(results, folder)
        (folder / "race.md").write_text(report(results))
        say("\n" + report(results) + f"\nFigures and tables are in {folder}.")


if __name__ == "__main__":
    main()
