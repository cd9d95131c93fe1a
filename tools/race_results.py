"""What the runs of a race say: the cost to a target, and the tables, claims and figures of tools/race.py.

A run is a dictionary: algorithm, learning rate, seed and prompts per step; accuracy, seconds and responses at
each evaluation; seconds by phase; and the metrics of each step.
"""
import math
import statistics

GROUP = 8  # samples per prompt of GRPO and RLOO
EQUAL = "GRPO at equal responses"  # as many responses per step as SPPO, so an eighth of the prompts
CONSTANT = "a constant"  # a running mean of the rewards in the critic's place
STYLES = {  # name: line, colour; tables have this order
    "SPPO": ("-", "#000000"), "SPPO, small critic": ("--", "#000000"), CONSTANT: ("-.", "#00796b"),
    "SPO": ("-.", "#6a51a3"), "PPO": ("-", "#2171b5"), "PPO + BCE": ("--", "#2171b5"),
    "GRPO": ("-", "#d94801"), EQUAL: ("--", "#d94801"), "RLOO": (":", "#8c2d04"), "ReMax": (":", "#41ab5d")}
FIRST = "SPPO", CONSTANT, "GRPO", EQUAL  # README's figure
NAMED = "SPPO", "SPO", "PPO", "GRPO", EQUAL  # in the figure of all algorithms, where the others are grey
TARGET = 0.7  # accuracy
WINDOW = 3  # evaluations; smoothed accuracy is their mean
NEAR = 0.95  # GRPO's best counts as reached at this share of it: the best of many evaluations was also lucky


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


def at_end(run):
    return smooth(run["accuracy"])[-1]


def cost_to(run, target, clock="seconds"):
    """Seconds of training, or responses sampled, until smoothed accuracy is at `target`, or infinity."""
    evaluations = zip(run[clock], smooth(run["accuracy"]), strict=True)
    return next((cost for cost, accuracy in evaluations if accuracy >= target), math.inf)


def speed(runs, clock="seconds", target=None):
    """{algorithm: a ratio per seed}: its cost to the target, divided by SPPO's.

    The target is an accuracy, or else that of GRPO's best on this seed and batch. 0 where SPPO never reaches
    it, not a number where it has it from the start.
    """
    contests, ratios = {}, {}  # {(prompts per step, seed): {algorithm: run}}
    for run in runs:
        contests.setdefault((run["prompts"], run["seed"]), {})[run["algorithm"]] = run
    for contest in contests.values():
        goal = target or NEAR * max(smooth(contest["GRPO"]["accuracy"]))
        sppo = cost_to(contest["SPPO"], goal, clock)
        for name, run in contest.items():
            cost = cost_to(run, goal, clock)
            ratio = cost / sppo if 0 < sppo < math.inf else 0.0 if cost < sppo else math.nan
            ratios.setdefault(name, []).append(ratio)
    return ratios


def best_rates(grid):
    """{algorithm: the learning rate with the best smoothed accuracy at the end}."""
    return {run["algorithm"]: run["lr"] for run in sorted(grid, key=at_end)}


def protocols(results):
    """{title: runs}: the race at one rate for all and, after a grid, each of its algorithms at its best."""
    if "race" not in results:
        return {}
    runs, one = results["race"]["runs"], results["race"]["settings"]["lr"]
    found = {f"One learning rate for all, {one}": [run for run in runs if run["lr"] == one]}
    best = best_rates(results["grid"]["runs"]) if "grid" in results else {}
    chosen = [run for run in runs if run["lr"] == best.get(run["algorithm"])]
    if best and {*names_in(chosen)} == best.keys():
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
    """Median [lowest, highest] of the seeds that can be compared. Where SPPO never got there, there is no
    ratio, and the text says on how many seeds."""
    failed, count = ratios.count(0.0), len(ratios)
    ratios = [r for r in ratios if r > 0]
    note = f"SPPO never on {failed} of {count} seeds" if failed else ""
    if not ratios:
        return note or "–"

    def text(r):
        return "never" if r == math.inf else f"{r:.1f}"
    span = f" [{text(min(ratios))}, {text(max(ratios))}]" if len(ratios) > 1 else ""
    return text(statistics.median(ratios)) + span + (note and f"; {note}")


def accuracy_text(runs):
    mean, half = student_interval([at_end(run) for run in runs])
    return f"{mean:.3f}" + (f" ± {half:.3f}" if len(runs) > 1 else "")


