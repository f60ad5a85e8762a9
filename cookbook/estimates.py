"""Means over items with 95 % confidence intervals, and paired comparisons of two policies on the same items."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TypeAlias

Item: TypeAlias = tuple[float, float]  # (sum, weight): (1, 1) a problem solved, (12.5 nats, 30 tokens) a row's NLL

RESAMPLES = 4000
SHARE = 0.95
SAME = 1e-9


@dataclass(frozen=True)
class Estimate:
    """sum of sums / sum of weights over the items. `low` and `high` are None where one item tells nothing of the spread."""

    value: float
    low: float | None
    high: float | None
    num_items: int


@dataclass(frozen=True)
class Difference:
    """Of two policies on the same items, the first less the other; how many items each is higher on."""

    value: float
    low: float | None
    high: float | None
    higher: int
    lower: int
    equal: int


def estimate(items: Sequence[Item]) -> Estimate:
    """Wilson's interval for shares of yes and no, else the bootstrap over items (percentiles, seeded)."""
    value = _ratio(items)
    if len(items) < 2:
        return Estimate(value, None, None, len(items))
    if all(weight == 1 and total in (0, 1) for total, weight in items):
        low, high = wilson(sum(total for total, _ in items), len(items))
    else:
        low, high = _percentiles(_resampled(items))
    return Estimate(value, low, high, len(items))


def of_two_samples(first: Sequence[float], second: Sequence[float]) -> list[Item]:
    """Items for a figure that compares members of two samples (the share of wanted replies above unwanted ones), given its
    mean for each member: the mean of either list is the figure. The items' mean is the figure too, and their spread that of
    its placement values (DeLong, DeLong and Clarke-Pearson 1988), so that an interval covers both samples.
    """
    both = len(first) + len(second)
    figure = sum(first) / len(first)
    return [(figure + both / len(own) * (value - figure), 1.0) for own in (first, second) for value in own]


def difference(items: Sequence[Item], others: Sequence[Item]) -> Difference:
    """Both resampled together, so what makes an item hard cancels out."""
    signs = [_sign(a / b - c / d) for (a, b), (c, d) in zip(items, others, strict=True)]
    value = _ratio(items) - _ratio(others)
    low = high = None
    if len(items) > 1:
        low, high = _percentiles(_resampled(items) - _resampled(others))
    return Difference(value, low, high, signs.count(1), signs.count(-1), signs.count(0))


def wilson(successes: float, trials: int) -> tuple[float, float]:
    """The score interval of a share (Wilson 1927): it does not shrink to a point at 0 or 1."""
    z = NormalDist().inv_cdf((1 + SHARE) / 2)
    share, scale = successes / trials, 1 + z * z / trials
    middle = (share + z * z / (2 * trials)) / scale
    reach = z / scale * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return max(0.0, middle - reach), min(1.0, middle + reach)


def _ratio(items: Sequence[Item]) -> float:
    return sum(total for total, _ in items) / sum(weight for _, weight in items)


def _resampled(items: Sequence[Item]):
    """The ratio of each of RESAMPLES draws of as many items with replacement; the same draws for the same number of items."""
    import numpy

    counts = numpy.random.default_rng(0).multinomial(len(items), [1 / len(items)] * len(items), size=RESAMPLES)
    totals, weights = numpy.asarray(items, dtype=float).T
    return (counts @ totals) / (counts @ weights)


def _percentiles(values) -> tuple[float, float]:
    import numpy

    low, high = numpy.quantile(values, [(1 - SHARE) / 2, (1 + SHARE) / 2])
    return float(low), float(high)


def _sign(value: float) -> int:
    return 0 if abs(value) < SAME else 1 if value > 0 else -1
