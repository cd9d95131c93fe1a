"""Both engines: what they sample, what they report of it, and that new weights really arrive."""
import importlib.util
import json

import pytest
from conftest import run

pytestmark = pytest.mark.xdist_group("rollout")  # of tests that share a session's fixture, on one worker


@pytest.fixture(scope="session", params=["vllm", "transformers"])
def report(request):
    if not importlib.util.find_spec(request.param):
        pytest.skip(f"{request.param} is not installed")
    done = run("tests/sampling.py", request.param)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_log_probabilities_agree_with_the_trainer_after_every_sync(report):
    print(f"\n{report['name']}: largest gaps {report['gaps']}, without a sync {report['stale']:.3f}")
    assert max(report["gaps"]) < 1e-3
    assert report["stale"] > 1e-2  # the test would notice weights that did not arrive


def test_responses_say_whether_they_finished(report):
    for last, finished, complete in report["ends"]:
        assert finished == (last == report["stop"])
        assert complete
    assert any(finished for _, finished, _ in report["ends"])
    assert report["short"] == [[4, False]] * 48


def test_temperatures_and_seeds(report):
    assert report["greedy"][0] == report["greedy"][1]
    assert report["mixed"][:24] == report["greedy"][0][:24]
    assert report["mixed"][24:] != report["greedy"][0][24:]
    assert report["seeded"][0] == report["seeded"][1]
    assert set(report["many"]) == {3}
