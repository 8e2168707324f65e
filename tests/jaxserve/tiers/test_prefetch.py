import itertools

import pytest

from jaxserve.tiers.prefetch import Prefetch
from tests.jaxserve.tiers.conftest import value_of

VALUES = [value_of("a", bytes([n])) for n in range(4)]


@pytest.mark.parametrize("missing", range(5))
def test_in_whichever_order_values_come_they_are_those_before_the_first_that_is_missing(missing):
    for order in itertools.permutations(range(4)):
        prefetch, come = Prefetch(4), set()
        for index in order:
            prefetch.settle(index, None if index == missing else VALUES[index])
            come.add(index)
            gap = next(n for n in range(5) if n not in come or n == missing)
            assert prefetch.values() == VALUES[:gap]
            assert prefetch.done == (gap == 4 or gap == missing and missing in come)
        assert prefetch.wait() == VALUES[:missing]


def test_places_are_taken_in_order_and_none_behind_one_that_is_missing():
    prefetch = Prefetch(8)
    assert [prefetch.take() for _ in range(3)] == [0, 1, 2]
    prefetch.settle(1, VALUES[1])
    assert prefetch.take() == 3
    prefetch.settle(2, None)
    assert prefetch.take() is None and not prefetch.done
    prefetch.settle(0, VALUES[0])
    assert prefetch.done and prefetch.wait() == VALUES[:2]


def test_after_it_is_cancelled_it_has_what_had_come():
    prefetch = Prefetch(4)
    assert [prefetch.take() for _ in range(3)] == [0, 1, 2]
    prefetch.settle(0, VALUES[0])
    prefetch.settle(2, VALUES[2])
    prefetch.cancel()
    prefetch.settle(1, VALUES[1])
    assert prefetch.done and prefetch.wait() == VALUES[:1] and prefetch.take() is None


def test_of_no_keys_nothing_is_waited_for():
    assert Prefetch(0).done and Prefetch(0).wait() == []


def test_who_waits_for_so_long_gets_what_has_come():
    prefetch = Prefetch(2)
    prefetch.settle(0, VALUES[0])
    assert prefetch.wait(0.01) == VALUES[:1] and not prefetch.done
