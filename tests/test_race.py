"""The race's arithmetic, by hand; the committed results; and a race of two steps through the command line."""
import json
import math
import re

import pytest
from conftest import ROOT, complaint, run

from checkpoint import lock
from tools import race_results
from tools.race import main
from tools.race_results import best_rates, cost_to, ratio_text, smooth, speed, student_interval


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


def test_protocols_are_one_rate_for_all_and_the_best_of_the_grid():
    grid = [runner(name, 3, [0.0, end], lr=lr) for name, lr, end in (
        ("SPPO", "1", 0.5), ("SPPO", "2", 0.7), ("GRPO", "1", 0.8), ("GRPO", "2", 0.3))]
    assert best_rates(grid) == {"SPPO": "2", "GRPO": "1"}
    runs = [runner(name, 0, [0.0, 0.5], lr=lr) for name, lr in (("SPPO", "1"), ("SPPO", "2"), ("GRPO", "1"))]
    results = {"race": {"runs": runs, "settings": {"lr": "1"}}, "grid": {"runs": grid}}
    assert list(race_results.protocols(results).values()) == [[runs[0], runs[2]], [runs[1], runs[2]]]
    assert list(race_results.protocols({"race": results["race"]}).values()) == [[runs[0], runs[2]]]


def test_intervals_are_students():
    assert student_interval([1.0, 2.0, 3.0]) == (2.0, pytest.approx(4.303 / math.sqrt(3)))


@pytest.mark.parametrize("folder", ["results", "results/smollm2"])
def test_committed_tables_are_those_of_the_committed_results(tmp_path, folder):
    (tmp_path / "race.json").write_text((ROOT / folder / "race.json").read_text())
    done = run("tools/race.py", "--redraw", "--results", tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("race.md", "race.json"):
        assert (tmp_path / name).read_text() == (ROOT / folder / name).read_text(), name
    assert {f.name for f in tmp_path.iterdir()} <= {f.name for f in (ROOT / folder).iterdir()}


def test_committed_claims_are_those_of_the_committed_results():
    results = json.loads((ROOT / "results/race.json").read_text())
    page, readme = (ROOT / "results/README.md").read_text(), (ROOT / "README.md").read_text()
    for claim, text in race_results.claims(results).items():
        assert text in page.replace("\n", " "), claim
        assert text in readme, claim


def test_a_quick_race_continues_where_it_stopped(tmp_path):
    command = ["tools/race.py", "--part", "quick", "--steps", "3", "--group-steps", "1", "--evaluations", "1",
               "--output", tmp_path, "--", "--engine", "transformers", "--eval-problems", "16",
               "--prompts-per-step", "16", "--minibatch", "8"]
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert re.search(r"GRPO takes \d+\.\d times as many responses|SPPO (does not|has from the start)", done.stdout)
    finished = {folder: (folder / "metrics.jsonl").stat().st_mtime_ns for folder in tmp_path.iterdir()}
    killed = next(folder for folder in finished if folder.name.startswith("GRPO"))
    (killed / "command.json").unlink()
    held = lock(killed)  # as a run does whose race was killed
    done = run(*command)
    assert done.returncode == 2 and f"{killed.name}: another run is writing into it" in done.stderr
    held.close()
    done = run(*command)
    assert done.returncode == 0, done.stderr
    again = [folder for folder in finished
             if (folder / "metrics.jsonl").stat().st_mtime_ns != finished[folder]]
    assert again == [killed]


@pytest.mark.parametrize("options, message", [
    (["--minibatch", "12"], "--minibatch 12: must divide"),
    (["--seeds", "0"], "--seeds 0: must be greater than 0"),
    (["--algorithms", "SPPO", "SPO"], "with SPPO and GRPO among them"),
    (["--algorithms", "SPPO", "GRPO", "GRP"], "must be names that --help lists"),
    (["--redraw", "--results", "nowhere"], "nowhere/race.json: there are no results to draw")])
def test_bad_input_is_one_clear_sentence(options, message, tmp_path, capsys):
    error = complaint(main, [*options, "--output", tmp_path], capsys)
    assert message in error and error.count("\n") == 1
