"""The figures of tools/race.py, and the one style of all our figures."""
import math
import statistics

from tools.race_results import GROUP, STYLES, mean_of, names_in, of, protocols, smooth, speed


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
    for clock, target, marker, line in (("responses", 0.7, "o", "-"), ("responses", None, "^", "-."),
                                        ("seconds", None, "s", "--")):
        lows, middles, highs = [], [], []
        for size in sizes:
            some = [run for run in batches if run["prompts"] == size]
            every = speed(some, clock=clock, target=target)["GRPO"]
            ratios = [r for r in every if 0 < r < math.inf] or [math.nan]
            if every.count(0.0) and clock == "responses" and not target:  # there is no ratio on these seeds
                right.text(size, 0.1, f"SPPO never\non {every.count(0.0)} of {len(every)}", fontsize=7,
                           ha="center")
            lows.append(min(ratios))
            middles.append(statistics.median(ratios))
            highs.append(max(ratios))
        errors = [[m - low for m, low in zip(middles, lows, strict=True)],
                  [high - m for m, high in zip(middles, highs, strict=True)]]
        shift = {"o": 0.96, "^": 1.0, "s": 1.04}[marker]  # so that ranges do not cover each other
        right.errorbar([size * shift for size in sizes], middles, errors, marker=marker, linestyle=line,
                       color="#888888" if clock == "seconds" else "black", capsize=3,
                       label=f"{clock} to {target}" if target else f"{clock} to GRPO's best")
    for height, text in ((GROUP**0.5, "√8"), (GROUP, "8")):
        right.axhline(height, color="#d94801", linewidth=0.8, linestyle=":")
        right.text(1.01, height, text, color="#d94801", va="center", transform=right.get_yaxis_transform())
    right.set(xscale="log", xlabel="prompts a step", ylim=(0, GROUP + 2.5),
              title="cost: GRPO / SPPO")
    right.set_xticks(sizes, map(str, sizes), minor=False)
    right.minorticks_off()
    right.legend(fontsize=8, loc="upper right")
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
    axes.set(xlabel="position in the response", ylabel="AUC of the critic's value", xlim=(-0.05, 1),
             ylim=(0.5, 1))  # from guessing to knowing
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
