"""Both engines: what they sample, what they report of it, and that new weights really arrive."""
import functools
import importlib.util
import json
from types import SimpleNamespace

import pytest
from conftest import metrics, run
from transformers import GPT2Config, GPT2LMHeadModel

from cli import BUILTIN_MODEL, InputError
from engines import Response, TransformersEngine
from machine import load_tokenizer
from reward import Verifier, verify
from rollout import sample_and_verify

pytestmark = pytest.mark.xdist_group("rollout")  # of tests that share a session's fixture, on one worker


@pytest.fixture(scope="session", params=["vllm", "transformers"])
def report(request, tmp_path_factory):
    if not importlib.util.find_spec(request.param):
        pytest.skip(f"{request.param} is not installed")
    done = run("tests/sampling.py", request.param, tmp_path_factory.mktemp(request.param))
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
    assert report["short"] == [[4, False]] * 24


def test_temperatures_and_seeds(report):
    assert report["greedy"][0] == report["greedy"][1]
    assert report["mixed"][:12] == report["greedy"][0][:12]
    assert report["mixed"][12:] != report["greedy"][0][12:]
    assert report["seeded"][0] == report["seeded"][1]
    assert set(report["many"]) == {3}


def test_what_is_paused_is_continued(report):
    """Once 6 of 24 have ended, and two that are waited for, the others are paused; each is written to its own limit in a
    second pass."""
    if "paused" not in report:
        pytest.skip("only vLLM can pause")
    assert 6 <= len(report["ended"]) < 22 and {4, 22} <= {*report["ended"]}
    for before, after, same, paused in report["paused"]:
        assert 0 < before < after and same and not paused
    assert report["whole"] < 1e-3  # each token has its log-probability, whichever pass wrote it
    assert any(length == limit for limit, length, _ in report["limits"])
    assert all(length == limit or length < limit and finished for limit, length, finished in report["limits"])


@pytest.mark.parametrize("prompt, response, reward", [
    ("1+1? <think>", "Is it \\boxed{2}", 0), ("1+1? <think>", "1, 2.</think> \\boxed{2}", 1),
    ("1+1? <think>", "\\boxed{2}</think> \\boxed{3}", 0), ("1+1? <think></think>", "\\boxed{2}", 1), ("1+1?", "\\boxed{2}", 1)])
def test_an_answer_in_a_thought_that_the_prompt_began_is_none(prompt, response, reward):
    """As with DeepSeek-R1's template, which ends with <think>."""
    tokenizer = load_tokenizer(BUILTIN_MODEL)
    encode = functools.partial(tokenizer.encode, add_special_tokens=False)
    ids = encode(response)
    engine = SimpleNamespace(generate=lambda prompts: [(0, Response(ids, [0.0] * len(ids), True))])
    verifier = Verifier(1)
    [(_, _, text, result)] = sample_and_verify(engine, verifier, tokenizer, [encode(prompt)], ["2"])
    assert result.result() == reward == verify(text, "2") and text.endswith(response)
    verifier.close()


def test_a_response_may_fill_the_positions_of_the_model(tmp_path, device):
    """Prompt and response together are as long as the model can read; a row that has ended does not go beyond."""
    GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=8, n_layer=1, n_head=1)).save_pretrained(tmp_path)
    engine = TransformersEngine(tmp_path, device, stop=[], max_tokens=16, dtype="float32")
    responses = dict(engine.generate([[1, 2, 3, 4], [5, 6]], temperature=1.0, max_tokens=12))
    assert [len(responses[i].ids) for i in (0, 1)] == [12, 12]
    with pytest.raises(InputError, match="--oversample needs vLLM"):
        next(engine.generate([[1]], temperature=1.0, max_tokens=2, pause_after=1))


@pytest.fixture(scope="module")
def shared_engines(tmp_path_factory):
    """What four ranks asked of vLLM in two steps of training, when two neighbours share an engine."""
    output = tmp_path_factory.mktemp("shared")
    done = run("tests/fake_vllm.py", output, "--steps", 2, "--dataset", "chain:100", "--prompts-per-step", 8, "--minibatch", 4, "--eval-problems", 6,
               "--eval-every", 2, "--tensor-parallel", 2, "--offload", "between", "--output", output / "run", ranks=4)
    assert done.returncode == 0, done.stderr
    return [json.loads((output / f"{rank}.json").read_text()) for rank in range(4)], metrics(output / "run")


def test_vllm_sleeps_while_others_train_and_wakes_for_new_weights(shared_engines):
    awake = ["wake weights", "reload_weights 38", "wake kv_cache", "reset_prefix_cache"]
    for seen in shared_engines[0]:
        assert seen["events"] == ["init", "sleep 2", *awake, "generate", "generate", "sleep 2", *awake,  # first evaluates
                                  "generate", "sleep 2", *awake, "generate", "shutdown"]  # after step 2, evaluates again
        assert seen["options"] == [512, {"head_dtype": "float32"}, 0.43]  # of 80 GiB, 39 to 42 are free: all take 35
        assert not seen["resident"]  # with --offload between, no model is on the device while vLLM samples


def test_neighbours_that_share_an_engine_ask_the_same_of_it_and_count_once(shared_engines):
    ranks, lines = shared_engines
    assert [seen["seed"] for seen in ranks] == [0, 0, 1, 1]
    assert ranks[0]["requests"] == ranks[1]["requests"] and ranks[2]["requests"] == ranks[3]["requests"]
    for one, two, size in zip(ranks[0]["requests"], ranks[2]["requests"], (6, 8, 8, 6), strict=True):
        assert len(one) == len(two) == size // 2
        assert all(seed is not None for _, seed in one + two)
        assert len({tuple(prompt) for prompt, _ in one + two}) == len({seed for _, seed in one + two}) == size
    for step in range(2):
        batches = [seen["batches"][step] for seen in ranks]
        assert batches[0] == batches[1] == batches[2] == batches[3] and len(batches[0]) == 8
    assert all(line["reward/timeouts"] == 8 for line in lines[1:])  # each of the step's, once
