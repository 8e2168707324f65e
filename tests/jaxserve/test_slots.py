import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.layers.sampling import Sampling
from jaxserve.slots import FINE, NONE_ALLOWED, NOT_FINITE, Masks, Table, advance, choose, empty, mark, places

SLOTS, VOCABULARY = 3, 40
END, LIMIT, FIRST_END = 9, 20, 12
SECOND = jnp.asarray([False, True, False])


def table(**columns):
    """Three greedy slots of which token 9 ends the answer, from place 12 on; with 20 tokens they are full."""
    ones, zeros, no = jnp.ones(SLOTS), jnp.zeros(SLOTS), jnp.zeros(SLOTS, bool)
    whole = jnp.zeros(SLOTS, jnp.int32)
    given = Table(
        pages_sp=jnp.zeros((SLOTS, 1), jnp.int32),
        limits_s=whole + LIMIT,
        sampling=Sampling(zeros, whole, ones, zeros, whole.astype(jnp.uint32), ones, zeros, zeros),
        ends_sk=jnp.full((SLOTS, 2), -1, jnp.int32).at[:, 0].set(END),
        first_end_s=whole + FIRST_END,
        penalized_s=no,
        biased_s=no,
        reported_s=no,
    )
    return given._replace(**columns)


def free(rows, width):
    return Masks(jnp.zeros(rows, bool), jnp.full((rows, width, 2), 0xFFFFFFFF, jnp.uint32))


def advanced(row, tokens, start, count):
    """The slots after one row."""
    given = jnp.asarray([tokens], jnp.int32), jnp.asarray([start], jnp.int32), jnp.asarray([count], jnp.int32)
    return jax.jit(advance)(empty(SLOTS, 1, VOCABULARY), jnp.asarray([row], jnp.int32), table(), *given)


def chosen(scores, guesses=(), start=15, slots=None, masks=None, **columns):
    """What slot 1 chooses from a row of scores for each place."""
    rows_s, start_s = jnp.asarray([1], jnp.int32), jnp.asarray([start], jnp.int32)
    guesses_sk = jnp.asarray([guesses], jnp.int32).reshape(1, len(guesses))
    slots = empty(SLOTS, len(guesses), VOCABULARY) if slots is None else slots
    masks = free(1, 1 + len(guesses)) if masks is None else masks
    scores_tu = jnp.asarray(scores, jnp.float32).reshape(1 + len(guesses), VOCABULARY)
    return jax.jit(choose)(scores_tu, start_s, guesses_sk, rows_s, slots, table(**columns), masks)


def scores(**high):
    """Zeros but for some tokens: `t5=2.0`."""
    found = np.zeros(VOCABULARY, np.float32)
    for name, value in high.items():
        found[int(name[1:])] = value
    return found


def test_a_row_that_advances_has_its_last_token_that_counts():
    slots = advanced(1, [4, 5, 6], start=10, count=2)
    assert slots.tokens_s.tolist() == [0, 5, 0]
    assert slots.positions_s.tolist() == [-1, 11, -1]
    assert slots.counts_su[1].nonzero()[0].tolist() == [4, 5]
    assert slots.counts_su.sum() == 2


@pytest.mark.parametrize(
    ("tokens", "start", "count", "position"),
    [
        ([4, END, 5], 12, 3, -1),
        ([4, END, 5], 12, 1, 12),  # the end does not count
        ([4, END, 5], 11, 3, -1),  # at the first place where it may stand
        ([4, END, 5], 10, 3, 12),  # a place before
        ([4, 5, 6], 16, 3, 18),
        ([4, 5, 6], 17, 3, -1),  # full
        ([4, 5, 6], 17, 2, 18),
        ([4, 5, 6], 10, 0, -1),
    ],
)
def test_an_end_or_the_limit_ends_the_answer(tokens, start, count, position):
    assert advanced(1, tokens, start, count).positions_s[1] == position


def test_a_row_that_is_no_slot_advances_nothing():
    before, after = empty(SLOTS, 1, VOCABULARY), advanced(SLOTS, [4, 5, 6], 10, 2)
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old, new)


def test_places_end_before_the_one_that_nothing_can_follow():
    found = places(jnp.asarray([5, 17, 18, 19, -1], jnp.int32), jnp.full(5, LIMIT, jnp.int32), 3)
    assert found.tolist() == [[5, 6, 7], [17, 18, -1], [18, -1, -1], [-1, -1, -1], [-1, -1, -1]]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_no_numbers_are_noted_at_their_place(bad):
    both = np.stack([scores(t5=1.0), scores(t5=1.0)])
    both[1, 7] = bad
    assert chosen(both, guesses=[5]).status_sw.tolist() == [[FINE, NOT_FINITE]]


def test_masks_that_allow_nothing_are_noted_at_their_place():
    bits = jnp.zeros((1, 2, 2), jnp.uint32).at[0, 0, 0].set(1 << 3)
    choice = chosen([scores(t5=1.0)] * 2, guesses=[3], masks=Masks(jnp.ones(1, bool), bits))
    assert choice.status_sw.tolist() == [[FINE, NONE_ALLOWED]]
    assert choice.tokens_sw[0, 0] == 3


def test_a_bias_that_leaves_nothing_is_noted():
    slots = empty(SLOTS, 0, VOCABULARY)
    slots = slots._replace(bias_su=jnp.full_like(slots.bias_su, -jnp.inf))
    assert chosen(scores(), slots=slots, biased_s=SECOND).status_sw.tolist() == [[NONE_ALLOWED]]
    assert chosen(scores(), slots=slots, biased_s=~SECOND).status_sw.tolist() == [[FINE]]


def test_an_end_that_may_not_stand_yet_is_not_chosen():
    high = scores(t9=3.0, t5=2.0)
    assert chosen([high] * 3, guesses=[5, 5], start=FIRST_END - 2).tokens_sw.tolist() == [[5, 5, END]]


def test_guesses_count_as_said_at_the_places_after_them():
    high = scores(t5=3.0, t6=2.5, t7=2.0)
    how = table().sampling._replace(presence_s=jnp.ones(SLOTS))
    choice = chosen([high] * 3, guesses=[5, 6], sampling=how, penalized_s=SECOND)
    assert choice.tokens_sw.tolist() == [[5, 6, 5]]  # 3, then 2.5 against 2, then 2 against 1.5 and 2


def test_a_mark_is_written_to_its_slot_alone():
    counts, prompt, bias = jnp.arange(VOCABULARY), jnp.ones(VOCABULARY, bool), jnp.full(VOCABULARY, 0.5)
    slots = mark(empty(SLOTS, 1, VOCABULARY), jnp.int32(1), counts.astype(jnp.int32), prompt, bias)
    assert slots.counts_su[1].tolist() == list(range(VOCABULARY))
    assert slots.prompt_su[1].all() and (slots.bias_su[1] == 0.5).all()
    for column in (slots.counts_su, slots.prompt_su, slots.bias_su):
        assert not column[0].any() and not column[2].any()
