"""What the runs of a race say: the cost to a target, and the tables and figures of tools/race.py.

A run is a dictionary: algorithm, learning rate, seed and prompts a step; accuracy, seconds and responses at
each evaluation; seconds by phase; and the metrics of each step.
"""
import math
import statistics

EQUAL = "GRPO, equal samples"  # as many responses a step as SPPO, so an eighth of the prompts
STYLES = {  # name: marker, line, colour; tables and legends have this order
    "SPPO": ("o", "-", "#000000"), "SPPO, small critic": ("s", "--", "#000000"),
    "SPO": ("D", "-.", "#6a51a3"), "PPO": ("^", "-", "#2171b5"), "PPO + BCE": ("v", "--", "#2171b5"),
    "GRPO": ("x", "-", "#d94801"), EQUAL: ("+", "--", "#d94801"),
    "RLOO": ("*", ":", "#8c2d04"), "ReMax": ("P", ":", "#41ab5d")}
WINDOW = 3  # evaluations; smoothed accuracy is their mean


# ---- arithmetic --------------------------------------------------------------------------------------------

def of(runs, name):
    return [run for run in runs if run["algorithm"] == name]


def names_in(runs):
    return [name for name in STYLES if of(runs, name)]


def mean_of(values):
    return statistics.mean(v for v in values if v is not None)


def smooth(accuracy):
    """The mean of each evaluation and the WINDOW - 1 before it (fewer at the start)."""
    return [statistics.mean(accuracy[max(0, i - WINDOW + 1) : i + 1]) for i in range(len(accuracy))]


def cost_to(run, target, clock="seconds"):
    """Seconds of training, or responses sampled, until smoothed accuracy is at `target`, or infinity."""
    evaluations = zip(run[clock], smooth(run["accuracy"]), strict=True)
    return next((cost for cost, accuracy in evaluations if accuracy >= target), math.inf)


def contests(runs):
    """{(prompts a step, seed): {algorithm: run}}: the runs that compete with each other."""
    found = {}
    for run in runs:
        found.setdefault((run["prompts"], run["seed"]), {})[run["algorithm"]] = run
    return found


def speed(runs, reference="GRPO", clock="seconds", target=None):
    """{algorithm: a ratio per seed}: its cost to the target, divided by SPPO's.

    target: an accuracy, or None for the reference's best smoothed accuracy on that seed. A ratio is infinite
    if the algorithm never gets there, 0 if SPPO does not, nan if neither does or all begin there.
    """
    ratios = {}
    for contest in contests(runs).values():
        goal = target or max(smooth(contest[reference]["accuracy"]))
        sppo = cost_to(contest["SPPO"], goal, clock)
        for name, run in contest.items():
            cost = cost_to(run, goal, clock)
            ratio = cost / sppo if 0 < sppo < math.inf else 0.0 if cost < sppo else math.nan
            ratios.setdefault(name, []).append(ratio)
    return ratios


def best_rates(grid):
    """{algorithm: the learning rate with the best smoothed accuracy at the end}."""
    best = {}
    for run in sorted(grid, key=lambda run: smooth(run["accuracy"])[-1]):
        best[run["algorithm"]] = run["lr"]
    return best


def protocols(results):
    """{title: runs}: the race at one rate for all and, after the grid, at each algorithm's best rate."""
    if "race" not in results:
        return {}
    runs, one = results["race"]["runs"], results["race"]["settings"]["lr"]
    found = {f"One learning rate for all, {one}": [run for run in runs if run["lr"] == one]}
    if "grid" in results:
        best = best_rates(results["grid"]["runs"])
        chosen = [run for run in runs if run["lr"] == best[run["algorithm"]]]
        if names_in(chosen) == names_in(runs):
            found["Each algorithm at its best rate of the grid"] = chosen
    return found


def student_interval(values):
    """(mean, half of its 95 % interval) over seeds, by Student's t distribution."""
    if len(values) < 2:
        return statistics.mean(values), math.nan
    quantiles = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447}
    quantile = quantiles.get(len(values), 1.96 + 2.8 / (len(values) - 1))  # beyond 7, correct to 1 %
    return statistics.mean(values), quantile * statistics.stdev(values) / len(values) ** 0.5


