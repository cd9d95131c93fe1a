"""What the runs of a race say: the cost to a target, and the tables and claims of tools/race.py.

A run is a dictionary: algorithm, learning rate, seed and prompts a step; accuracy, seconds and responses at
each evaluation; seconds by phase; and the metrics of each step.
"""
import math
import statistics

GROUP = 8  # samples per prompt of GRPO and RLOO
EQUAL = "GRPO, equal samples"  # as many responses a step as SPPO, so an eighth of the prompts
STYLES = {  # name: marker, line, colour; tables and legends have this order
    "SPPO": ("o", "-", "#000000"), "SPPO, small critic": ("s", "--", "#000000"),
    "SPO": ("D", "-.", "#6a51a3"), "PPO": ("^", "-", "#2171b5"), "PPO + BCE": ("v", "--", "#2171b5"),
    "GRPO": ("x", "-", "#d94801"), EQUAL: ("+", "--", "#d94801"),
    "RLOO": ("*", ":", "#8c2d04"), "ReMax": ("P", ":", "#41ab5d")}
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


def speed(runs, clock="seconds", target=None):
    """{algorithm: a ratio per seed}: its cost to the target, divided by SPPO's.

    target: an accuracy, or None for NEAR times GRPO's best smoothed accuracy on that seed. A ratio
    is infinite if the algorithm never gets there, 0 if SPPO does not, nan if neither does or all begin there.
    """
    ratios = {}
    for contest in contests(runs).values():
        goal = target or NEAR * max(smooth(contest["GRPO"]["accuracy"]))
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
    """{title: runs}: the race at one rate for all and, after a grid, each of its algorithms at its best."""
    if "race" not in results:
        return {}
    runs, one = results["race"]["runs"], results["race"]["settings"]["lr"]
    found = {f"One learning rate for all, {one}": [run for run in runs if run["lr"] == one]}
    if "grid" in results:
        best = best_rates(results["grid"]["runs"])
        chosen = [run for run in runs if run["lr"] == best.get(run["algorithm"])]
        if {*names_in(chosen)} == best.keys():
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
             "interval over seeds; ratios are medians [lowest, highest] of the seeds. GRPO's best counts as "
             f"reached at {NEAR:.0%} of it.\n"]

    def heading(part, text):
        command = "python -m tools.race" + (f" --part {part}" if part != "race" else "")
        seeds = len({run["seed"] for run in results[part]["runs"]})
        parts.append(f"\n## {text}\n\n`{command}` on {results[part]['machine']}; seeds: {seeds}.\n")
    if {"race", "batches"} <= results.keys():
        parts.append("\n## What it says of the papers' claims\n")
        parts.append(markdown(("claim", "here"), [*claims(results).items()]))
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


def claims(results):
    """{what the papers claim: what the race says of it}, as README has it. Needs the race and the batches."""
    runs = next(iter(protocols(results).values()))
    accuracy = {name: [smooth(run["accuracy"])[-1] for run in of(runs, name)] for name in names_in(runs)}

    def beside(*names, other="SPPO"):
        """How much higher these end than another, seed by seed: all meet the same held-out problems."""
        def text(name):
            gaps = [a - b for a, b in zip(accuracy[name], accuracy[other], strict=True)]
            mean, half = student_interval(gaps)
            return f"{name} {mean:+.3f} ± {half:.3f}"
        return f"Accuracy at the end, minus {other}'s: " + ", ".join(map(text, names))

    def share(key, place):
        return f"{mean_of(run['metrics'][key][place] for run in of(runs, 'GRPO')):.0%}"

    def tenth(name, k):
        return mean_of(v for run in of(runs, name) for v in run["metrics"][f"critic/auc_tenth_{k}"])

    def ratios(clock, size=None, target=None):
        """At the papers' batch from the race, or at `size` prompts a step."""
        some = [run for run in results["batches"]["runs"] if run["prompts"] == size] if size else runs
        return ratio_text(speed(some, clock=clock, target=target)["GRPO"])

    def at_best(chosen):
        rates = ", ".join(f"{name} {of(chosen, name)[0]['lr']}" for name in ("SPPO", "GRPO"))
        responses, seconds = (ratio_text(speed(chosen, clock)["GRPO"]) for clock in ("responses", "seconds"))
        return (f"Each at its best rate ({rates}), GRPO needs {responses} times SPPO's responses and "
                f"{seconds} times its seconds")
    sizes = sorted({run["prompts"] for run in results["batches"]["runs"]})
    early, late = tenth("PPO", 1), tenth("PPO", 10)
    return {
        "SPPO is faster than GRPO": f"To {NEAR:.0%} of GRPO's best, GRPO needs {ratios('responses')} times "
                                    f"SPPO's responses and {ratios('seconds')} times its seconds, at "
                                    f"{runs[0]['prompts']} prompts a step",
        **{title.lower(): at_best(chosen) for title, chosen in list(protocols(results).items())[1:]},
        "the batch decides": "Responses to accuracy 0.7, GRPO / SPPO: " + ", ".join(
            f"{ratios('responses', size, 0.7)} at {size}" for size in sizes) + " prompts a step",
        "SPPO ends as high as GRPO and PPO": beside("GRPO", "RLOO", "PPO"),
        "a small critic is enough": beside("SPPO, small critic"),
        "PPO sees the answer coming": f"AUC of PPO's values {early:.2f} in the first tenth of a response, "
                                      f"{late:.2f} in the last",
        "PPO with BCE collapses": beside("PPO + BCE", other="PPO"),
        "GRPO's groups degenerate": f"All right: from {share('group/all_right', 0)} of the groups to "
                                    f"{share('group/all_right', -1)}; all wrong: from "
                                    f"{share('group/all_wrong', 0)} to {share('group/all_wrong', -1)}",
        "a tracker can replace the critic": beside("SPO", other="GRPO")}


def quick_answer(runs):
    """One sentence: what GRPO's best accuracy costs it, as a multiple of SPPO's cost."""
    goal = NEAR * max(smooth(of(runs, "GRPO")[0]["accuracy"]))
    best = f"{NEAR:.0%} of GRPO's best smoothed accuracy, {goal:.3f},"
    (responses,), (seconds,) = (speed(runs, clock=clock)["GRPO"] for clock in ("responses", "seconds"))
    if responses > 0:
        return (f"To {best} GRPO takes {responses:.1f} times as many responses as SPPO, and {seconds:.1f} "
                "times as long.")
    # 0 if SPPO never reaches it; not a number if SPPO has it from the start.
    return f"{best} SPPO {'does not reach in' if responses == 0 else 'has from the start of'} this race."
