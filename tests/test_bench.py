"""tools/bench.py's phases are those of a real run, and its lengths those that were asked for."""
import importlib.util
import json
import re

import pytest
from conftest import complaint, run

from tools import bench


@pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="vLLM is not installed")
def test_step(tmp_path):
    done = run("tools/bench.py", "step", "--prompts-per-step", "16", "--minibatch", "8", "--steps", "2",
               "--response-lengths", "20", "--dataset", "chain:100", "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    last = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert last["response_tokens"] == 20 and "320 of responses" in done.stdout
    seconds = {name: float(value) for name, value in re.findall(r"^  (\w+) +([\d.]+) s", done.stdout, re.M)}
    assert seconds["step"] == pytest.approx(last["time/step"], abs=0.01)
    assert seconds["update"] == pytest.approx(last["time/update"], abs=0.01)
    for part in ("tokens/s", "TFLOP/s", "large matrix products", "memory: peak"):
        assert part in done.stdout


@pytest.mark.parametrize("arguments, message", [
    (["step", "--shape", "unknown"], "--shape unknown: is none of Qwen/"),
    (["step", "--response-lengths", "9", "--oversample", "1", "--old-logprobs", "rollout"],
     "--response-lengths and --oversample: a response that is continued"),
    (["step", "--response-lengths", "9", "--engine", "transformers"], "--response-lengths needs vLLM"),
    (["generate", "--rounds", "0"], "--rounds 0: must be greater than 0")])
def test_bad_input_is_one_clear_sentence(arguments, message, tmp_path, capsys):
    output = ["--output", tmp_path / "run"] if arguments[0] == "step" else []
    error = complaint(bench.main, [*arguments, *output], capsys)
    assert message in error and error.count("\n") == 1


def test_without_a_command_it_lists_them():
    with pytest.raises(SystemExit, match=r"python -m tools\.bench generate"):
        bench.main([])
