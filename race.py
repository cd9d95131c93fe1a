"""The race: every algorithm on the same problems, and the papers' figures drawn from what happened.

    python race.py                            all of it on the built-in models; killed, it goes on where it stopped
    python race.py --quick                    one seed of SPPO and GRPO: how much sooner is SPPO as good as GRPO at its best?
    python race.py --redraw                   figures and tables from the committed results, without training
    python race.py --model M --dataset D -- --max-response-tokens 8192 ...      any model; after --, options for every run

Every run is a command that a user could give, in a process of its own; they take turns, so that a busy machine hurts
all alike. All have the same loop, engine, optimiser, prompts per step and evaluation. What differs is the algorithm and
its learning rate, chosen for each from the same grid by whole runs on a seed that the race does not use (runs of half the
length chose rates that later diverged); with one rate in --lrs, all have that one. The race over long responses has the
same rates.
Time is that of training steps: evaluations are no part of it.
"""
import json
import os
import shutil
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

from cli import CommandLine, clear_errors, option, say
from data import BUILTIN_MODEL, InputError

ROOT = Path(__file__).resolve().parent
GROUP = 8  # samples per prompt of GRPO and RLOO
EQUAL = "GRPO, equal samples"  # as many responses a step as SPPO, so an eighth of the prompts
ALGORITHMS = {  # name: (script and options, marker, line, shade)
    "SPPO": (["sppo.py"], "o", "-", "#000000"), "SPPO, small critic": (["sppo.py"], "s", "--", "#000000"),
    "SPO": (["spo.py"], "D", "-.", "#6a51a3"), "PPO": (["ppo.py"], "^", "-", "#2171b5"),
    "PPO + BCE": (["ppo.py", "--value-loss", "bce"], "v", "--", "#2171b5"), "GRPO": (["grpo.py"], "x", "-", "#d94801"),
    EQUAL: (["grpo.py"], "+", "--", "#d94801"), "RLOO": (["grpo.py", "--baseline", "rloo"], "*", ":", "#8c2d04"),
    "ReMax": (["grpo.py", "--baseline", "remax"], "P", ":", "#41ab5d")}
LONG = ("SPPO", "PPO", EQUAL)  # who races over long responses
WINDOW = 3  # evaluations; smoothed accuracy is their mean
KEPT = ("group/all_equal", "critic/auc", "reward", "response_tokens", *(f"critic/auc_tenth_{k}" for k in range(1, 11)))


