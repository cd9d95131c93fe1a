"""What the runs of a race say: the time to a target, and the tables and figures of tools/race.py.

A run is a dictionary: algorithm, seed and lr; accuracy, seconds and responses at each evaluation; and the
metrics of each step.
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


def speed(runs, reference="GRPO", clock="seconds"):
    """{algorithm: a ratio per seed}: its time to the reference's best smoothed accuracy on that seed, divided
    by SPPO's. Infinite if it never gets there, 0 if SPPO does not, nan if neither does or all begin there."""
    by_seed = {}
    for run in runs:
        if run[clock]:
            by_seed.setdefault(run["seed"], {})[run["algorithm"]] = run
    ratios = {}
    for contest in by_seed.values():
        target = max(smooth(contest[reference]["accuracy"]))
        sppo = cost_to(contest["SPPO"], target, clock)
        for name, run in contest.items():
            cost = cost_to(run, target, clock)
            ratio = cost / sppo if 0 < sppo < math.inf else 0.0 if cost < sppo else math.nan
            ratios.setdefault(name, []).append(ratio)
    return ratios


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
    """Markdown: final accuracy, speed and what the samples bought, by algorithm."""
    columns = ("algorithm", "learning rate", "accuracy, end", "seconds", "responses",
               "time to GRPO's best, SPPO = 1", "responses to it", "time to GRPO's best, equal samples",
               "AUC of V(prompt)", "groups without gradient")
    to_grpo, by_responses, to_equal = (
        speed(runs, reference, clock) if of(runs, reference) else {}
        for reference, clock in (("GRPO", "seconds"), ("GRPO", "responses"), (EQUAL, "seconds")))
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
                     f"{seeds[0]['responses'][-1]:,}" if seeds[0]["responses"] else "",
                     *(ratio_text(ratios.get(name, [])) for ratios in (to_grpo, by_responses, to_equal)),
                     late("critic/auc"), late("group/all_equal")))
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
    seeds = results["settings"]["seeds"]
    parts = [f"`python -m tools.race` on {results['machine']}, {seeds} seeds: means ± half "
             "of the 95 % interval, or medians [lowest, highest]. Accuracy is smoothed over "
             f"{WINDOW} evaluations.\n", table(results["race"])]
    if results["long"]:
        parts += ["\nLong responses (`builtin/long`):\n", table(results["long"])]
    if results["grid"]:
        parts += ["\nThe grid: smoothed accuracy at the end, on a seed of its own.\n",
                  grid_table(results["grid"])]
    return "\n".join(parts) + "\n"


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
    save(plt, {"race": draw_accuracy(plt, results["race"]), "long": draw_accuracy(plt, results["long"]),
               "groups": draw_groups(plt, results["race"]), "tail": draw_tail(plt, results)}, folder)


def band(axes, x, rows, name):
    """A line for the mean over seeds, and a band from lowest to highest. rows: values [seeds, len(x)]."""
    marker, line, colour = STYLES[name]
    points = list(zip(*rows, strict=True))
    mean, low, high = ([f(values) for values in points] for f in (statistics.mean, min, max))
    every = max(1, len(x) // 12)
    axes.plot(x, mean, marker=marker, linestyle=line, color=colour, label=name, markevery=every)
    axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)


def draw_accuracy(plt, runs):
    """Accuracy against seconds of training."""
    if not runs:
        return None
    figure, axes = plt.subplots(figsize=(6.4, 4))
    for name in names_in(runs):
        seconds = [statistics.mean(s) for s in zip(*(run["seconds"] for run in of(runs, name)), strict=True)]
        band(axes, seconds, [smooth(run["accuracy"]) for run in of(runs, name)], name)
    axes.set(xlabel="seconds of training", ylabel="accuracy on held-out problems", ylim=(None, 1))
    axes.legend(loc="lower right", fontsize=8)
    return figure


def draw_groups(plt, runs):
    """The share of groups without gradient, as training goes on."""
    names = [name for name in names_in(runs) if "group/all_equal" in of(runs, name)[0]["metrics"]]
    if not names:
        return None
    figure, axes = plt.subplots(figsize=(6.4, 3))
    for name in names:
        rows = [run["metrics"]["group/all_equal"] for run in of(runs, name)]
        band(axes, [(i + 1) / len(rows[0]) for i in range(len(rows[0]))], rows, name)
    axes.set(xlabel="share of the training done", ylabel="groups whose samples\nall earned the same",
             ylim=(0, 1))
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def draw_tail(plt, results):
    """The tail effect: AUC of a token-level critic's values along the response, and the prompt critic's."""
    parts = [part for part in ("race", "long") if of(results[part], "PPO") or of(results[part], "PPO + BCE")]
    if not parts:
        return None
    figure, all_axes = plt.subplots(1, len(parts), figsize=(6.4, 3), sharey=True, squeeze=False)
    for axes, part in zip(all_axes[0], parts, strict=True):
        for name in ("PPO", "PPO + BCE"):
            if runs := of(results[part], name):
                keys = [f"critic/auc_tenth_{k}" for k in range(1, 11)]
                tenths = [[mean_of(run["metrics"][key]) for key in keys] for run in runs]
                band(axes, [k / 10 - 0.05 for k in range(1, 11)], tenths, name)
        for name in ("SPPO", "SPPO, small critic"):
            if runs := of(results[part], name):
                band(axes, [0.0], [[mean_of(run["metrics"]["critic/auc"])] for run in runs], name)
        lengths = [mean_of(run["metrics"]["response_tokens"]) for run in of(results[part], "PPO")]
        axes.set(xlabel="position in the response", xlim=(-0.05, 1),
                 title=f"responses of {statistics.mean(lengths):.0f} tokens")
    all_axes[0][0].set_ylabel("AUC of the critic's value")
    handles, labels = all_axes[0][0].get_legend_handles_labels()  # the first race has all
    all_axes[0][-1].legend(handles, labels, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
