"""bench.py's phases are those of a real run, and its lengths those that were asked for."""
import json
import re

import pytest
from conftest import run


def test_step(tmp_path):
    done = run("bench.py", "step", "--prompts-per-step", "16", "--minibatch", "8", "--steps", "2", "--response-lengths", "20",
               "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    last = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert last["response_tokens"] == 20
    seconds = {name: float(value) for name, value in re.findall(r"^  (\w+) +([\d.]+) s", done.stdout, re.M)}
    assert seconds["step"] == pytest.approx(last["time/step"], abs=0.01)
    assert seconds["update"] == pytest.approx(last["time/update"], abs=0.01)
    for part in ("tokens/s", "TFLOP/s", "own shapes", "padding", "memory: peak", "neither generation"):
        assert part in done.stdout


def test_bad_input_is_one_clear_sentence(tmp_path):
    done = run("bench.py", "step", "--shape", "unknown", "--output", tmp_path / "run")
    assert done.returncode == 2 and "--shape unknown: is none of Qwen/" in done.stderr
    done = run("bench.py", "step", "--response-lengths", "9", "--oversample", "1", "--old-logprobs", "rollout",
               "--output", tmp_path / "run")
    assert done.returncode == 2 and "--response-lengths and --oversample: what is gone on with" in done.stderr
    assert "python bench.py stragglers" in run("bench.py").stderr