@dataclass
class Config(CommandLine):
    model: str = option(BUILTIN_MODEL, "policy to train: a Hugging Face name or folder (default: the built-in models)")
    small_critic: str | None = option(None, "where the small critic starts from; without it, that algorithm stays at home")
    dataset: str = option("chain:1280", "as sppo.py's")
    output: str = option("runs/race", "folder of the runs")
    results: str | None = option(None, "folder for race.json, figures and tables [built-in models: results; else --output]")
    seeds: int = option(3, "runs of each algorithm")
    lrs: tuple[str, ...] = option(("5e-7", "1e-6", "2e-6"), "learning rates that each algorithm is tried with, or one for all")
    steps: int = option(400, "training steps")
    group_steps: int = option(100, "training steps of GRPO and RLOO, which sample eight times as much in each")
    prompts_per_step: int = option(256, "prompts of a step, for all")
    minibatch: int = option(64, "prompts of an optimiser step, for all")
    evaluations: int = option(20, "evaluations in a run")
    long_steps: int = option(0, "training steps of the second race, over the long responses of builtin/long; 0: none")
    ranks: int = option(1, "processes of each run (torchrun)")
    threads: int = option(1, "threads of each process; the built-in models only wait for more")
    jobs: int = option(1, "runs at once; no more than there are idle cores, or times mean nothing")
    quick: bool = option(False, "one seed of SPPO and GRPO, at the middle learning rate")
    redraw: bool = option(False, "draw what --results holds, and train nothing")

    BUILTIN = dict(small_critic=f"{BUILTIN_MODEL}/small", results="results", lrs=("3.75e-5", "7.5e-5", "1.5e-4", "3e-4"),
                   steps=40, group_steps=10, prompts_per_step=64, minibatch=16, evaluations=10, long_steps=20)

    def check(self):
        for name in ("seeds", "steps", "group_steps", "prompts_per_step", "minibatch", "evaluations", "ranks", "threads",
                     "jobs"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be greater than 0")
        if self.prompts_per_step % self.minibatch or self.minibatch % GROUP:
            raise InputError(f"--minibatch {self.minibatch}: must divide --prompts-per-step {self.prompts_per_step} and be a "
                             f"multiple of {GROUP}, so that groups of {GROUP} can make as many samples")


# ---- running --------------------------------------------------------------------------------------------------------

def race(c, extra):
    """Runs what has not run yet. Returns what race.json holds."""
    names = [n for n in ALGORITHMS if c.small_critic or n != "SPPO, small critic"]
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
    """The records of `one_run`'s arguments, in their order."""
    runs = list(runs)
    with ThreadPool(runs[0][0].jobs) as pool:
        return list(pool.imap(lambda run: one_run(*run), runs))


def one_run(c, extra, name, lr, seed, part):
    """The record of one run, which is made unless the same command has run before: accuracy over seconds, and metrics."""
    share = GROUP if name == EQUAL else 1
    steps = c.long_steps if part == "long" else c.group_steps if name in ("GRPO", "RLOO") else c.steps
    command = [
        *ALGORITHMS[name][0], *(["--critic-model", c.small_critic] if name == "SPPO, small critic" else []),
        *(["--model", f"{BUILTIN_MODEL}/long", "--max-response-tokens", 600] if part == "long" else ["--model", c.model]),
        "--dataset", c.dataset,
        "--lr", lr, "--seed", seed, "--steps", steps, "--save-every", 0,
        "--eval-every", max(1, steps // (5 if part == "long" else c.evaluations)),  # they take long, there
        "--prompts-per-step", c.prompts_per_step // share, "--minibatch", c.minibatch // share, *extra]
    folder = Path(c.output) / "-".join([part, *name.replace(",", "").replace(" + ", " ").split(), lr, str(seed)])
    lines = metrics_of(folder, command, c.ranks, c.threads)
    evaluated = [m for m in lines if "eval_accuracy" in m]
    say(f"{folder.name:<36} accuracy {evaluated[0]['eval_accuracy']:.3f} -> {evaluated[-1]['eval_accuracy']:.3f} in "
        f"{lines[-1]['seconds']:>4.0f} s")
    each = c.prompts_per_step // share * (GROUP if name in ("GRPO", EQUAL, "RLOO") else 2 if name == "ReMax" else 1)
    return {"algorithm": name, "lr": lr, "seed": seed, "command": " ".join(map(str, command)).replace(f"{ROOT}/", ""),
            "seconds": [round(m["seconds"], 2) for m in evaluated],
            "responses": None if name == "SPO" else [each * m["step"] for m in evaluated],  # SPO begins with many
            "accuracy": [round(m["eval_accuracy"], 4) for m in evaluated],
            "metrics": {key: [m[key] and round(m[key], 4) for m in lines if key in m] for key in KEPT if key in lines[-1]}}


def metrics_of(folder, command, ranks=1, threads=1):
    """The lines of metrics.jsonl after `python COMMAND --output FOLDER`, with `ranks` processes of `threads` each; it is not
    run again if it has run before. (Only the command is compared. After a change of the code, begin with an empty folder.)"""
    (script, *options), file = [str(word) for word in command], folder / "command.json"
    this = {"command": [script, *options], "ranks": ranks, "threads": threads}
    if not (file.exists() and json.loads(file.read_text()) == this):
        shutil.rmtree(folder, ignore_errors=True)
        launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        ended = subprocess.run([sys.executable, *launcher, str(ROOT / script), *options, "--output", str(folder)], text=True,
                               capture_output=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
        if ended.returncode or not (folder / "model").exists():  # a run that was told to stop has none, and ends with 0
            raise InputError(f"`python {' '.join(this['command'])}` ended with code {ended.returncode} before its last step; "
                             f"the same command goes on from here. It said: {ended.stderr.strip()[-1500:]}")
        shutil.rmtree(folder / "model", ignore_errors=True)
        file.write_text(json.dumps(this))  # last: a run that was killed has none
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def machine():
    import torch
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    return f"{os.cpu_count()} cores ({models[0] if models else 'CPU'}), no GPU"


# ---- what the runs say ----------------------------------------------------------------------------------------------

def smooth(accuracy):
    """The mean of each evaluation and the WINDOW - 1 before it (fewer at the start)."""
    return [statistics.mean(accuracy[max(0, i - WINDOW + 1) : i + 1]) for i in range(len(accuracy))]


def cost_to(run, target, clock="seconds"):
    """Seconds of training, or responses sampled, until smoothed accuracy reaches `target`; infinite if it never does."""
    return next((s for s, a in zip(run[clock], smooth(run["accuracy"]), strict=True) if a >= target), float("inf"))


def speed(runs, reference="GRPO", clock="seconds"):
    """{algorithm: a ratio per seed}: its seconds to the reference's best smoothed accuracy on that seed, over SPPO's.
    Infinite if it never gets there, 0 if SPPO does not, nan if neither does, or all begin there."""
    by_seed = {}
    for run in runs:
        if run[clock]:
            by_seed.setdefault(run["seed"], {})[run["algorithm"]] = run
    ratios = {}
    for contest in by_seed.values():
        target = max(smooth(contest[reference]["accuracy"]))
        ours = cost_to(contest["SPPO"], target, clock)
        for name, run in contest.items():
            theirs = cost_to(run, target, clock)
            comparable = 0 < ours < float("inf")
            ratios.setdefault(name, []).append(theirs / ours if comparable else 0.0 if theirs < ours else float("nan"))
    return ratios


def interval(values):
    """(mean, half of its 95 % interval): Student's, over seeds."""
    if len(values) < 2:
        return statistics.mean(values), float("nan")
    quantile = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447}.get(len(values), 1.96 + 2.8 / (len(values) - 1))
    return statistics.mean(values), quantile * statistics.stdev(values) / len(values) ** 0.5


def of(runs, name):
    return [run for run in runs if run["algorithm"] == name]


def names_in(runs):
    return [name for name in ALGORITHMS if of(runs, name)]


def ratio_text(ratios):
    """Median [lowest, highest] of the seeds that can be compared."""
    ratios = [r for r in ratios if r == r]
    if not ratios:
        return "–"

    def text(r):
        return "never" if r == float("inf") else f"{r:.1f}" if r else "SPPO never"
    return text(statistics.median(ratios)) + (f" [{text(min(ratios))}, {text(max(ratios))}]" if len(ratios) > 1 else "")


def table(runs):
    """Markdown: final accuracy, speed and what the samples bought, by algorithm."""
    columns = ("algorithm", "learning rate", "accuracy, end", "seconds", "responses", "time to GRPO's best, SPPO = 1",
               "responses to it", "time to GRPO's best, equal samples", "AUC of V(prompt)", "groups without gradient")
    to_grpo, by_responses, to_equal = (speed(runs, reference, clock) if of(runs, reference) else {} for reference, clock in (
        ("GRPO", "seconds"), ("GRPO", "responses"), (EQUAL, "seconds")))
    rows = []
    for name in names_in(runs):
        mine = of(runs, name)
        mean, half = interval([smooth(run["accuracy"])[-1] for run in mine])

        def late(key, mine=mine):
            """The mean over the later half of the steps."""
            series = [run["metrics"].get(key, []) for run in mine]
            return f"{mean_of(v for s in series for v in s[len(s) // 2 :]):.2f}" if series[0] else ""
        rows.append((name, mine[0]["lr"], f"{mean:.3f}" + (f" ± {half:.3f}" if len(mine) > 1 else ""),
                     f"{statistics.mean(r['seconds'][-1] for r in mine):.0f}",
                     f"{mine[0]['responses'][-1]:,}" if mine[0]["responses"] else "", ratio_text(to_grpo.get(name, [])),
                     ratio_text(by_responses.get(name, [])), ratio_text(to_equal.get(name, [])), late("critic/auc"),
                     late("group/all_equal")))
    return markdown(columns, rows)


def markdown(columns, rows):
    """A table, without the columns that are empty throughout."""
    kept = [i for i in range(len(columns)) if any(row[i] not in ("", "–") for row in rows)]
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line[i] for i in kept)} |" for line in lines)


def grid_table(grid):
    lrs = list(dict.fromkeys(run["lr"] for run in grid))
    return markdown(["algorithm", *lrs], [
        [name, *(f"{smooth(next(r for r in of(grid, name) if r['lr'] == lr)['accuracy'])[-1]:.3f}" for lr in lrs)]
        for name in names_in(grid)])


# ---- figures --------------------------------------------------------------------------------------------------------

def draw(results, folder):
    """Every figure as PNG and SVG, in one style that reads in black and white."""
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
                         "grid.color": "#dddddd", "lines.linewidth": 1.4, "lines.markersize": 4, "legend.frameon": False,
                         "svg.hashsalt": "race", "figure.dpi": 150, "savefig.bbox": "tight"})

    def save(figure, name):
        for kind, about in (("png", {"Software": None}), ("svg", {"Date": None})):  # the same bytes each time
            figure.savefig(folder / f"{name}.{kind}", metadata=about)
        plt.close(figure)

    def band(axes, x, rows, name):
        """The mean over seeds, and from the lowest to the highest."""
        _, marker, line, shade = ALGORITHMS[name]
        mean = [statistics.mean(values) for values in zip(*rows, strict=True)]
        axes.plot(x, mean, marker=marker, linestyle=line, color=shade, label=name, markevery=max(1, len(x) // 12))
        axes.fill_between(x, [min(v) for v in zip(*rows, strict=True)], [max(v) for v in zip(*rows, strict=True)], color=shade,
                          alpha=0.12, linewidth=0)

    def curves(axes, runs):
        for name in names_in(runs):
            mine = of(runs, name)
            seconds = [statistics.mean(s) for s in zip(*(run["seconds"] for run in mine), strict=True)]
            band(axes, seconds, [smooth(run["accuracy"]) for run in mine], name)
        axes.set(xlabel="seconds of training", ylabel="accuracy on held-out problems", ylim=(None, 1))
        axes.legend(loc="lower right", fontsize=8)

    for part in ("race", "long"):
        if results[part]:
            figure, axes = plt.subplots(figsize=(6.4, 4))
            curves(axes, results[part])
            save(figure, part)
    groups = [n for n in names_in(results["race"]) if "group/all_equal" in of(results["race"], n)[0]["metrics"]]
    if groups:
        figure, axes = plt.subplots(figsize=(6.4, 3))
        for name in groups:
            rows = [run["metrics"]["group/all_equal"] for run in of(results["race"], name)]
            band(axes, [(i + 1) / len(rows[0]) for i in range(len(rows[0]))], rows, name)
        axes.set(xlabel="share of the training done", ylabel="groups whose samples\nall earned the same", ylim=(0, 1))
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        save(figure, "groups")
    tails = [(part, n) for part in ("race", "long") for n in ("PPO", "PPO + BCE") if of(results[part], n)]
    if tails:
        parts = list(dict.fromkeys(part for part, _ in tails))
        figure, all_axes = plt.subplots(1, len(parts), figsize=(6.4, 3), sharey=True, squeeze=False)
        for axes, part in zip(all_axes[0], parts, strict=True):
            for name in (n for p, n in tails if p == part):
                rows = [[mean_of(run["metrics"][f"critic/auc_tenth_{k}"]) for k in range(1, 11)]
                        for run in of(results[part], name)]
                band(axes, [k / 10 - 0.05 for k in range(1, 11)], rows, name)
            for name in ("SPPO", "SPPO, small critic"):
                if of(results[part], name):
                    values = [mean_of(run["metrics"]["critic/auc"]) for run in of(results[part], name)]
                    band(axes, [0.0], [[v] for v in values], name)
            length = statistics.mean(mean_of(run["metrics"]["response_tokens"]) for run in of(results[part], "PPO"))
            axes.set(xlabel="position in the response", title=f"responses of {length:.0f} tokens", xlim=(-0.05, 1))
        all_axes[0][0].set_ylabel("AUC of the critic's value")
        handles, labels = all_axes[0][0].get_legend_handles_labels()  # the first race has all of them, the long one not
        all_axes[0][-1].legend(handles, labels, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        save(figure, "tail")


def mean_of(values):
    return statistics.mean(v for v in values if v is not None)


def report(results):
    seeds = results["settings"]["seeds"]
    parts = [f"`python race.py` on {results['machine']}, {seeds} seeds: means ± half of the 95 % interval, or medians [lowest, "
             f"highest]. Accuracy is smoothed over {WINDOW} evaluations.\n", table(results["race"])]
    if results["long"]:
        parts += ["\nLong responses (`builtin/long`):\n", table(results["long"])]
    if results["grid"]:
        parts += ["\nThe grid: smoothed accuracy at the end, on a seed of its own.\n",
                  grid_table(results["grid"])]
    return "\n".join(parts) + "\n"


def main():
    arguments = sys.argv[1:]
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    c, extra = Config.parse(__doc__, arguments[:cut]), arguments[cut + 1 :]
    c.check()
    folder = Path(c.results or c.output)
    file = folder / "race.json"
    if c.redraw and not file.exists():
        raise InputError(f"{file}: there are no results to draw; run the race first (without --redraw)")
    results = json.loads(file.read_text()) if c.redraw else race(c, extra)
    if c.quick:
        ratios = speed(results["race"])
        best = max(smooth(of(results["race"], "GRPO")[0]["accuracy"]))
        (ratio,), say_it = ratios["GRPO"], f"GRPO's best smoothed accuracy, {best:.3f}, "
        say("\n" + (f"To {say_it}GRPO takes {ratio:.1f} times as long as SPPO." if ratio > 0 else  # not if nan
                    f"{say_it}SPPO {'does not reach in' if ratio == 0 else 'has from the start of'} this race."))
        return
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, indent=1) + "\n")
    draw(results, folder)
    (folder / "race.md").write_text(report(results))
    say("\n" + report(results) + f"\nFigures and tables are in {folder}.")


if __name__ == "__main__":
    with clear_errors():
        main()
