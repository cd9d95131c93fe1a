"""tools/stragglers.py, against the same waits played second by second, and against the paper's draw."""
import math

import numpy as np
import pytest

from tools.stragglers import in_groups, log_normal, one_by_one, ratio, two_kinds


def played(seconds, wanted, grouped):
    """Lets trajectories end one after the other: the second in which `wanted` are usable, and which are."""
    events = sorted((end, g) for g, group in enumerate(seconds) for end in group)
    left, usable = [len(group) for group in seconds], 0
    for now, g in events:
        left[g] -= 1
        if grouped:
            usable += len(seconds[g]) if left[g] == 0 else 0
        else:
            usable += 1
        if usable >= wanted:
            done = [[max(group) <= now if grouped else end <= now for end in group] for group in seconds]
            return now, done


@pytest.mark.parametrize("groups, size, wanted", [(6, 8, 24), (12, 4, 24), (4, 12, 24), (5, 8, 20), (7, 1, 3)])
@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("lengths", [two_kinds, log_normal])
def test_waits_are_those_of_trajectories_that_end_one_by_one(groups, size, wanted, grouped, lengths):
    draws = lengths(0.2, (20, groups, size), np.random.default_rng(0))
    last, done = (in_groups if grouped else one_by_one)(draws, wanted)
    for k, seconds in enumerate(draws.tolist()):
        assert (last[k], done[k].tolist()) == played(seconds, wanted, grouped)


def test_the_papers_draw():
    """The ends of its six groups, and a 24th trajectory at 112 s: 486 / 112 is 4.34, which the paper rounds to 4.35."""
    draw = np.array([[60.0] * 3 + [120.0] * 4 + [end] for end in (553, 519, 495, 486, 130, 133)])
    draw[:, 3] = 112
    assert in_groups(draw, 24)[0] == 486
    assert one_by_one(draw, 24)[0] == 112
    assert ratio(draw, 24) == pytest.approx(4.34, abs=0.005)


def test_the_factor_needs_a_straggler_in_four_of_six_groups():
    """By the binomial distribution: with fast ones below 135 s and stragglers from 400 s, no other draw has it."""
    for p in (0.1, 0.15, 0.3):
        q = 1 - (1 - p) ** 8  # a group with a straggler
        expected = sum(math.comb(6, k) * q**k * (1 - q) ** (6 - k) for k in (4, 5, 6))
        found = (ratio(two_kinds(p, (20_000, 6, 8), np.random.default_rng(0)), 24) > 400 / 135).mean()
        assert found == pytest.approx(expected, abs=0.015)
