"""tools/plan_time.py: its seconds are those of counting by hand, one decode step and one token at a time."""
import json
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import complaint, run

from cli import InputError
from tools.plan import main
from tools.plan_time import Size, TimeConfig, decode, lengths_like, phases, response_lengths, size_of
from tools.shapes import shape_of

SIZE = Size(parameters=1000, layers=600, head=200, attention=3, cache=16.0)
RATES = SimpleNamespace(products=5e4, training=2e4, bandwidth=3e4, link=7e4, host=9e4, step=0.01)


def decode_by_hand(lengths, prompt, room, places):
    """Every response and every step in turn, as vLLM's scheduler does it. Lists, and no numpy."""
    written, cached, seconds, steps = [0] * len(lengths), set(), 0.0, 0
    while any(w < n for w, n in zip(written, lengths, strict=True)):
        running, used = [], 0
        for i, (w, n) in enumerate(zip(written, lengths, strict=True)):
            if w < n:
                if used + prompt + w > room or len(running) == places:
                    break
                running.append(i)
                used += prompt + w
        for i in running:
            if i not in cached:
                seconds += 2 * 600 * (prompt + written[i]) / 5e4
        seconds += 0.01 + max(2 * 800 / 3e4, len(running) * 2 * 800 / 5e4) + 16 * used / 3e4
        for i in running:
            written[i] += 1
        cached, steps = set(running), steps + 1
    return seconds, steps


@pytest.mark.parametrize("room, places", [(10**6, 100), (10**6, 3), (70, 100), (41, 2)])
def test_decoding_is_counted_step_by_step(room, places):
    """With room for all, with few places, and with a cache so small that responses give way."""
    lengths = np.array([5, 30, 1, 17, 30, 8, 22])
    seconds, steps = decode(lengths, 10, SIZE, RATES, room, places)
    by_hand = decode_by_hand(lengths.tolist(), 10, room, places)
    assert steps == by_hand[1] and seconds == pytest.approx(by_hand[0])
    if room == 10**6 and places == 100:
        assert steps == 30  # the longest response
    with pytest.raises(InputError, match=r"leaves room for 39 tokens, and the longest response .* have 40"):
        decode(lengths, 10, SIZE, RATES, 39, places)


def test_phases_by_hand(device):
    """Four prompts of 10 tokens in two mini-batches on one card. All rows of a mini-batch are padded to its
    longest; both fit into one micro-batch."""
    c = TimeConfig(gpus=1, prompts_per_step=4, minibatch=2, prompt_tokens=10, offload_between=True)
    lengths = np.array([5, 30, 20, 20])
    plan, steps = phases(c, RATES, SIZE, SIZE, "prompts", lengths, 10**6)
    assert steps == 30 and plan["rollout"] == pytest.approx(decode_by_hand([5, 30, 20, 20], 10, 10**6, 9)[0])
    head = 2 * 200 * 75  # 75 tokens are written
    once = 4 * (2 * 600 * 40 + 3 * 40**2)  # all four rows in one micro-batch, padded to 40 tokens
    assert plan["logprobs"] == pytest.approx((once + head) / 2e4)
    layers = 2 * (2 * 600 * 40 + 3 * 40**2) + 2 * (2 * 600 * 30 + 3 * 30**2)
    adam = 2 * 28 * 1000 / 3e4
    assert plan["update"] == pytest.approx((4 * layers + 4 * head) / 2e4 + adam)
    prompts = 4 * (2 * 600 * 10 + 3 * 10**2)
    assert plan["critic"] == pytest.approx((1 + 4) * prompts / 2e4 + adam)
    assert plan["sync"] == pytest.approx(4 * 1000 / 3e4)
    assert plan["moves"] == pytest.approx((2 * 16 * 2000 + 4 * 1000) / 9e4)
    # PPO's critic reads what the policy reads, and has no output layer. Without a critic there is no phase.
    plan, _ = phases(c, RATES, SIZE, SIZE, "responses", lengths, 10**6)
    assert plan["critic"] == pytest.approx((once + 4 * layers) / 2e4 + adam)
    plan, _ = phases(replace(c, minibatch=4, checkpoint_activations=False), RATES, SIZE, SIZE, None, lengths,
                     10**6)
    assert plan["critic"] == plan["logprobs"] == 0
    assert plan["update"] == pytest.approx((3 * once + 4 * head) / 2e4 + adam / 2)


