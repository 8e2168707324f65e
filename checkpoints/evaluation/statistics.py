"""How sure a score is, and a difference of two scores.

Items of one module are alike, so where a mean's error is estimated from the items, it is from the modules' sums. All
intervals are for 95 %, by the normal distribution.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

Z = NormalDist().inv_cdf(0.975)


class Estimate(NamedTuple):
    """A number, and the interval that holds the true one in 95 of 100 cases; all numbers, if nothing can be said."""

    value: float
    low: float
    high: float


class Parts(NamedTuple):
    """A sum's parts, an item each: the score is the sum of the values over the sum of the weights."""

    modules: Sequence[str]
    values: Sequence[float]
    weights: Sequence[float]


def wilson(right: int, count: int) -> Estimate:
    """A share with Wilson's interval (Wilson 1927), for independent answers."""
    share, spread = right / count, Z * Z / count
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(spread * (share * (1 - share) + spread / 4)) / (1 + spread)
    return Estimate(share, middle - half, middle + half)


def ratio(parts: Parts) -> Estimate:
    """The score with the interval of a ratio of sums over modules (Cochran, Sampling Techniques, section 6.3)."""
    value = _ratio(parts)
    return _interval(value, parts.modules, _influences(parts, value))


def ratio_difference(one: Parts, other: Parts) -> Estimate:
    """The first score less the other, of the same items, item by item: what both find hard cancels."""
    values = _ratio(one), _ratio(other)
    influences = _influences(one, values[0]) - _influences(other, values[1])
    return _interval(values[0] - values[1], one.modules, influences)


def share_difference(one: Parts, other: Parts) -> Estimate:
    """`ratio_difference` of shares, its interval as if half an answer more had changed either way.

    So a few changes, or none, don't look certain (Agresti and Min 2005, Statistics in Medicine 24).
    """
    half = math.sqrt(0.5)  # its square is what it adds to the variance
    found = ratio_difference(_with_two(one, half, 0.0), _with_two(other, 0.0, half))
    return found._replace(value=_ratio(one) - _ratio(other))


def mcnemar(gained: int, lost: int) -> float:
    """The probability of so unequal a split of the answers that changed, if either way were as likely (exact)."""
    changed = gained + lost
    return min(1.0, 2 * sum(math.comb(changed, i) for i in range(min(gained, lost) + 1)) / 2**changed)


def _with_two(parts: Parts, *values: float) -> Parts:
    """Two items more, each of a module of its own."""
    return Parts([*parts.modules, "+", "-"], [*parts.values, *values], [*parts.weights, 1.0, 1.0])


def _ratio(parts: Parts) -> float:
    return math.fsum(parts.values) / math.fsum(parts.weights)


def _influences(parts: Parts, value: float) -> np.ndarray:
    """How far each item moves the ratio."""
    return (np.asarray(parts.values) - value * np.asarray(parts.weights)) / math.fsum(parts.weights)


def _interval(value: float, modules: Sequence[str], influences: np.ndarray) -> Estimate:
    _, numbers = np.unique(modules, return_inverse=True)
    sums = np.bincount(numbers, influences)
    if len(sums) < 2:
        return Estimate(value, -math.inf, math.inf)
    half = Z * math.sqrt(float(sums @ sums) * len(sums) / (len(sums) - 1))
    return Estimate(value, value - half, value + half)
