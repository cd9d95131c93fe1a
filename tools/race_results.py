"""What the runs of a race say: the cost to a target, and the tables and figures of tools/race.py.

A run is a dictionary: algorithm, learning rate, seed and prompts per step; accuracy, seconds and responses at
each evaluation; seconds by phase; and the metrics of each step.
"""
import math
import statistics

GROUP = 8  # samples per prompt of GRPO and RLOO
EQUAL = "GRPO at equal responses"  # as many responses per step as SPPO, so an eighth of the prompts
CONSTANT = "a constant"  # a running mean of the rewards in the critic's place
ORACLE = "an oracle"  # each prompt's chance of success, measured with 32 more responses that are not counted
BASELINES = CONSTANT, "SPO", "SPPO", ORACLE  # for one response per prompt, from the worst to the best
STYLES = {  # name: line, colour; tables have this order
    "SPPO": ("-", "#000000"), "SPPO, small critic": ("--", "#000000"), CONSTANT: ("-.", "#00796b"),
    ORACLE: (":", "#00796b"), "SPO": ("-.", "#6a51a3"), "PPO": ("-", "#2171b5"),
    "PPO + BCE": ("--", "#2171b5"), "GRPO": ("-", "#d94801"), EQUAL: ("--", "#c51b8a"),
    "RLOO": (":", "#8c2d04"), "ReMax": (":", "#41ab5d")}
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


def smooth(values, window=WINDOW):
    """The mean of each value and the window - 1 before it (fewer at the start)."""
    return [statistics.mean(values[max(0, i - window + 1) : i + 1]) for i in range(len(values))]


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
        if "SPPO" not in contest or not (target or "GRPO" in contest):  # a seed of some algorithms only
            continue
        goal = target or NEAR * max(smooth(contest["GRPO"]["accuracy"]))
        sppo = cost_to(contest["SPPO"], goal, clock)
        for name, run in contest.items():
            cost = cost_to(run, goal, clock)
            ratio = cost / sppo if 0 < sppo < math.inf else 0.0 if cost < sppo else math.nan
            ratios.setdefault(name, []).append(ratio)
    return ratios


def best_rates(grid):
    """{algorithm: the learning rate with the best smoothed accuracy at the end, on average of the seeds}."""
    ends = {}
    for run in grid:
        ends.setdefault((run["algorithm"], run["lr"]), []).append(at_end(run))
    return dict(sorted(ends, key=lambda key: statistics.mean(ends[key])))


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


def merged(old, new):
    """The runs of both, and of the same run the new one."""
    keys = "algorithm", "lr", "seed", "prompts"
    return list({tuple(run[key] for key in keys): run for run in [*old, *new]}.values())


def by_batch(results):
    """The runs of the race at its one rate, and those of --part batches, which may have the same and more."""
    race = results.get("race", {"runs": []})
    return merged([run for run in race["runs"] if run["algorithm"] in ("GRPO", EQUAL, *BASELINES)
                   and run["lr"] == race["settings"]["lr"]], results.get("batches", {"runs": []})["runs"])


def student_interval(values):
    """(mean, half of its 95 % interval) over seeds, by Student's t distribution."""
    if len(values) < 2:
        return statistics.mean(values), math.nan
    quantiles = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447}
    quantile = quantiles.get(len(values), 1.96 + 2.8 / (len(values) - 1))  # beyond 7, correct to 1 %
    return statistics.mean(values), quantile * statistics.stdev(values) / len(values) ** 0.5


def difference(runs, name, other):
    """(mean, half of its 95 % interval) of `paired`."""
    return student_interval(paired(runs, name, other))