def markdown(columns, rows):
    """A table, without the columns that are empty throughout."""
    kept = [i for i in range(len(columns)) if any(row[i] not in ("", "–") for row in rows)]
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line[i] for i in kept)} |" for line in lines)


def table(runs):
    """Markdown: final accuracy, cost to GRPO's best and what the samples bought, by algorithm."""
    columns = ("algorithm", "learning rate", "accuracy, end", "seconds", "responses", "ms per response",
               "responses to GRPO's best, SPPO = 1", "seconds to it", "AUC of V(prompt)", "its skill",
               "groups all right", "groups all wrong")
    by_responses, by_seconds = speed(runs, "responses"), speed(runs)
    rows = []
    for name in names_in(runs):
        seeds = of(runs, name)

        def late(key, seeds=seeds):
            """The mean over the later half of the steps."""
            series = [run["metrics"].get(key, []) for run in seeds]
            return f"{mean_of(v for s in series for v in s[len(s) // 2 :]):.2f}" if series[0] else ""
        each = statistics.mean(1000 * sum(run["phases"].values()) / run["responses"][-1] for run in seeds)
        rows.append((name, seeds[0]["lr"], accuracy_text(seeds),
                     f"{statistics.mean(run['seconds'][-1] for run in seeds):.0f}",
                     f"{seeds[0]['responses'][-1]:,}", f"{each:.1f}",
                     ratio_text(by_responses[name]), ratio_text(by_seconds[name]),
                     *map(late, ("critic/auc", "critic/skill", "group/all_right", "group/all_wrong"))))
    return markdown(columns, rows)


def batch_table(batches, constant):
    """Markdown, by prompts per step: GRPO's responses to TARGET over SPPO's; then responses to TARGET, seed
    by seed, and accuracy at the end."""
    columns = ["prompts per step", f"GRPO / SPPO, responses to {TARGET}"]
    for name in "SPPO", CONSTANT:
        columns += [f"{name}: responses to {TARGET}", "accuracy, end"]
    rows = []
    for size in sorted({run["prompts"] for run in batches}):
        some = [run for run in batches if run["prompts"] == size]
        rows.append([f"{size}", ratio_text(speed(some, "responses", TARGET)["GRPO"])])
        for seeds in of(some, "SPPO"), [run for run in constant if run["prompts"] == size]:
            costs = [cost_to(run, TARGET, "responses") for run in seeds]
            rows[-1] += ["; ".join("never" if cost == math.inf else f"{cost:,}" for cost in costs),
                         accuracy_text(seeds) if seeds else ""]
    return markdown(columns, rows)


def report(results):
    """The text of race.md."""
    parts = ["Accuracy is smoothed: the mean of an evaluation and the two before it. `±` is half of the 95 % "
             "interval over seeds; ratios are medians [lowest, highest] of the seeds. GRPO's best counts as "
             f"reached at {NEAR:.0%} of it.\n"]

    def heading(text, *made):
        parts.append(f"\n## {text}\n")
        for part in made:
            command = "python -m tools.race" + (f" --part {part}" if part != "race" else "")
            seeds = len({run["seed"] for run in results[part]["runs"]})
            parts.append(f"`{command}` on {results[part]['machine']}; seeds: {seeds}.\n")
    if {"race", "batches"} <= results.keys():
        parts.append("\n## What it says of the papers' claims\n")
        parts.append(markdown(("claim", "here"), [*claims(results).items()]))
    for title, runs in protocols(results).items():
        heading(title, "race")
        parts.append(table(runs))
    if "batches" in results:
        heading("By the batch", "batches", *(part for part in ("constant",) if part in results))
        parts.append(batch_table(results["batches"]["runs"], results.get("constant", {"runs": []})["runs"]))
    if "grid" in results:
        heading("The grid: smoothed accuracy at the end", "grid")
        grid = results["grid"]["runs"]
        ends = {(run["algorithm"], run["lr"]): f"{at_end(run):.3f}" for run in grid}
        lrs = list(dict.fromkeys(run["lr"] for run in grid))
        parts.append(markdown(["algorithm", *lrs], [
            [name, *(ends[name, lr] for lr in lrs)] for name in names_in(grid)]))
    return "\n".join(parts) + "\n"


