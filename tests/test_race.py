"""The race's arithmetic, by hand; the committed results; and a race of two steps through the command line."""
import json
import math
import re
import shlex
import statistics
from pathlib import Path

import pytest
from conftest import ROOT, complaint, metrics, run

from checkpoint import lock
from tools import claims, race, race_results
from tools.race import main
from tools.race_results import (
    accuracy_text,
    best_rates,
    by_batch,
    cost_to,
    difference,
    ratio_text,
    smooth,
    speed,
    student_interval,
)


def runner(name, seed, accuracy, seconds=None, lr="1", prompts=64):
    count, samples = len(accuracy), 8 if name == "GRPO" else 1
    return {"algorithm": name, "seed": seed, "lr": lr, "prompts": prompts, "accuracy": accuracy,
            "seconds": seconds or [10 * i for i in range(count)],
            "responses": [samples * i for i in range(count)], "metrics": {}}


def test_smoothing_and_the_cost_to_a_target():
    assert smooth([0.0, 0.3, 0.6, 0.9]) == pytest.approx([0.0, 0.15, 0.3, 0.6])
    assert cost_to(runner("SPPO", 0, [0.0, 0.3, 0.6, 0.9]), 0.3) == 20
    assert cost_to(runner("SPPO", 0, [0.0, 0.3, 0.6, 0.9]), 0.7) == math.inf


def test_cost_is_compared_at_grpos_best_of_the_same_seed_and_batch(monkeypatch):
    slow = [0, 40, 80, 120]
    monkeypatch.setattr(race_results, "NEAR", 1.0)
    runs = [runner("SPPO", 0, [0.5, 0.9, 0.9, 0.9]), runner("GRPO", 0, [0.5, 0.7, 0.7, 0.7], slow),
            runner("SPPO", 1, [0.5, 0.5, 0.5, 0.9]), runner("GRPO", 1, [0.5, 0.5, 0.5, 0.5], slow),
            runner("PPO", 0, [0.5, 0.5, 0.5, 0.6]), runner("PPO", 1, [0.5, 0.5, 0.5, 0.5])]
    ratios, by_responses = speed(runs), speed(runs, clock="responses")
    # On seed 1 all begin where GRPO ends.
    assert ratios["SPPO"] == [1.0, pytest.approx(math.nan, nan_ok=True)]
    assert ratios["GRPO"][0] == 120 / 10 and ratios["PPO"][0] == math.inf
    assert by_responses["GRPO"][0] == 24 / 1
    assert speed(runs, target=0.6)["GRPO"] == [40 / 10, math.inf]  # seed 1: GRPO never gets there
    monkeypatch.setattr(race_results, "NEAR", 0.9)  # 0.63 is enough on seed 0, and all have that from the start on seed 1
    assert speed(runs)["GRPO"] == [pytest.approx(80 / 10), pytest.approx(math.nan, nan_ok=True)]
    other = [{**run, "prompts": 256, "accuracy": [0.5, 0.5, 0.5, 0.5]} for run in runs]
    assert len(speed(runs + other)["GRPO"]) == 4  # another batch is another contest
    assert ratio_text([12.0, 3.0, math.inf]) == "12.0 [3.0, never]"
    assert ratio_text([2.0, 0.0, math.nan]) == "2.0; SPPO never on 1 of 3 seeds" and ratio_text([math.nan]) == "–"


def test_algorithms_are_compared_on_the_seeds_that_both_have():
    """The race's seed 0 and, of SPPO and a constant alone, seed 1 of --part batches, at the same batch."""
    runs = [runner("SPPO", 0, [0.5] * 3), runner("a constant", 0, [0.4] * 3), runner("GRPO", 0, [0.5, 0.6, 0.7])]
    more = [runner("a constant", 1, [0.3] * 3), runner("SPPO", 1, [0.6] * 3)]
    again = [runner("SPPO", 0, [0.9] * 3)]  # a run of the race that the part has too: shown once
    both = by_batch({"race": {"runs": runs, "settings": {"lr": "1"}}, "batches": {"runs": more}})
    assert len(both) == 5
    assert difference(both, "SPPO", "a constant")[0] == pytest.approx((0.1 + 0.3) / 2)
    larger = [{**run, "prompts": 256, "accuracy": [0.0] * 3} for run in runs]  # another batch is not mixed with this one
    assert difference([*both, *larger], "SPPO", "a constant")[0] == pytest.approx((0.1 + 0.3 + 0) / 3)
    assert len(speed(both, "responses")["a constant"]) == 1  # GRPO's best is the goal, and of one seed alone
    assert len(speed(both, "responses", 0.55)["a constant"]) == 2
    both = by_batch({"race": {"runs": runs, "settings": {"lr": "1"}}, "batches": {"runs": again}})
    assert [run["accuracy"][0] for run in both if run["algorithm"] == "SPPO"] == [0.9]