# ---- tables ------------------------------------------------------------------------------------------------

def ratio_text(ratios):
    """Median [lowest, highest] of the seeds that can be compared."""
    ratios = [r for r in ratios if not math.isnan(r)]
    if not ratios:
        return "–"

    def text(r):
        return "never" if r == math.inf else f"{r:.1f}" if r else "SPPO never"
    span = f" [{text(min(ratios))}, {text(max(ratios))}]" if len(ratios) > 1 else ""
    return text(statistics.median(ratios)) + span


def table(runs):
    """Markdown: final accuracy, cost to GRPO's best and what the samples bought, by algorithm."""
    columns = ("algorithm", "learning rate", "accuracy, end", "seconds", "responses",
               "responses to GRPO's best, SPPO = 1", "seconds to it", "AUC of V(prompt)", "its skill",
               "groups all right", "groups all wrong")
    by_responses, by_seconds = (speed(runs, clock=clock) for clock in ("responses", "seconds"))
    rows = []
    for name in names_in(runs):
        seeds = of(runs, name)
        mean, half = student_interval([smooth(run["accuracy"])[-1] for run in seeds])

        def late(key, seeds=seeds):
            """The mean over the later half of the steps."""
            series = [run["metrics"].get(key, []) for run in seeds]
            return f"{mean_of(v for s in series for v in s[len(s) // 2 :]):.2f}" if series[0] else ""
        rows.append((name, seeds[0]["lr"], f"{mean:.3f}" + (f" ± {half:.3f}" if len(seeds) > 1 else ""),
                     f"{statistics.mean(run['seconds'][-1] for run in seeds):.0f}",
                     f"{seeds[0]['responses'][-1]:,}",
                     ratio_text(by_responses[name]), ratio_text(by_seconds[name]),
                     *map(late, ("critic/auc", "critic/skill", "group/all_right", "group/all_wrong"))))
    return markdown(columns, rows)


def phase_table(runs):
    """Markdown: milliseconds of each phase for a response, by algorithm."""
    phases = list(runs[0]["phases"])
    rows = []
    for name in names_in(runs):
        seeds = of(runs, name)
        each = [statistics.mean(1000 * run["phases"][p] / run["responses"][-1] for run in seeds)
                for p in phases]
        rows.append((name, *(f"{ms:.1f}" for ms in each), f"{sum(each):.1f}"))
    return markdown(("algorithm", *phases, "together"), rows)


def level_table(runs, levels=(0.5, 0.6, 0.7, 0.75, 0.8)):
    """Markdown: GRPO's cost over SPPO's to several accuracies, by prompts a step."""
    rows = []
    for size in sorted({run["prompts"] for run in runs}):
        some = [run for run in runs if run["prompts"] == size]
        for clock in ("responses", "seconds"):
            rows.append((f"{size}", clock, *(
                ratio_text(speed(some, clock=clock, target=level)["GRPO"]) for level in (*levels, None))))
    columns = ("prompts a step", "cost in", *(f"to {level}" for level in levels), "to GRPO's best")
    return markdown(columns, rows)


def markdown(columns, rows):
    """A table, without the columns that are empty throughout."""
    kept = [i for i in range(len(columns)) if any(row[i] not in ("", "–") for row in rows)]
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line[i] for i in kept)} |" for line in lines)


def grid_table(grid):
    """Markdown: the smoothed accuracy at the end, by algorithm and learning rate."""
    lrs = list(dict.fromkeys(run["lr"] for run in grid))
    ends = {(run["algorithm"], run["lr"]): smooth(run["accuracy"])[-1] for run in grid}
    return markdown(["algorithm", *lrs], [
        [name, *(f"{ends[name, lr]:.3f}" for lr in lrs)] for name in names_in(grid)])


