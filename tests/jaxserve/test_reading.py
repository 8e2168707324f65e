import jax.numpy as jnp
import numpy as np

from jaxserve.layers.sampling import Logprobs
from jaxserve.reading import Reading
from jaxserve.slots import FINE, NONE_ALLOWED, NOT_FINITE
from jaxserve.steps import Chosen


def chosen(counts, status=None):
    """Rounds x rows of three tokens each: token 100 r + 10 s + w stands at round r, row s, place w."""
    rounds, rows = np.shape(counts)
    r, s, w = np.indices((rounds, rows, 3))
    report = Logprobs(jnp.zeros((rounds, rows, 3)), *(jnp.zeros((rounds, rows, 3), jnp.int32) for _ in range(3)))
    status = np.zeros((rounds, rows, 3), np.int32) if status is None else status
    return Chosen(
        jnp.asarray(100 * r + 10 * s + w, jnp.int32),
        jnp.asarray(counts, jnp.int32),
        jnp.asarray(status),
        report,
        jnp.asarray((100 * r + 10 * s + w)[..., :2] + 1000, jnp.int32),
        jnp.zeros(rounds, bool),
    )


def test_a_row_s_tokens_are_those_that_count_in_the_order_of_rounds():
    reading = Reading(chosen([[2, 0], [0, 1], [3, 0]]), 3)
    first, second = reading.row(0), reading.row(1)
    assert first.tokens == [0, 1, 200, 201, 202]
    assert first.at == [(0, 0, 0), (0, 0, 1), (2, 0, 0), (2, 0, 1), (2, 0, 2)]
    assert second.tokens == [110]


def test_guesses_are_those_of_the_last_round_that_gave_something():
    reading = Reading(chosen([[1, 1], [2, 0], [0, 0]]), 3)
    assert reading.row(0).guesses == [1100, 1101]
    assert reading.row(1).guesses == [1010, 1011]


def test_rounds_that_were_not_asked_for_are_not_read():
    assert Reading(chosen([[1], [1], [1]]), 2).row(0).tokens == [0, 100]
    assert Reading(chosen([[1], [1]]), None).row(0).tokens == [0]


def test_a_row_that_gave_nothing_says_nothing():
    said = Reading(chosen([[0]]), 1).row(0)
    assert (said.tokens, said.at, said.fault) == ([], [], FINE)


def test_the_first_fault_counts_and_none_at_a_place_that_does_not():
    status = np.zeros((2, 2, 3), np.int32)
    status[0, 0, 1], status[1, 0, 0] = NONE_ALLOWED, NOT_FINITE
    status[0, 1, 2] = NOT_FINITE
    reading = Reading(chosen([[2, 2], [1, 1]], status), 2)
    assert reading.row(0).fault == NONE_ALLOWED
    assert reading.row(1).fault == FINE