def test_protocols_are_one_rate_for_all_and_the_best_of_the_grid():
    grid = [runner(name, 3, [0.0, end], lr=lr) for name, lr, end in (
        ("SPPO", "1", 0.5), ("SPPO", "2", 0.7), ("GRPO", "1", 0.8), ("GRPO", "2", 0.3))]
    assert best_rates(grid) == {"SPPO": "2", "GRPO": "1"}
    assert best_rates([*grid, runner("SPPO", 4, [0.0, 0.1], lr="2")])["SPPO"] == "1"  # the mean of its seeds counts
    runs = [runner(name, 0, [0.0, 0.5], lr=lr) for name, lr in (("SPPO", "1"), ("SPPO", "2"), ("GRPO", "1"))]
    results = {"race": {"runs": runs, "settings": {"lr": "1"}}, "grid": {"runs": grid}}
    assert list(race_results.protocols(results).values()) == [[runs[0], runs[2]], [runs[1], runs[2]]]
    assert list(race_results.protocols({"race": results["race"]}).values()) == [[runs[0], runs[2]]]


def test_seconds_of_another_machine_are_left_out():
    runs = [{**runner(name, 0, [0.5, 0.6, 0.7]), "phases": {"update": 7.0}, "machine": machine}
            for name, machine in (("SPPO", "a"), ("GRPO", "a"), ("PPO", "b"))]
    columns, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in race_results.table(runs).splitlines()]
    seconds = [columns.index(name) for name in ("seconds", "ms per response", "seconds to it")]
    assert {row[0]: [bool(row[i]) for i in seconds] for row in rows} == {
        "SPPO": [True] * 3, "PPO": [False] * 3, "GRPO": [True] * 3}


def test_intervals_are_students():
    assert student_interval([1.0, 2.0, 3.0]) == (2.0, pytest.approx(4.303 / math.sqrt(3)))


@pytest.mark.parametrize("folder", ["results", "results/smollm2", "results/batch16"])
def test_committed_tables_are_those_of_the_committed_results(tmp_path, folder):
    (tmp_path / "race.json").write_text((ROOT / folder / "race.json").read_text())
    main(["--redraw", "--results", str(tmp_path)])
    for name in ("race.md", "race.json"):
        assert (tmp_path / name).read_text() == (ROOT / folder / name).read_text(), name
    assert {f.name for f in tmp_path.iterdir()} <= {f.name for f in (ROOT / folder).iterdir()}


def test_the_readmes_claims_and_verdicts_are_computed_from_the_committed_results():
    assert claims.table() in (ROOT / "README.md").read_text()
    for row in claims.claims():
        assert all(len(cell) <= 60 for cell in row[:4]) and row[3].split(" (")[0] in {"yes", "no", "partly", "not run"}


def test_the_first_screens_numbers_are_those_of_the_committed_results():
    first = " ".join((ROOT / "README.md").read_text().split("make demo")[0].split())
    results, half_rate = (json.loads((ROOT / folder / "race.json").read_text()) for folder in ("results", "results/batch16"))
    at_256 = [run for run in by_batch(results) if run["prompts"] == 256]
    ratios = speed(at_256, "responses", 0.7)
    assert f"GRPO needs {ratio_text(ratios['GRPO'])} times SPPO's responses** to accuracy 0.7" in first
    race = next(iter(race_results.protocols(results).values()))  # only its seconds can be compared
    seconds, responses = (speed(race, clock, 0.7) for clock in ("seconds", "responses"))
    assert f"and {ratio_text(seconds['GRPO'])} times its seconds (three seeds were timed)" in first and len(seconds["GRPO"]) == 3
    assert f"PPO needs {ratio_text(responses['PPO'])} times the responses and {ratio_text(seconds['PPO'])} times the seconds" in first
    assert f"per step) needs {statistics.median(ratios['GRPO at equal responses']):.1f} times SPPO's" in first
    assert f"in the place of V) {ratio_text(ratios['a constant'])} times" in first
    assert "SPPO ends at {}, they at {} and {}, GRPO at {}.".format(*(
        accuracy_text([run for run in at_256 if run["algorithm"] == name]).split()[0]
        for name in ("SPPO", "GRPO at equal responses", "a constant", "GRPO"))) in first
    at_16 = [run for run in by_batch(results) if run["prompts"] == 16]
    arrived = [sum(cost_to(run, 0.7, "responses") < math.inf for run in at_16 if run["algorithm"] == name)
               for name in ("SPPO", "a constant")]
    assert "SPPO gets to 0.7 on {} of 5 seeds, and the constant on {}.".format(*arrived) in first
    assert "SPPO ends {:.3f} ± {:.3f} above it".format(*difference(at_16, "SPPO", "a constant")) in first
    half, to_groups = ["{:.3f} ± {:.3f}".format(*difference(half_rate["batches"]["runs"], "SPPO", other))
                       for other in ("a constant", "GRPO at equal responses")]
    assert f"with half the learning rate (three seeds) only {half} (" in first
    assert f"{half} above the constant, {to_groups} above GRPO at equal responses." in " ".join(
        (ROOT / "results/README.md").read_text().split())