def report(results):
    """The text of race.md."""
    parts = ["Accuracy is smoothed: the mean of an evaluation and the two before it. `±` is half of the 95 % "
             "interval over seeds; ratios are medians [lowest, highest] of the seeds.\n"]

    def heading(part, text):
        command = "python -m tools.race" + (f" --part {part}" if part != "race" else "")
        seeds = len({run["seed"] for run in results[part]["runs"]})
        parts.append(f"\n## {text}\n\n`{command}` on {results[part]['machine']}; seeds: {seeds}.\n")
    for title, runs in protocols(results).items():
        heading("race", title)
        parts += [table(runs), "\nMilliseconds for a response, by phase:\n", phase_table(runs)]
    if "batches" in results:
        heading("batches", "GRPO's cost, SPPO = 1, by the batch")
        parts.append(level_table(results["batches"]["runs"]))
    if "grid" in results:
        heading("grid", "The grid: smoothed accuracy at the end")
        parts.append(grid_table(results["grid"]["runs"]))
    return "\n".join(parts) + "\n"


def quick_answer(runs):
    """One sentence: what GRPO's best accuracy costs it, as a multiple of SPPO's cost."""
    best = f"GRPO's best smoothed accuracy, {max(smooth(of(runs, 'GRPO')[0]['accuracy'])):.3f},"
    (responses,), (seconds,) = (speed(runs, clock=clock)["GRPO"] for clock in ("responses", "seconds"))
    if responses > 0:
        return (f"To {best} GRPO takes {responses:.1f} times as many responses as SPPO, and {seconds:.1f} "
                "times as long.")
    # 0 if SPPO never reaches it; not a number if SPPO has it from the start.
    return f"{best} SPPO {'does not reach in' if responses == 0 else 'has from the start of'} this race."


# ---- figures -----------------------------------------------------------------------------------------------

def pyplot():
    """matplotlib.pyplot, in the one style of all our figures, which reads in black and white."""
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({
        "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "grid.color": "#dddddd", "lines.linewidth": 1.4, "lines.markersize": 4, "legend.frameon": False,
        "svg.hashsalt": "race", "figure.dpi": 150, "savefig.bbox": "tight"})
    return plt


def save(plt, figures, folder):
    """Writes {name: figure, or None} as PNG and SVG into a folder, and closes them."""
    for name, figure in figures.items():
        if figure:
            # Without dates and versions, the same results give the same bytes.
            for kind, about in (("png", {"Software": None}), ("svg", {"Date": None})):
                figure.savefig(folder / f"{name}.{kind}", metadata=about)
            plt.close(figure)


def draw(results, folder):
    """Writes every figure of a race."""
    plt = pyplot()
    runs = next(iter(protocols(results).values()), [])
    batches = results["batches"]["runs"] if "batches" in results else []
    save(plt, {"race": draw_accuracy(plt, protocols(results)), "groups": draw_groups(plt, runs),
               "tail": draw_tail(plt, runs), "batches": draw_batches(plt, runs, batches)}, folder)


def band(axes, x, rows, name):
    """A line for the mean over seeds, and a band from lowest to highest. rows: values [seeds, len(x)]."""
    marker, line, colour = STYLES[name]
    points = list(zip(*rows, strict=True))
    mean, low, high = ([f(values) for values in points] for f in (statistics.mean, min, max))
    every = max(1, len(x) // 12)
    axes.plot(x, mean, marker=marker, linestyle=line, color=colour, label=name, markevery=every)
    axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)


def curve(axes, runs, name, clock):
    """Smoothed accuracy over seconds or responses."""
    x = [statistics.mean(values) for values in zip(*(run[clock] for run in of(runs, name)), strict=True)]
    band(axes, x, [smooth(run["accuracy"]) for run in of(runs, name)], name)