def paired(runs, name, other):
    """How much higher `name` ends than `other`, on each seed and batch that both have: there, all meet the
    same held-out problems."""
    others = {(run["prompts"], run["seed"]): at_end(run) for run in of(runs, other)}
    return [at_end(run) - others[run["prompts"], run["seed"]] for run in of(runs, name)
            if (run["prompts"], run["seed"]) in others]


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
            values = [v for s in series for v in s[len(s) // 2 :] if v is not None]
            return f"{statistics.mean(values):.2f}" if values else ""
        each = statistics.mean(1000 * sum(run["phases"].values()) / run["responses"][-1] for run in seeds)
        seconds, each, ratio = (f"{statistics.mean(run['seconds'][-1] for run in seeds):.0f}", f"{each:.1f}",
                                ratio_text(by_seconds[name]))
        if seeds[0]["machine"] != runs[0]["machine"]:  # then they tell nothing of the algorithm
            seconds = each = ratio = ""
        rows.append((name, seeds[0]["lr"], accuracy_text(seeds), seconds,
                     f"{seeds[0]['responses'][-1]:,}", each, ratio_text(by_responses[name]), ratio,
                     *map(late, ("critic/auc", "critic/skill", "group/all_right", "group/all_wrong"))))
    return markdown(columns, rows)


def cost_text(runs, target):
    """Responses to a target: median [lowest, highest] of the seeds."""
    costs = [cost_to(run, target, "responses") for run in runs]

    def text(cost):
        return "never" if cost == math.inf else f"{cost:,.0f}"
    return f"{text(statistics.median(costs))} [{text(min(costs))}, {text(max(costs))}]"


def batch_table(runs):
    """Markdown, for each number of prompts per step and each algorithm: responses to TARGET, accuracy at the
    end, and the variance of its advantages over all steps."""
    rows = []
    for size in sorted({run["prompts"] for run in runs}):
        some = [run for run in runs if run["prompts"] == size]
        for name in names_in(some):
            seeds = of(some, name)
            # Others divide their advantages by a standard deviation.
            squares = [value for run in seeds for value in run["metrics"].get("advantage/variance", [])
                       if name in (CONSTANT, "SPPO", ORACLE)]
            rows.append((f"{size}", name, seeds[0]["lr"], f"{len(seeds)}", cost_text(seeds, TARGET),
                         accuracy_text(seeds), f"{statistics.mean(squares):.3f}" if squares else ""))
    return markdown(("prompts per step", "algorithm", "learning rate", "seeds", f"responses to {TARGET}",
                     "accuracy, end", "variance of A"), rows)


def ratios_by_batch(runs):
    """How many times SPPO's responses GRPO needs to TARGET, at each number of prompts per step."""
    both = [run for run in runs if run["algorithm"] in ("SPPO", "GRPO")]
    sizes = sorted({run["prompts"] for run in of(both, "GRPO")})
    texts = [ratio_text(speed([run for run in both if run["prompts"] == size], "responses", TARGET)["GRPO"])
             for size in sizes]
    return ", ".join(f"{text} at {size}" for text, size in zip(texts, sizes, strict=True))


def variances(runs, size):
    """{baseline: (predicted, measured) variance of its advantages} on the batches of the oracle's runs, over
    all steps; the first part of each prediction is the same noise, which comes with it."""
    def mean(name):
        return mean_of(v for run in of(runs, ORACLE) if run["prompts"] == size
                       for v in run["metrics"][f"oracle/{name}"])
    noise = mean("noise")
    return noise, {CONSTANT: (noise + mean("spread"), mean("variance_constant")),
                   "SPPO": (noise + mean("critic_error"), mean("variance_critic")),
                   ORACLE: (noise, mean("variance_oracle"))}


def variance_table(runs):
    """Markdown: what theory predicts of the variance of R - b, and what was measured."""
    rows = []
    for size in sorted({run["prompts"] for run in of(runs, ORACLE)}):
        noise, found = variances(runs, size)
        rows.append((f"{size}", f"{noise:.3f}", *(f"{predicted:.3f}, {measured:.3f}"
                                                  for predicted, measured in found.values())))
    return markdown(("prompts per step", "E[p(1 − p)]", f"{CONSTANT}: predicted, measured",
                     "V(prompt)", ORACLE), rows)


def report(results):
    """The text of race.md."""
    parts = ["Accuracy is smoothed: the mean of an evaluation and the two before it. `±` is half of the 95 % "
             "interval over seeds; ratios are medians [lowest, highest] of the seeds. GRPO's best counts as "
             f"reached at {NEAR:.0%} of it.\n"]

    def heading(text, *made):
        parts.append(f"\n## {text}\n")
        for part in made:
            commands = results[part].get("commands", [f"python -m tools.race --part {part}"])
            commands = ", ".join(f"`{command}`" for command in commands)
            seeds = len({run["seed"] for run in results[part]["runs"]})
            machines = " and ".join(sorted({run["machine"] for run in results[part]["runs"]}))
            parts.append(f"{commands} on {machines}; seeds: {seeds}.\n")
    for title, runs in protocols(results).items():
        heading(title, "race")
        parts.append(table(runs))
    if "batches" in results:
        runs = by_batch(results)
        heading("By the batch", "batches")
        parts.append(batch_table(runs))
        if of(runs, "GRPO"):
            parts.append(f"\nResponses to {TARGET}, GRPO / SPPO: {ratios_by_batch(runs)} prompts per step.")
        if of(runs, ORACLE):
            parts += ["\nThe variance of A on the oracle's batches:\n", variance_table(runs)]
    if "contrast" in results:
        heading("Chains of 1 and of 14 operations only", "contrast")
        parts.append(batch_table(results["contrast"]["runs"]))
    if "grid" in results:
        heading("The grid: smoothed accuracy at the end", "grid")
        grid = results["grid"]["runs"]
        lrs = sorted({run["lr"] for run in grid}, key=float)
        parts.append(markdown(["algorithm", *lrs], [
            [name, *(accuracy_text([run for run in of(grid, name) if run["lr"] == lr]) for lr in lrs)]
            for name in names_in(grid)]))
    return "\n".join(parts) + "\n"


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
    if runs:
        figures["race"], axes = plt.subplots(figsize=(7, 3.8))
        draw_accuracy(axes, runs, names_in(runs), NAMED)
    batches = by_batch(results)
    if {*FIRST} <= {*names_in(runs)}:  # at the race's batch, also on the seeds that only --part batches has
        alike = [run for run in batches if run["prompts"] == runs[0]["prompts"]]
        figures["first"], axes = plt.subplots(figsize=(7, 3.4))
        draw_accuracy(axes, alike, FIRST, FIRST, TARGET)
    if {*BASELINES} <= {*names_in(batches)}:
        figures["batches"], (left, right) = plt.subplots(1, 2, figsize=(8, 3.4), width_ratios=(3, 2))
        draw_costs(left, batches)
        draw_variances(right, batches)
    save(plt, figures, folder)


def band(axes, x, rows, colour, line="-", shade=0.12):
    """A line for the mean over seeds, and a band from lowest to highest. rows: values [seeds, len(x)].
    Returns where the line ends, and the top of the band there."""
    points = list(zip(*rows, strict=True))
    mean, low, high = ([f(values) for values in points] for f in (statistics.mean, min, max))
    axes.plot(x, mean, line, color=colour, zorder=3 if shade else 2)
    axes.fill_between(x, low, high, color=colour, alpha=shade, linewidth=0)
    return x[-1], mean[-1], high[-1]


def draw_accuracy(axes, runs, names, named, target=None):
    """Smoothed accuracy over responses. The lines of `named` are named at their ends, others are grey."""
    # All begin with the same model, so they share its evaluations on the same seed's problems.
    start = {seed: statistics.mean(run["accuracy"][0] for run in runs if run["seed"] == seed)
             for seed in {run["seed"] for run in runs}}
    ends = {}  # {responses: [(accuracy at the end, top of the band, name, colour)]}
    for name in names:
        seeds, (line, colour) = of(runs, name), STYLES[name]
        rows = [smooth([start[run["seed"]], *run["accuracy"][1:]]) for run in seeds]
        if name in named:
            x, *end = band(axes, seeds[0]["responses"], rows, colour, line)
            sample = {"-": "—", "--": "– –", "-.": "–·–"}[line]
            ends.setdefault(x, []).append((*end, f"{sample} {name}", colour))
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
    axes.set(xlabel="responses sampled", xlim=(0, None))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k" if x else "0")


def draw_costs(axes, runs):
    """Responses to TARGET by baseline: a dot for each seed, a bar for the median, a colour for each batch.
    Seeds that never get there stand above the dotted line."""
    names = CONSTANT, EQUAL, "SPPO", ORACLE, "SPO"
    sizes = sorted({run["prompts"] for run in of(runs, CONSTANT)})
    never = 1.35 * max(run["responses"][-1] for name in names for run in of(runs, name))
    for place, (size, colour) in enumerate(zip(sizes, ("#e8850c", "#2171b5", "#222222"), strict=False)):
        for number, name in enumerate(names):
            x = number + 0.2 * (place - 1)
            costs = [min(never, cost_to(run, TARGET, "responses")) for run in of(runs, name)
                     if run["prompts"] == size]
            label = f"{size} prompts per step" if name == CONSTANT else None
            axes.plot([x] * len(costs), costs, "o", color=colour, markersize=4, alpha=0.7, label=label)
            if costs:
                axes.plot(x, statistics.median(costs), "_", color=colour, markersize=12, markeredgewidth=2)
    axes.axhline(never / 1.15, color="black", linewidth=0.8, linestyle=":")
    axes.text(1, never, "never ", va="center", ha="right", fontsize=8,
              transform=axes.get_yaxis_transform())
    axes.set(yscale="log", ylim=(None, 1.15 * never))
    axes.set_yticks([500, 1000, 2000, 4000, 8000], ["500", "1k", "2k", "4k", "8k"])
    axes.minorticks_off()
    axes.set_xticks(range(len(names)), [name.replace(" at ", " at\n") for name in names])
    axes.set_title(f"responses to accuracy {TARGET}, by what is subtracted from R", loc="left", fontsize=9)
    axes.legend(fontsize=8, loc="center", bbox_to_anchor=(0.55, 0.8))  # where no dots are


def draw_variances(axes, runs):
    """What adds to the variance of A: noise, which no baseline removes, and the baseline's error."""
    sizes, ticks = sorted({run["prompts"] for run in of(runs, ORACLE)}), {}
    for group, size in enumerate(sizes):
        noise, found = variances(runs, size)
        for place, (name, (predicted, measured)) in enumerate(found.items()):
            x = 3.6 * group + place
            axes.bar(x, noise, 0.85, color="#cccccc")
            axes.bar(x, predicted - noise, 0.85, noise, color="#41ab5d")
            axes.plot([x - 0.43, x + 0.43], [measured] * 2, color="black")
            ticks[x] = {CONSTANT: "constant", "SPPO": "V", ORACLE: "oracle"}[name]
        axes.text(3.6 * group + 1, 0.005, f"{size} prompts", ha="center", fontsize=8)
    axes.set_xticks(list(ticks), list(ticks.values()), rotation=35, ha="right")
    axes.set_title("variance of A: grey is noise, green the\nbaseline's error, black what was measured",
                   loc="left", fontsize=9)
    axes.grid(axis="x", visible=False)
