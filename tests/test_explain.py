"""`--explain`, as its user types it: what it prints is computed again here, from the other numbers that it prints."""
import re
import statistics
import types

import pytest
import torch
import torch.distributed as dist
from conftest import run

from cli import InputError
from explain import Watch, about

QUICK = ["--explain", "--engine", "transformers", "--prompts-per-step", "16", "--minibatch", "4", "--lr", "5e-4", "--dataset", "chain:400"]
NUMBER = r"([-+]?\d[\d.]*)"


def number(pattern, text):
    return float(re.search(pattern.replace("#", NUMBER), text)[1])


@pytest.mark.parametrize("script, options", [
    ("sppo.py", []), ("grpo.py", []), ("grpo.py", ["--baseline", "rloo"]), ("grpo.py", ["--baseline", "remax"]),
    ("ppo.py", ["--critic-warmup", "5"]), ("spo.py", ["--init-samples", "0"]), ("sppo.py", ["--minibatch", "16"])])
def test_a_screen_that_agrees_with_itself(tmp_path, script, options):
    done = run(script, *QUICK, *options, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "out").exists()
    lines = done.stdout.splitlines()
    assert len(lines) <= 45 and max(map(len, lines[1:])) <= 100
    screen = done.stdout
    print(screen)
    *_, first, second = re.split(r"\nRESPONSE ", screen.partition("THE LAST MINI-BATCH")[0])
    assert first.split("\n")[1] != second.split("\n")[1]  # two prompts
    clipped = 0
    for told in (first, second):
        told = " ".join(told.split())
        reward, tokens = number(r": R = ([01])", told), number(r"clipped \d+ of (\d+)", told)
        assert ("right" in told.split(" prompt ")[0]) == (reward == 1)
        box, gold = re.search(r"box (.*?); the gold answer is (\S+):", told).groups()
        assert (box == gold) == (reward == 1) and (box in told.split(" box ")[0] or "there is none" in box)
        low, high = number("updates: #", told), number("updates: [\\d.]+ to #", told)
        assert low <= number(r"; # at token", told) <= high
        if "16" in options[1:]:
            assert low == high == 1 and "after 0 updates" in told
        else:
            assert low < high and "after 3 updates" in told
        loss, outside = number("loss #", told), number(r"clipped (\d+) of", told)
        clipped += outside
        if script == "ppo.py":
            assert "V(s_t) = 0.000 at the first token" in told.split("advantage")[0]
            assert "V(s_t) = 0.000 at the first token" not in told.split("afterwards")[1]
            continue
        advantage = number(r"= # *, the same", told)
        if script != "spo.py":  # the sum that is printed
            assert advantage == pytest.approx(eval(re.search(r"= ([-\d. ()/]+) = \S+, the same", told)[1]), abs=4e-3)
        # The loss of tokens whose ratios lie between low and high, and count within the clips only.
        dual = 10 if script == "spo.py" else 3
        bounds = ((-advantage * min(high, 1.28), -advantage * low) if advantage > 0 else
                  (-advantage * max(low, 0.8), -advantage * min(high, dual)))
        assert bounds[0] - 2e-3 <= loss <= bounds[1] + 2e-3
        assert (outside > 0) == (high > 1.28 if advantage > 0 else low < 0.8 or high > dual) and outside <= tokens
        if script == "sppo.py":
            assert advantage == pytest.approx(reward - number(r"baseline V\(prompt\) = #", told), abs=2e-3)
            assert 0 < number(r"afterwards V\(prompt\) = #", told) < 1
        elif script == "spo.py":
            assert "v = 0.500, remembered" in told and number(r"R - v = #;", told) == reward - 0.5
            assert number("afterwards v = #", told) == pytest.approx((0.48 + reward) / 1.96, abs=1e-3)  # rho is 0.96
        elif "remax" in options:
            assert advantage == reward - number(r"earned ([01])", told)
        else:
            group = [int(r) for r in re.search(r"earned ((?:[01] ?)+)", told)[1].split()]
            expected = ((reward - statistics.mean(group)) * 8 / 7 if "rloo" in options else
                        (reward - statistics.mean(group)) / statistics.stdev(group))
            assert len(group) == 8 and advantage == pytest.approx(expected, abs=2e-3)
    if "16" not in options[1:]:
        assert clipped  # those that the ratio moved most come first
    assert number(r"gradient +norm #", screen) > 0


def test_several_ranks_are_refused(monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    with pytest.raises(InputError, match="--explain: tells of one process; leave out torchrun"):
        Watch(None, None, None)


@pytest.mark.parametrize("values, advantages, told", [
    (None, torch.tensor([0.25]), ("keeps no `values`", "A = +0.250, the same for all")),
    (torch.tensor([0.75]), torch.tensor([0.25]), ("V = 0.750", "A = +0.250")),
    (torch.tensor([[0.5, 0.9]]), torch.tensor([[0.2, 0.4, 9.0]]), ("V of the first token = 0.500", "A = +0.300, the mean over"))])
def test_a_baseline_of_ones_own(values, advantages, told):
    mine = type("Mine", (), {"values": values})()
    batch = types.SimpleNamespace(rewards=torch.tensor([1.0]), responses=[types.SimpleNamespace(ids=[1, 2])])
    expected, advantage, now = about(mine, batch, 0, advantages[0])
    assert told[0] in expected and told[1] in advantage and now == "see Mine.update"