def claims(results):
    """{what the papers claim: what the race says of it}, as README has it. Needs the race and the batches."""
    runs = next(iter(protocols(results).values()))

    def beside(*names, other="SPPO"):
        """How much higher these end than another, seed by seed: all meet the same held-out problems."""
        def text(name):
            pairs = zip(of(runs, name), of(runs, other), strict=True)
            mean, half = student_interval([at_end(a) - at_end(b) for a, b in pairs])
            return f"{name} {mean:+.3f} ± {half:.3f}"
        return f"Accuracy at the end, minus {other}'s: " + ", ".join(map(text, names))

    def share(key, place):
        return f"{mean_of(run['metrics'][key][place] for run in of(runs, 'GRPO')):.0%}"

    def tenth(k):
        return mean_of(v for run in of(runs, "PPO") for v in run["metrics"][f"critic/auc_tenth_{k}"])

    def ratios(clock, some=runs, target=None):
        return ratio_text(speed(some, clock, target)["GRPO"])

    def at_best(chosen):
        rates = ", ".join(f"{name} {of(chosen, name)[0]['lr']}" for name in ("SPPO", "GRPO"))
        return (f"Each at its best rate ({rates}), GRPO needs {ratios('responses', chosen)} times SPPO's "
                f"responses and {ratios('seconds', chosen)} times its seconds")
    batches = {}
    for run in sorted(results["batches"]["runs"], key=lambda run: run["prompts"]):
        batches.setdefault(run["prompts"], []).append(run)
    return {
        "SPPO is faster than GRPO": f"To {NEAR:.0%} of GRPO's best, GRPO needs {ratios('responses')} times "
                                    f"SPPO's responses and {ratios('seconds')} times its seconds, at "
                                    f"{runs[0]['prompts']} prompts per step",
        **{title.lower(): at_best(chosen) for title, chosen in list(protocols(results).items())[1:]},
        "the batch decides": f"Responses to accuracy {TARGET}, GRPO / SPPO: " + ", ".join(
            f"{ratios('responses', some, TARGET)} at {size}" for size, some in batches.items())
            + " prompts per step",
        "SPPO ends as high as GRPO and PPO": beside("GRPO", "RLOO", "PPO"),
        "a small critic is enough": beside("SPPO, small critic"),
        "PPO sees the answer coming": f"AUC of PPO's values {tenth(1):.2f} in the first tenth of a "
                                      f"response, {tenth(10):.2f} in the last",
        "PPO with BCE collapses": beside("PPO + BCE", other="PPO"),
        "GRPO's groups degenerate": f"All right: from {share('group/all_right', 0)} of the groups to "
                                    f"{share('group/all_right', -1)}; all wrong: from "
                                    f"{share('group/all_wrong', 0)} to {share('group/all_wrong', -1)}",
        "a tracker can replace the critic": beside("SPO", other="GRPO")}


# ---- figures -----------------------------------------------------------------------------------------------

def pyplot():
    """matplotlib.pyplot, in the one style of all our figures, which reads in black and white."""
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({
        "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "grid.color": "#e4e4e4", "lines.linewidth": 1.6, "legend.frameon": False, "svg.hashsalt": "race",
        "figure.dpi": 150, "savefig.bbox": "tight", "figure.constrained_layout.use": True})
    return plt


def save(plt, figures, folder):
    """Writes {name: figure} as PNG and SVG into a folder, and closes them."""
    for name, figure in figures.items():
        # Without dates and versions, the same results give the same bytes.
        for kind, about in (("png", {"Software": None}), ("svg", {"Date": None})):
            figure.savefig(folder / f"{name}.{kind}", metadata=about)
        plt.close(figure)


def draw(results, folder):
    """Writes the figures for which there are results."""
    plt, figures = pyplot(), {}
    runs = next(iter(protocols(results).values()), [])
    size = max((run["prompts"] for run in runs), default=0)
    if runs:
        figures["race"], axes = plt.subplots(figsize=(7, 3.8))
        draw_accuracy(axes, runs, names_in(runs))
    if of(runs, "GRPO") and of(runs, "GRPO")[0]["metrics"].get("group/all_right"):
        figures["groups"], axes = plt.subplots(figsize=(5, 2.6))
        draw_groups(axes, of(runs, "GRPO"))
    constant = results["constant"]["runs"] if "constant" in results else []
    first = runs if of(runs, CONSTANT) else runs + [run for run in constant if run["prompts"] == size]
    if {*FIRST} <= {*names_in(first)}:
        figures["first"], axes = plt.subplots(figsize=(7, 3.4))
        draw_accuracy(axes, first, FIRST, TARGET)
    if runs and "batches" in results:
        figures["batches"], (left, right) = plt.subplots(1, 2, figsize=(8, 3.2))
        draw_accuracy(left, runs, ("SPPO", "GRPO"), TARGET)
        left.set_title(f"{size} prompts per step", loc="left", fontsize=9)
        draw_ratios(right, results["batches"]["runs"])
    save(plt, figures, folder)