def ends(name, *accuracy):
    return [runner(name, seed, [a] * 3, prompts=256) for seed, a in enumerate(accuracy)]


def verdicts(**changed):
    """{claim: verdict} for a race in which all end at 0.8, but for those named."""
    names = "SPPO", "SPPO, small critic", "GRPO", "PPO", "PPO + BCE", "SPO"
    runs = [each for name in names for each in ends(name, *changed.get(name, (0.8, 0.81, 0.79)))]
    for each in runs:
        each["metrics"] = {"group/all_right": [0.1, changed.get("all_right", 0.1)], "group/all_wrong": [0.0, 0.0],
                          "critic/auc_tenth_1": [0.8], "critic/auc_tenth_10": [changed.get("auc", 0.8)]}
    rows = claims.of_the_race({"race": {"runs": runs, "settings": {"lr": "1"}}})
    return {claim: verdict for claim, _, _, verdict, _ in rows}


def test_verdicts_follow_from_results():
    alike, low, high = verdicts(), (0.5, 0.52, 0.48), (0.9, 0.92, 0.88)
    assert alike["SPPO ends as high as GRPO"] == alike["A small critic is enough"] == "yes (no difference seen)"
    assert verdicts(GRPO=low)["SPPO ends as high as GRPO"] == "yes"
    assert verdicts(**{"SPPO, small critic": high})["A small critic is enough"] == "yes"
    assert alike["PPO with BCE collapses"] == alike["SPO ends above GRPO"] == "no"
    assert alike["GRPO's groups come to have equal rewards"] == "no"
    assert verdicts(GRPO=high)["SPPO ends as high as GRPO"] == "no"
    assert verdicts(SPO=high)["SPO ends above GRPO"] == "yes"
    assert verdicts(**{"SPPO, small critic": low})["A small critic is enough"] == "no"
    assert verdicts(**{"PPO + BCE": low})["PPO with BCE collapses"] == "yes"
    assert verdicts(all_right=0.3)["GRPO's groups come to have equal rewards"] == "partly"
    assert verdicts(all_right=0.6)["GRPO's groups come to have equal rewards"] == "yes"
    assert verdicts(auc=0.95)["PPO's values know the answer only at its end"] == "yes"


def test_verdicts_on_control_tasks():
    def rows(sppo, ppo, updates=10):
        runs = [dict(task="Hopper", method=method, setting="", trajectories=8, success=[end] * updates)
                for method, end in (("SPPO", sppo), ("PPO", ppo))]
        return {claim: (here, verdict) for claim, _, here, verdict, _ in claims.of_control(runs)}
    name = "Hopper: SPPO solves it, PPO fails"
    assert rows(0.9, 0.1)[name] == ("SPPO 0.90, PPO 0.10 (seeds: 1)", "yes")
    assert rows(0.9, 0.9)[name][1] == "partly"
    assert rows(0.3, 0.1)[name][1] == "not run (to the end)" and rows(0.3, 0.1, 2500)[name][1] == "no"
    assert rows(0.9, 0.1)["Pendulum: SPPO solves it"][1] == "not run"


def test_the_makefile_names_parts_that_exist():
    parts = re.findall(r"tools\.race --part (\w+)", (ROOT / "Makefile").read_text())
    assert parts
    for part in parts:
        race.RaceConfig.parse("", ["--part", part]).check()


def test_a_part_of_the_runs_made_again_leaves_the_others():
    old, new = [runner("SPPO", 0, [0.1]), runner("SPPO", 1, [0.1])], [runner("SPPO", 1, [0.2]), runner("SPO", 1, [0.3])]
    assert race.merged(old, new) == [old[0], new[0], new[1]]


def test_runs_of_a_part_at_another_rate_are_refused(tmp_path, capsys):
    (tmp_path / "race.json").write_text(json.dumps({"batches": {"settings": {"lr": "3e-4"}, "extra": [], "runs": []}}))
    said = complaint(main, ["--part", "batches", "--lr", "1e-4", "--results", str(tmp_path)], capsys)
    assert "--lr 1e-4: " in said and "has this part at 3e-4" in said