def draw_accuracy(plt, protocols):
    """Accuracy over responses and over seconds, a row for each protocol."""
    if not protocols:
        return None
    figure, rows = plt.subplots(len(protocols), 2, figsize=(8, 3.4 * len(protocols)), squeeze=False,
                                sharey=True)
    for (title, runs), row in zip(protocols.items(), rows, strict=True):
        for axes, clock in zip(row, ("responses", "seconds"), strict=True):
            for name in names_in(runs):
                curve(axes, runs, name, clock)
            axes.set(xlabel={"responses": "responses sampled", "seconds": "seconds of training"}[clock])
        row[0].set_title(title, loc="left", fontsize=9)
        row[0].set(ylabel="accuracy, held-out problems", ylim=(None, 1))
        row[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    return figure


def draw_batches(plt, runs, batches):
    """The point: SPPO and GRPO at the papers' batch, and the ratio of their costs against the batch."""
    if not batches:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2))
    size = max({run["prompts"] for run in runs} or {run["prompts"] for run in batches})
    runs = runs or [run for run in batches if run["prompts"] == size]
    for name in ("SPPO", "GRPO"):
        curve(left, runs, name, "responses")
    left.set(xlabel="responses sampled", ylabel="accuracy, held-out problems", ylim=(None, 1),
             title=f"{size} prompts a step")
    left.legend(loc="lower right", fontsize=8)
    sizes = sorted({run["prompts"] for run in batches})
    for clock, marker, line in (("responses", "o", "-"), ("seconds", "s", "--")):
        ratios = [[r for r in speed([run for run in batches if run["prompts"] == size], clock=clock)["GRPO"]
                   if 0 < r < math.inf] for size in sizes]
        shown = [(size, r) for size, r in zip(sizes, ratios, strict=True) if r]
        middle = [statistics.median(r) for _, r in shown]
        right.errorbar([size for size, _ in shown], middle, marker=marker, linestyle=line, color="black",
                       capsize=3, label=f"in {clock}",
                       yerr=[[m - min(r) for m, (_, r) in zip(middle, shown, strict=True)],
                             [max(r) - m for m, (_, r) in zip(middle, shown, strict=True)]])
    right.axhline(1, color="#888888", linewidth=0.8)
    right.set(xscale="log", xlabel="prompts a step", ylim=(0, None),
              title="cost to GRPO's best: GRPO / SPPO")
    right.set_xticks(sizes, map(str, sizes), minor=False)
    right.minorticks_off()
    right.legend(fontsize=8)
    figure.tight_layout()
    return figure


def draw_groups(plt, runs):
    """The share of groups without gradient, as training goes on: all right or all wrong."""
    names = [name for name in names_in(runs) if of(runs, name)[0]["metrics"].get("group/all_right")]
    if not names:
        return None
    figure, panels = plt.subplots(1, 2, figsize=(8, 2.8), sharey=True)
    for axes, key, title in zip(panels, ("group/all_right", "group/all_wrong"),
                                ("all samples right: too easy", "all samples wrong: too hard"), strict=True):
        for name in names:
            rows = [run["metrics"][key] for run in of(runs, name)]
            band(axes, [(i + 1) / len(rows[0]) for i in range(len(rows[0]))], rows, name)
        axes.set(xlabel="share of the training done", ylim=(0, 1), title=title)
    panels[0].set_ylabel("share of the groups")
    panels[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def draw_tail(plt, runs):
    """The tail effect: AUC of a token-level critic's values along the response, and the prompt critic's."""
    names = [name for name in ("PPO", "PPO + BCE") if of(runs, name)]
    if not names:
        return None
    figure, axes = plt.subplots(figsize=(5, 3))
    for name in names:
        keys = [f"critic/auc_tenth_{k}" for k in range(1, 11)]
        tenths = [[mean_of(run["metrics"][key]) for key in keys] for run in of(runs, name)]
        band(axes, [k / 10 - 0.05 for k in range(1, 11)], tenths, name)
    for name in ("SPPO", "SPPO, small critic"):
        if some := of(runs, name):
            band(axes, [0.0], [[mean_of(run["metrics"]["critic/auc"])] for run in some], name)
    axes.set(xlabel="position in the response", ylabel="AUC of the critic's value", xlim=(-0.05, 1))
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
