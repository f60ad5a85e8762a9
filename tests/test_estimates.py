"""Intervals and comparisons of `cook eval`: known values, coverage, and what pairing gains."""

from __future__ import annotations

import random
import statistics

import pytest

from cookbook.estimates import difference, estimate, of_two_samples, wilson


def test_a_share_has_wilsons_interval() -> None:
    assert wilson(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-4)  # Newcombe 1998, table I and its like
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    found = estimate([(1.0, 1.0)] * 81 + [(0.0, 1.0)] * 182)
    assert (found.value, found.num_items) == (81 / 263, 263)
    assert (found.low, found.high) == pytest.approx((0.2553, 0.3662), abs=1e-4)


def test_an_nll_is_a_ratio_of_sums_and_its_interval_covers_the_truth() -> None:
    draw = random.Random(0)
    covered = 0
    for _ in range(60):
        items = []
        for _ in range(80):
            tokens = draw.randrange(5, 60)
            items.append((tokens * draw.gauss(1.5, 0.4), float(tokens)))
        found = estimate(items)
        assert found.value == pytest.approx(sum(a for a, _ in items) / sum(b for _, b in items))
        assert found.low is not None and found.high is not None
        covered += found.low < 1.5 < found.high
    assert covered >= 51  # of 60; 57 expected


def test_one_item_has_no_interval() -> None:
    found = estimate([(3.0, 2.0)])
    assert (found.value, found.low, found.high) == (1.5, None, None)


def test_pairing_takes_out_what_makes_an_item_hard() -> None:
    draw = random.Random(1)
    hard = [draw.gauss(2.0, 1.0) for _ in range(100)]
    mine, theirs = ([(h + shift + draw.gauss(0, 0.05), 1.0) for h in hard] for shift in (-0.1, 0.0))
    found, alone, other = difference(mine, theirs), estimate(mine), estimate(theirs)
    assert alone.high is not None and other.low is not None and found.high is not None and found.low is not None
    assert alone.high > other.low  # the two intervals overlap widely
    assert -0.13 < found.low < found.value < found.high < -0.07
    assert found.lower > 80 and found.higher + found.lower + found.equal == 100


def test_a_policy_does_not_differ_from_itself() -> None:
    items = [(float(i), 2.0) for i in range(9)]
    found = difference(items, items)
    assert (found.value, found.low, found.high, found.equal) == (0.0, 0.0, 0.0, 9)


def test_items_of_two_samples_have_the_mean_of_the_figure_and_the_variance_of_both() -> None:
    above, below = [1.0, 0.25, 0.5, 0.25], [0.0, 1.0]
    items = [value for value, _ in of_two_samples(above, below)]
    assert statistics.mean(items) == pytest.approx(0.5)
    expected = statistics.pvariance(above) / 4 + statistics.pvariance(below) / 2
    assert statistics.pvariance(items) / 6 == pytest.approx(expected)
