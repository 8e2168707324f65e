import math

import numpy as np
import pytest

from jaxserve.checkpoints.evaluation.statistics import (
    Parts,
    mcnemar,
    ratio,
    ratio_difference,
    share_difference,
    wilson,
)


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, Statistics in Medicine 17, table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_shares_have_wilson_s_interval(right, count, low, high):
    got = wilson(right, count)
    assert got.value == right / count
    assert (got.low, got.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


@pytest.mark.parametrize(
    ("gained", "lost", "p"),
    [(0, 0, 1.0), (3, 3, 1.0), (1, 9, 22 / 1024), (9, 1, 22 / 1024), (0, 6, 1 / 32), (2, 3, 1.0)],
)
def test_mcnemar_is_the_binomial_probability_of_both_tails(gained, lost, p):
    assert mcnemar(gained, lost) == pytest.approx(p)


def test_a_mean_of_modules_with_one_item_each_has_the_usual_standard_error():
    values = [1.0, 4.0, 2.0, 7.0, 3.0]
    got = ratio(Parts(list("abcde"), values, [1.0] * 5))
    error = np.std(values, ddof=1) / math.sqrt(5)
    assert got == pytest.approx((3.4, 3.4 - 1.959964 * error, 3.4 + 1.959964 * error))


def test_items_of_a_module_that_are_alike_count_as_one():
    alone = ratio(Parts(list("abc"), [1.0, 2.0, 4.0], [1.0] * 3))
    repeated = ratio(Parts(list("aabbcc"), [1.0, 1.0, 2.0, 2.0, 4.0, 4.0], [1.0] * 6))
    assert repeated == pytest.approx(alone)


def test_a_ratio_s_interval_covers_the_true_one_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    modules = np.repeat(np.arange(60), 4).astype(str).tolist()
    covered = 0
    for _ in range(400):
        weights = rng.uniform(1, 3, 240)
        rates = 2.0 + np.repeat(rng.normal(0, 0.5, 60), 4) + rng.normal(0, 0.5, 240)
        got = ratio(Parts(modules, weights * rates, weights))
        covered += got.low < 2.0 < got.high
    assert 0.91 < covered / 400 < 0.98


def test_what_both_find_hard_cancels_in_a_difference():
    rng = np.random.default_rng(0)
    modules = [str(i // 2) for i in range(100)]
    hard, weights = rng.normal(5, 2, 100), [1.0] * 100
    one, other = Parts(modules, hard + 0.1, weights), Parts(modules, hard, weights)
    assert ratio_difference(one, other) == pytest.approx((0.1, 0.1, 0.1))
    assert ratio(one).low < ratio(other).value < ratio(one).high


def test_a_difference_of_equal_weights_is_the_mean_of_the_differences():
    rng = np.random.default_rng(1)
    modules, (a, b) = list("abcdefgh"), rng.normal(size=(2, 8))
    one, other, both = (Parts(modules, values, [1.0] * 8) for values in (a, b, a - b))
    assert ratio_difference(one, other) == pytest.approx(ratio(both))


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (3, 0), (7, 2), (20, 20)])
def test_a_difference_of_shares_has_agresti_and_min_s_interval(gained, lost):
    one, other = ([1.0] * a + [0.0] * b + [1.0] * (200 - a - b) for a, b in ((gained, lost), (0, gained)))
    other[gained : gained + lost] = [1.0] * lost
    modules, weights = [str(i) for i in range(200)], [1.0] * 200
    got = share_difference(Parts(modules, one, weights), Parts(modules, other, weights))
    middle = (gained - lost) / 202
    variance = (gained + lost + 1 - (gained - lost) ** 2 / 202) / 202**2
    half = 1.959964 * math.sqrt(variance * 202 / 201)  # theirs divides by all, not by one less
    assert got.value == pytest.approx((gained - lost) / 200)
    assert got[1:] == pytest.approx((middle - half, middle + half))


def test_of_a_single_module_nothing_is_known():
    assert ratio(Parts(["a", "a"], [1.0, 2.0], [1.0, 1.0])) == (1.5, -math.inf, math.inf)
