"""The race's arithmetic, by hand; the committed results; and a race of two steps through the command line."""
import json
import math
import re

import pytest
from conftest import ROOT, run

import race


def runner(name, seed, accuracy, seconds=None):
    return {"algorithm": name, "seed": seed, "lr": "1", "accuracy": accuracy,
            "seconds": seconds or [10 * i for i in range(len(accuracy))], "responses": None if name == "PPO" else
            [(8 if name == "GRPO" else 1) * i for i in range(len(accuracy))], "metrics": {}}


def test_smoothing_and_the_time_to_a_target():
    assert race.smooth([0.0, 0.3, 0.6, 0.9]) == pytest.approx([0.0, 0.15, 0.3, 0.6])
    assert race.cost_to(runner("SPPO", 0, [0.0, 0.3, 0.6, 0.9]), 0.3) == 20
    assert race.cost_to(runner("SPPO", 0, [0.0, 0.3, 0.6, 0.9]), 0.7) == math.inf


def test_speed_is_measured_to_grpos_best_of_the_same_seed():
    runs = [runner("SPPO", 0, [0.5, 0.9, 0.9, 0.9]), runner("GRPO", 0, [0.5, 0.7, 0.7, 0.7], [0, 40, 80, 120]),
            runner("SPPO", 1, [0.5, 0.5, 0.5, 0.9]), runner("GRPO", 1, [0.5, 0.5, 0.5, 0.5], [0, 40, 80, 120]),
            runner("PPO", 0, [0.5, 0.5, 0.5, 0.6]), runner("PPO", 1, [0.5, 0.5, 0.5, 0.5])]
    ratios = race.speed(runs)
    assert ratios["SPPO"] == [1.0, pytest.approx(math.nan, nan_ok=True)]  # on seed 1 all begin where GRPO ends
    assert ratios["GRPO"][0] == 120 / 10 and ratios["PPO"][0] == math.inf
    assert race.speed(runs, clock="responses")["GRPO"][0] == 24 / 1 and "PPO" not in race.speed(runs, clock="responses")
    assert race.ratio_text([12.0, 3.0, math.inf]) == "12.0 [3.0, never]"
    assert race.ratio_text([2.0, 0.0, math.nan]) == "1.0 [SPPO never, 2.0]" and race.ratio_text([math.nan]) == "–"


def test_intervals_are_students():
    assert race.interval([1.0, 2.0, 3.0]) == (2.0, pytest.approx(4.303 / math.sqrt(3)))


def test_committed_tables_are_those_of_the_committed_results(tmp_path):
    results = json.loads((ROOT / "results/race.json").read_text())
    (tmp_path / "race.json").write_text(json.dumps(results))
    done = run("race.py", "--redraw", "--results", tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "race.md").read_text() == (ROOT / "results/race.md").read_text()
    assert {f.name for f in tmp_path.iterdir()} == {f.name for f in (ROOT / "results").iterdir()}
    for row in re.findall(r"^\|.*\|$", race.table(results["race"]), re.M):
        assert row in (ROOT / "README.md").read_text(), "the README's table is not that of results/race.json"


def test_a_quick_race_goes_on_where_it_stopped(tmp_path):
    command = ["race.py", "--quick", "--steps", "2", "--group-steps", "1", "--evaluations", "1", "--output", tmp_path,
               "--", "--engine", "transformers", "--eval-problems", "16", "--prompts-per-step", "16", "--minibatch", "8"]
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert re.search(r"GRPO takes \d+\.\d times as long as SPPO|SPPO (does not reach|has from the start)", done.stdout)
    finished = {folder: (folder / "metrics.jsonl").stat().st_mtime_ns for folder in tmp_path.iterdir()}
    next(iter(finished)).joinpath("command.json").unlink()  # as if killed in it
    done = run(*command)
    assert done.returncode == 0, done.stderr
    again = [folder for folder, when in finished.items() if (folder / "metrics.jsonl").stat().st_mtime_ns != when]
    assert again == [next(iter(finished))]


@pytest.mark.parametrize("options, sentence", [
    (["--minibatch", "12"], "--minibatch 12: must divide"), (["--seeds", "0"], "--seeds 0: must be greater than 0"),
    (["--redraw", "--results", "nowhere"], "nowhere/race.json: there are no results to draw")])
def test_bad_input(options, sentence, tmp_path):
    done = run("race.py", *options, "--output", tmp_path)
    assert done.returncode == 2 and sentence in done.stderr and done.stderr.count("\n") == 1