def band(axes, x, rows, colour, line="-", shade=0.12):
    """A line for the mean over seeds, and a band from lowest to highest. rows: values [seeds, len(x)].
    Returns where the line ends, and the top of the band there."""
    points = list(zip(*rows, strict=True))
    mean, low, high = ([f(values) for values in points] for f in (statistics.mean, min, max))
    axes.plot(x, mean, line, color=colour, zorder=3 if shade else 2)
    axes.fill_between(x, low, high, color=colour, alpha=shade, linewidth=0)
    return x[-1], mean[-1], high[-1]


def draw_accuracy(axes, runs, names, target=None):
    """Smoothed accuracy over responses. The lines of NAMED and FIRST are named at their ends, others grey."""
    # All begin with the same model, so they share its evaluations on the same seed's problems.
    start = {seed: statistics.mean(run["accuracy"][0] for run in runs if run["seed"] == seed)
             for seed in {run["seed"] for run in runs}}
    ends = {}  # {responses: [(accuracy at the end, top of the band, name, colour)]}
    for name in names:
        seeds, (line, colour) = of(runs, name), STYLES[name]
        rows = [smooth([start[run["seed"]], *run["accuracy"][1:]]) for run in seeds]
        if name in NAMED + FIRST:
            x, *end = band(axes, seeds[0]["responses"], rows, colour, line)
            ends.setdefault(x, []).append((*end, name, colour))
        else:
            band(axes, seeds[0]["responses"], rows, "#b5b5b5", line, shade=0)
    for x, here in ends.items():  # names above each other, in the order of the lines
        top = max(high for _, high, *_ in here)
        for place, (_, _, name, colour) in enumerate(sorted(here)):
            axes.text(x, top + 0.015 + 0.05 * place, name, color=colour, fontsize=8.5,
                      ha="right" if x == max(ends) and len(ends) > 1 else "center")
    if target:
        axes.axhline(target, color="black", linewidth=0.8, linestyle=":")
        axes.text(1, target, f"{target} ", ha="right", va="bottom", fontsize=8,
                  transform=axes.get_yaxis_transform())
    axes.set(ylabel="accuracy on held-out problems", ylim=(None, 1))
    over_responses(axes)


def over_responses(axes):
    axes.set(xlabel="responses sampled", xlim=(0, None))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k" if x else "0")


def draw_ratios(axes, batches):
    """GRPO's responses to the target, SPPO's = 1, against the batch."""
    sizes = sorted({run["prompts"] for run in batches})
    alike = [[run for run in batches if run["prompts"] == size] for size in sizes]
    seeds = [[r for r in speed(runs, "responses", TARGET)["GRPO"] if 0 < r < math.inf] for runs in alike]
    middle = [statistics.median(ratios) for ratios in seeds]
    errors = [[m - min(ratios) for m, ratios in zip(middle, seeds, strict=True)],
              [max(ratios) - m for m, ratios in zip(middle, seeds, strict=True)]]
    axes.errorbar(sizes, middle, errors, fmt="o-", color="black", capsize=3, markersize=4)
    for height, text in ((GROUP**0.5, "√8"), (GROUP, "8"), (1, "SPPO")):
        axes.axhline(height, color="#d94801", linewidth=0.8, linestyle=":")
        axes.text(1.01, height, text, color="#d94801", va="center", transform=axes.get_yaxis_transform())
    axes.set(xscale="log", xlabel="prompts per step", ylim=(0, GROUP + 0.5))
    axes.set_title(f"GRPO's responses to {TARGET}, SPPO's = 1", loc="left", fontsize=9)
    axes.set_xticks(sizes, map(str, sizes))
    axes.minorticks_off()


def draw_groups(axes, runs):
    """The share of GRPO's groups without gradient, as training goes on."""
    for key, name, line in (("all_right", "all right: too easy", "-"),
                            ("all_wrong", "all wrong: too hard", "--")):
        rows = [run["metrics"][f"group/{key}"] for run in runs]
        steps = len(rows[0])
        x = [runs[0]["responses"][-1] * (step + 1) / steps for step in range(steps)]
        _, end, _ = band(axes, x, rows, STYLES["GRPO"][1], line)
        axes.text(x[-1], end + 0.05, name, ha="right", color=STYLES["GRPO"][1], fontsize=8.5)
    axes.set(ylabel=f"share of the groups of {GROUP}", ylim=(0, 1))
    over_responses(axes)
