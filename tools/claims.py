"""README's table of claims: what the papers say, what the committed results say of it, and a verdict.

    python -m tools.claims        prints the table, in a second

Each verdict follows from the results by a rule that stands here. A difference counts where its 95 % interval
leaves 0 out.
"""
import json
import statistics
from pathlib import Path

from tools.control import final
from tools.race_results import (
    by_batch,
    markdown,
    mean_of,
    merged,
    of,
    paired,
    protocols,
    ratio_text,
    speed,
    student_interval,
)

ROOT = Path(__file__).resolve().parent.parent
# Section 5.3 of the SPPO paper: its trajectories, and what PPO does there. SPPO solves all five.
CONTROL = {"CartPole": (20_000, None), "MountainCar": (10_000, "fails"), "Hopper": (20_000, "fails"),
           "LunarLander": (30_000, "is unstable"), "Pendulum": (40_000, None)}
SOLVED = 0.8  # share of successes, the mean of the last tenth of the updates


def of_the_race(race):
    """The rows that the race decides."""
    runs = next(iter(protocols(race).values()))
    # More seeds. (Seconds can be compared only on those of the race.)
    every = merged(runs, [run for run in by_batch(race) if run["prompts"] == runs[0]["prompts"]])

    def ends(name, other):
        differences = paired(every, name, other)
        mean, half = student_interval(differences)
        return mean, half, f"{name} − {other}: {mean:+.3f} ± {half:.3f} (seeds: {len(differences)})"

    def without_gradient(place):
        return sum(mean_of(run["metrics"][f"group/all_{kind}"][place] for run in of(runs, "GRPO"))
                   for kind in ("right", "wrong"))

    def auc(tenth):
        return mean_of(v for run in of(runs, "PPO") for v in run["metrics"][f"critic/auc_tenth_{tenth}"])

    def no_worse(worse, half):
        """The verdict where the claim is that something is as good: `worse` is by how much it is not."""
        return "no" if worse > half else "yes" if worse < -half else "yes (no difference seen)"

    responses, seconds = speed(runs, "responses")["GRPO"], speed(runs)["GRPO"]
    grpo, grpo_half, grpo_text = ends("GRPO", "SPPO")
    small, small_half, small_text = ends("SPPO, small critic", "SPPO")
    bce, bce_half, bce_text = ends("PPO + BCE", "PPO")
    spo, spo_half, spo_text = ends("SPO", "GRPO")
    first, last, begin, end = auc(1), auc(10), without_gradient(0), without_gradient(-1)
    return [
        ("SPPO peaks sooner than GRPO", "5.9 times, in hours (7B)",
         f"seconds: {ratio_text(seconds)} times; responses: {ratio_text(responses)}",
         "yes" if min(seconds) >= 5.9 else "partly" if min(seconds) > 1 else "no",
         "sppo-is-faster-than-grpo"),
        ("SPPO ends as high as GRPO", "SPPO 58.11, GRPO 57.44 (7B)", grpo_text, no_worse(grpo, grpo_half),
         "sppo-ends-as-high-as-grpo-and-ppo"),
        ("A small critic is enough", "small 58.56, SPPO 58.11 (7B)", small_text.replace("SPPO, ", ""),
         no_worse(-small, small_half), "the-critic-may-be-small"),
        ("PPO's values know the answer only at its end", "figure 1",
         f"AUC {first:.2f} in the first tenth, {last:.2f} in the last",
         "yes" if last > first + 0.1 else "no", "ppos-values-see-the-answer-coming"),
        ("PPO with BCE collapses", "yes", bce_text, "yes" if bce < -bce_half else "no",
         "ppo-with-bce-collapses"),
        ("GRPO's groups come to have equal rewards", "yes", f"from {begin:.0%} to {end:.0%} of the groups",
         "yes" if end > 0.5 else "partly" if end > begin else "no", "grpos-groups-degenerate"),
        ("SPO ends above GRPO", "maj@32 +3.4 points (Qwen3-8B)", spo_text,
         "yes" if spo > spo_half else "no", "a-tracker-can-replace-the-critic")]


def of_control(runs):
    """A row for each control task."""
    rows = []
    for task, (planned, ppo_does) in CONTROL.items():
        claim = f"{task}: SPPO solves it" + (f", PPO {ppo_does}" if ppo_does else "")
        here, verdict = "–", "not run"
        some = [run for run in runs if run["task"] == task and not run["setting"]]
        sppo, ppo = ([run for run in some if run["method"] == method] for method in ("SPPO", "PPO"))
        if sppo and ppo:
            end, others = statistics.mean(map(final, sppo)), [*map(final, ppo)]
            shortest, theirs = (min(run["trajectories"] * len(run["success"]) for run in seeds)
                                for seeds in (sppo, ppo))
            ppo_text = f", PPO {statistics.mean(others):.2f}" if theirs >= shortest else ""
            means = [final(run) for run in some if run["method"] == "batch mean"]
            mean_text = f", batch mean {statistics.mean(means):.2f}" if len(means) == len(sppo) else ""
            here = f"SPPO {end:.2f}{ppo_text}{mean_text} (seeds: {len(sppo)})"
            if end >= SOLVED:
                fails = max(others) < 0.2 if ppo_does == "fails" else min(others) < SOLVED
                verdict = "yes" if fails or not ppo_does else "partly"
            else:
                verdict = "no" if shortest >= planned else "not run (to the end)"
        rows.append((claim, "figure 8", here, verdict, "control-tasks"))
    return rows


def claims(folder=ROOT):
    """Rows of claim, paper, here, verdict, and the heading in results/README.md that says more."""
    def load(name):
        return json.loads((folder / name).read_text())

    race = of_the_race(load("results/race.json"))
    knows = [seed[-1] for seed in load("docs/pictures/lesson.json")["knows"]]
    r, rho = (statistics.mean(at[key] for at in knows) for key in ("r", "rho"))
    ratios = load("results/stragglers.json")["ratios"]
    medians = [ratios[p][1] for p in ("0.1", "0.15", "0.3")]
    return [
        *race[:3],
        ("A small critic lowers the peak of memory", "78.7 % and 91.5 % of a GPU", "only planned", "not run",
         "the-critic-may-be-small"),
        ("V knows which prompts are hard", "r 0.642, ρ 0.664",
         f"r {r:.2f}, ρ {rho:.2f} after the demo (seeds: {len(knows)})",
         "yes" if r >= 0.6 and rho >= 0.6 else "partly" if r > 0.3 and rho > 0.3 else "no", "does-v-know"),
        *race[3:6],
        *of_control(load("results/control.json")),
        race[6],
        ("Without groups, 4.35 times the throughput", "one simulated draw (SPO)",
         f"simulated: {min(medians):.1f} to {max(medians):.1f} times (10 to 30 % stragglers)",
         "yes" if min(medians) >= 4.35 else "partly" if max(medians) >= 4.35 else "no", "stragglers")]


def table():
    """Markdown, as README has it."""
    return markdown(("claim", "paper", "here", "verdict"), [
        (claim, paper, here, f"[{verdict}](results/README.md#{heading})")
        for claim, paper, here, verdict, heading in claims()])


if __name__ == "__main__":
    print(table())
