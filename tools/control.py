"""The experiments of examples/control.py: each task, method and seed of PLAN, a figure and a table.

    python -m tools.control              what results/control.json lacks, and the figure: 7.7 hours of a core
    python -m tools.control --redraw     the figure and the table alone

Each run is written to results/control.json when it ends. So a command that was stopped goes on from there.
The table is in results/control.md.
"""
import argparse
import itertools
import json
import statistics
import time
from functools import partial
from pathlib import Path

from tools.race_results import markdown, pyplot, save, smooth

RESULTS = Path(__file__).resolve().parent.parent / "results"
METHODS = {"SPPO": ("-", "#08519c"), "PPO": ("--", "#d94801"), "PPO, not whitened": ("-.", "#fd8d3c"),
           "batch mean": (":", "#444444")}
# What might make PPO fail, as it does in the paper: (its baseline's settings, the training's, the clone's).
VARIATIONS = {
    "": ({}, {}, {}),
    "lambda 0.95": (dict(lam=0.95), {}, {}), "values clipped to 0.05": (dict(value_clip=0.05), {}, {}),
    "critic lr 1e-2": ({}, dict(critic_lr=1e-2), {}), "critic lr 1e-4": ({}, dict(critic_lr=1e-4), {}),
    "lr 3e-3": ({}, dict(lr=3e-3), {}), "clone at 0.02": ({}, {}, dict(target=0.02)),
    "clone at 0.1": ({}, {}, dict(target=0.1))}
# (task, updates, seeds, variations, methods). The paper has 312 updates of CartPole, 1,250 of MountainCar,
# 2,500 of Hopper, 1,875 of LunarLander and 2,500 of Pendulum. Here MountainCar is flat after 40.
# LunarLander (where SPPO is flat after 300) and Hopper are cut short. The expert of Hopper's seed 2 fails.
PLAN = [("MountainCar", 40, range(5), [""], METHODS), ("CartPole", 312, range(5), [""], METHODS),
        ("MountainCar", 40, range(3), [name for name in VARIATIONS if name != "clone at 0.1"], ["PPO"]),
        ("MountainCar", 40, range(3), ["lr 3e-3", "clone at 0.02"], ["SPPO"]),
        ("Pendulum", 2500, range(3), [""], METHODS),
        ("LunarLander", 380, range(3), [""], METHODS),
        ("LunarLander", 120, range(3), ["clone at 0.1"], ["SPPO", "PPO", "batch mean"]),
        ("Hopper", 300, (0, 1, 3), [""], METHODS)]


def run_missing(runs, write):
    import torch

    from examples import control
    torch.set_num_threads(1)
    for name, updates, seeds, settings, methods in PLAN:
        for seed, setting, method in itertools.product(seeds, settings, methods):
            key = dict(task=name, method=method, setting=setting, seed=seed)
            same = [run for run in runs if key.items() <= run.items()]
            if any(len(run["success"]) >= updates for run in same):
                continue
            of_baseline, of_training, of_clone = VARIATIONS[setting]
            task, policy = control.TASKS[name], control.start(name, seed, **of_clone)
            baseline, begin = partial(control.METHODS[method], **of_baseline), time.process_time()
            curve = control.train(task, policy, baseline, updates, seed, **of_training)
            runs[:] = [run for run in runs if run not in same]  # it had fewer updates than are planned now
            runs.append(dict(key, trajectories=task.batch, cpu_seconds=round(time.process_time() - begin, 1),
                             success=[round(x, 4) for x in curve]))
            write()
            print(*key.values(), f"{curve[0]:.2f} -> {final(runs[-1]):.2f}", sep=", ", flush=True)


def final(run):
    """The mean success over the last tenth of the updates."""
    return statistics.mean(run["success"][-max(1, len(run["success"]) // 10):])


def table(runs):
    """Markdown: the success at the end, mean and range over seeds, a row for each task and setting."""
    rows = []
    for name, setting in dict.fromkeys((run["task"], run["setting"]) for run in runs):
        some, cells = [run for run in runs if (run["task"], run["setting"]) == (name, setting)], []
        for method in METHODS:
            ends = [final(run) for run in some if run["method"] == method]
            cells.append(f"{statistics.mean(ends):.2f} [{min(ends):.2f}, {max(ends):.2f}]" if ends else "")
        numbers = sorted({run["trajectories"] * len(run["success"]) for run in some})
        number = " to ".join(f"{n:,}" for n in numbers)
        seeds, before = len({run["seed"] for run in some}), statistics.mean(run["success"][0] for run in some)
        title = f"{name}, {setting}" if setting else name
        rows.append((title, number, f"{seeds}", f"{before:.2f}", *cells))
    hours = sum(run["cpu_seconds"] for run in runs) / 3600
    return (f"`python -m tools.control`: {len(runs)} runs, {hours:.1f} hours of a core, and experts. Shares "
            "of successes, in the first update and in the last tenth of a run; mean [lowest, highest] of the "
            "seeds.\n\n"
            + markdown(("task", "trajectories", "seeds", "before", *METHODS), rows) + "\n")


def draw(plt, runs):
    """A panel for each task: success over trajectories, mean and range over seeds; of the longest runs."""
    longest = {run["task"]: len(run["success"]) for run in sorted(runs, key=lambda run: len(run["success"]))}
    runs = [run for run in runs if not run["setting"] and len(run["success"]) == longest[run["task"]]]
    names = list(dict.fromkeys(run["task"] for run in runs))
    figure, panels = plt.subplots(1, len(names), figsize=(2 + 2.6 * len(names), 2.8), sharey=True,
                                  squeeze=False)
    for axes, name in zip(panels[0], names, strict=True):
        for method, (line, colour) in METHODS.items():
            if not (some := [run for run in runs if (run["task"], run["method"]) == (name, method)]):
                continue
            rows = [smooth(run["success"], max(5, len(run["success"]) // 30)) for run in some]
            columns = list(zip(*rows, strict=False))  # to the shortest
            x = [some[0]["trajectories"] * (i + 1) for i in range(len(columns))]
            axes.plot(x, list(map(statistics.mean, columns)), line, color=colour, label=method)
            axes.fill_between(x, list(map(min, columns)), list(map(max, columns)), color=colour, alpha=0.12,
                              linewidth=0)
        seeds = len({run["seed"] for run in runs if run["task"] == name})
        axes.set(title=f"{name}, seeds: {seeds}", xlabel="trajectories", ylim=(0, 1.02))
    panels[0][0].set_ylabel("share of successes")
    panels[0][-1].legend(*panels[0][0].get_legend_handles_labels(), fontsize=8, loc="center left",
                         bbox_to_anchor=(1, 0.5))
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--redraw", action="store_true", help="only draw what was run")
    file, args = RESULTS / "control.json", parser.parse_args()
    runs = json.loads(file.read_text()) if file.exists() else []

    def write():
        new = file.with_suffix(".new")
        new.write_text("[\n" + ",\n".join(map(json.dumps, runs)) + "\n]\n")
        new.replace(file)  # so that a command stopped here leaves the file as it was

    if not args.redraw:
        run_missing(runs, write)
    ends = table(runs)
    (RESULTS / "control.md").write_text(ends)
    print(ends)
    plt = pyplot()
    save(plt, {"control": draw(plt, runs)}, RESULTS)


if __name__ == "__main__":
    main()