def test_more_cards_share_the_work(device):
    """Twice the cards: half the update. What travels is counted apart: here it takes no time, and then some."""
    c = TimeConfig(prompts_per_step=64, minibatch=16, prompt_tokens=10, micro_batch_tokens=400)
    lengths, free = np.full(64, 90), SimpleNamespace(**{**vars(RATES), "link": math.inf})
    two, four = (phases(replace(c, gpus=n), free, SIZE, SIZE, "responses", lengths, 10**6)[0] for n in (2, 4))
    for name in ("logprobs", "update", "critic"):
        assert four[name] == pytest.approx(two[name] / 2), name
    assert two["rollout"] / 2 < four["rollout"] < two["rollout"]  # each card reads all weights in each step
    slow, _ = phases(replace(c, gpus=4), RATES, SIZE, SIZE, None, lengths, 10**6)
    # 4 rows of a mini-batch on a card, as one micro-batch; layers are gathered twice, gradients summed.
    assert slow["update"] - four["update"] == pytest.approx(4 * 8 * 1000 * 3 / 4 / 7e4)
    assert slow["sync"] - four["sync"] == pytest.approx(2 * 1000 * 3 / 4 / 7e4)


def test_lengths_follow_the_distribution():
    lengths = response_lengths(4001, 1000, 0.5, 10**9)
    assert np.median(lengths) == 1000 and np.log(lengths).std() == pytest.approx(0.5, rel=0.01)
    assert lengths.mean() == pytest.approx(1000 * math.exp(0.5**2 / 2), rel=0.01)
    cut = response_lengths(400, 1000, 0.5, 1000)
    assert cut.max() == 1000 and (cut == 1000).mean() == pytest.approx(0.5, abs=0.01)
    for mean, longest, share in ((60.0, 120, 0.0), (60.0, 128, 0.25)):  # fitted to a step's metrics
        like = lengths_like(64, mean, longest, share)
        assert like.max() == longest and like.mean() == pytest.approx(mean, abs=0.5)
        assert (like == longest).mean() == pytest.approx(max(share, 1 / 64), abs=0.02)


def test_a_published_shape():
    """Qwen2.5-7B from its own numbers: 7.6B parameters, of which the embedding is in no product."""
    size = size_of(shape_of("Qwen/Qwen2.5-7B"))
    layer = 3584 * (3584 + 2 * 512 + 3584) + 3 * 3584 * 18944  # queries, keys and values, output; three of MLP
    assert (size.layers, size.head) == (28 * layer, 152064 * 3584)
    assert size.parameters == size.layers + 2 * size.head + 28 * (3584 + 2 * 512 + 2 * 3584) + 3584
    assert (size.cache, size.attention) == (2 * 2 * 28 * 512, 2 * 28 * 3584)


def table(printed):
    return {row[0]: row[1:] for row in (line.strip("| ").split(" | ") for line in printed.splitlines())}


def test_the_command(device, capsys):
    """The papers' shape, few prompts. The step is the sum of its phases."""
    main(["deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "--time", "--prompts-per-step", "16", "--minibatch", "4"])
    rows = table(capsys.readouterr().out)
    sppo, grpo, ppo = ([float(rows[name][i].replace(",", "")) for name in (
        "rollout", "logprobs", "update", "critic", "sync", "step")] for i in range(3))
    assert sum(sppo[:5]) == pytest.approx(sppo[5], abs=1) and sum(grpo[:5]) == pytest.approx(grpo[5], abs=1)
    assert grpo[3] == 0 < sppo[3] < ppo[3] and grpo[0] > sppo[0] == ppo[0] and grpo[2] > 4 * sppo[2]
    assert "8,000" in rows


def test_a_run_beside_its_plan(tmp_path):
    """Through the command line. The rates are measured, so that only the sums can be checked here."""
    done = run("ppo.py", "--engine", "transformers", "--steps", "2", "--prompts-per-step", "4", "--minibatch",
               "2", "--eval-every", "0", "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    done = run("tools/plan.py", "--time", "--check-run", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    rows = table(done.stdout)
    last = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    for name in ("rollout", "logprobs", "update", "critic"):
        planned, measured, _ = map(float, rows[name])
        assert planned > 0 and measured == pytest.approx(last[f"time/{name}"], abs=0.01), name
    assert re.search(r"Products alone [\d.,]+ GFLOP/s, forward and backward [\d.,]+; memory [\d.]+ GB/s", done.stdout)


@pytest.mark.parametrize("arguments, message", [
    (["--check-run", "nowhere"], "nowhere: holds no run"),
    (["--sigma", "0"], "--sigma 0.0: must be greater than 0"),
    (["--vllm-memory", "0.1"], "--vllm-memory: leaves room for 0 tokens, and the longest response")])
def test_bad_input_is_one_clear_sentence(arguments, message, device, capsys):
    error = complaint(main, ["--time", *arguments], capsys)
    assert message in error and error.count("\n") == 1