def test_the_contrast_has_the_shortest_and_the_longest_chains(tmp_path):
    file = Path(race.contrast(tmp_path / "runs/contrast.jsonl"))
    rows = [json.loads(row)["problem"] for row in file.read_text().splitlines()]
    operations = [sum(sign in "+-*" for sign in row.split()[1]) for row in rows]
    assert operations.count(1) == operations.count(14) == len(set(rows)) / 2 > 200


def test_a_race_continues_where_it_stopped(tmp_path, monkeypatch, capsys):
    """Runs of one step, forked and not started, which saves seconds; with a table and a figure."""
    monkeypatch.setattr(race.subprocess, "run", lambda command, **_: run(*command[1:]))
    command = ["--algorithms", "SPPO", "GRPO", "--steps", "1", "--group-steps", "1", "--seeds", "1", "--prompts-per-step", "16",
               "--output", str(tmp_path / "runs"), "--results", str(tmp_path / "results"),
               "--", "--engine", "transformers", "--dataset", "chain:100", "--eval-problems", "16",
               "--max-response-tokens", "48"]
    main(command)
    table = (tmp_path / "results/race.md").read_text()
    assert all(f"\n| {name} | 3e-4 |" in table for name in ("SPPO", "GRPO"))
    assert (tmp_path / "results/race.png").exists()
    finished = {folder: (folder / "metrics.jsonl").stat().st_mtime_ns for folder in (tmp_path / "runs").iterdir()}
    killed = next(folder for folder in finished if folder.name.startswith("GRPO"))
    (killed / "command.json").unlink()
    held = lock(killed)  # as a run does whose race was killed
    assert f"{killed.name}: another run is writing into it" in complaint(main, command, capsys)
    held.close()
    main(command)
    assert [folder for folder in finished
            if (folder / "metrics.jsonl").stat().st_mtime_ns != finished[folder]] == [killed]
    # Of two equal commands, the table names one, with its options.
    [named] = json.loads((tmp_path / "results/race.json").read_text())["race"]["commands"]
    assert shlex.split(named)[3:] == command and f"`{named}` on " in table


def test_a_constant_in_the_critics_place(tmp_path):
    """Its mean of the rewards starts at the first batch's, and moves a quarter of the way to each step's."""
    done = run("examples/running_mean.py", "--steps", "3", "--prompts-per-step", "16", "--minibatch", "8", "--engine", "transformers",
               "--dataset", "chain:100", "--eval-every", "0", "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [line for line in metrics(tmp_path) if line["step"]]
    rewards = [line["reward"] for line in lines]
    mean = rewards[0]
    for line, reward in zip(lines, rewards, strict=True):
        mean = 0.75 * mean + 0.25 * reward
        assert line["baseline/mean"] == pytest.approx(mean)


def test_an_oracle_in_the_critics_place(tmp_path):
    """What was predicted of the variance is what was measured, within the noise of 2 x 32 responses."""
    done = run("examples/oracle.py", "--steps", "2", "--prompts-per-step", "32", "--minibatch", "16", "--engine", "transformers", "--max-response-tokens", "32", "--dataset", "chain:200",
               "--eval-every", "0", "--samples", "all", "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [line for line in metrics(tmp_path) if line["step"]]
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    for line in lines:
        squares = [s["advantage"] ** 2 for s in samples if s["step"] == line["step"]]
        assert line["advantage/variance"] == line["oracle/variance_oracle"] == pytest.approx(sum(squares) / 32, abs=1e-3)
        assert all(round(32 * (s["reward"] - s["advantage"])) == pytest.approx(32 * (s["reward"] - s["advantage"]), abs=0.05)
                   for s in samples)  # a share of 32 responses
    noise, spread, error, constant, critic, oracle = (sum(line[f"oracle/{name}"] for line in lines) / 2 for name in (
        "noise", "spread", "critic_error", "variance_constant", "variance_critic", "variance_oracle"))
    assert oracle == pytest.approx(noise, abs=0.05) and constant == pytest.approx(noise + spread, abs=0.05)
    assert critic == pytest.approx(noise + error, abs=0.06) and spread > 0.03


@pytest.mark.parametrize("options, message", [
    (["--prompts-per-step", "12"], "--prompts-per-step 12: must be a multiple of 16"),
    (["--seeds", "0"], "--seeds 0: must be greater than 0"),
    (["--algorithms", "SPPO", "SPO"], "costs are compared between SPPO and GRPO; name both"),
    (["--algorithms", "SPPO", "GRPO", "GRP"], "must be names that --help lists"),
    (["--redraw", "--results", "nowhere"], "nowhere/race.json: there are no results to draw")])
def test_bad_input_is_one_clear_sentence(options, message, tmp_path, capsys):
    error = complaint(main, [*options, "--output", tmp_path], capsys)
    assert message in error and error.count("\n") == 1
