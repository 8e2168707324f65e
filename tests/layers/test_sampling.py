import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.layers.sampling import Sampling, keep, logprobs, rank, sample
from tests.oracles import reference


def how(count, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0):
    fill = lambda value, dtype: jnp.full(count, value, dtype)  # noqa: E731
    off = {
        "repetition_s": fill(1.0, jnp.float32),
        "presence_s": fill(0, jnp.float32),
        "frequency_s": fill(0, jnp.float32),
    }
    return Sampling(
        fill(temperature, jnp.float32), fill(top_k, jnp.int32), fill(top_p, jnp.float32), fill(min_p, jnp.float32),
        fill(seed, jnp.uint32), **off,
    )  # fmt: skip


def kept(scores, params):
    """The set of tokens that may be drawn from one row."""
    ranked = rank(jnp.asarray(scores, jnp.float32)[None])
    return set(np.asarray(ranked.ids_su)[np.asarray(keep(ranked.scores_su, params))].tolist())


@settings(max_examples=200)
@given(
    seed=st.integers(0, 2**31),
    top_k=st.sampled_from([0, 1, 2, 7, 40, 200]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.05]),
    min_p=st.sampled_from([0.0, 0.02, 0.4, 1.0]),
)
def test_the_filters_keep_the_sets_of_the_reference(seed, top_k, top_p, min_p):
    scores = (2 * np.random.default_rng(seed).standard_normal(61)).astype(np.float32)
    expected = reference.kept_set(scores.astype(np.float64), 1.0, min(top_k, 61) or 61, top_p, min_p)
    assert kept(scores, how(1, top_k=top_k, top_p=top_p, min_p=min_p)) == expected


def test_ties_with_the_last_of_top_k_all_stay():
    assert kept([1.0, 3.0, 2.0, 2.0, 0.0], how(1, top_k=2)) == {1, 2, 3}


def test_the_most_probable_token_always_stays():
    assert kept([0.0, 5.0, 1.0], how(1, top_p=1e-6)) == {1}


def test_temperature_zero_takes_the_largest_and_the_first_of_equals():
    scores = jnp.array([[0.0, 2.0, 2.0], [3.0, 1.0, 0.0]])
    assert sample(scores, jnp.array([4, 5]), how(2, temperature=0.0)).tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_draws_follow_the_softmax(temperature):
    scores = np.array([1.0, 0.0, -1.0, 2.0, 0.5])
    count = 20_000
    rows = jnp.broadcast_to(jnp.asarray(scores, jnp.float32), (count, 5))
    drawn = np.asarray(sample(rows, jnp.arange(count), how(count, temperature)))
    expected = reference.softmax(scores / temperature) * count
    chi_square = ((np.bincount(drawn, minlength=5) - expected) ** 2 / expected).sum()
    assert chi_square < 18.5  # exceeded once in a thousand at four degrees of freedom


def test_a_draw_depends_on_seed_and_position_alone(key):
    row = jax.random.normal(key, (1, 50))
    alone = [int(sample(row, jnp.array([p]), how(1, seed=9))[0]) for p in range(20)]
    batch = sample(jnp.repeat(row, 20, axis=0), jnp.arange(20), how(20, seed=9)).tolist()
    assert alone == batch
    assert batch != sample(jnp.repeat(row, 20, axis=0), jnp.arange(20), how(20, seed=10)).tolist()
    assert len(set(batch)) > 5


def test_greedy_and_drawn_rows_mix_in_a_batch(key):
    rows = jax.random.normal(key, (2, 50))
    mixed = how(2)._replace(temperature_s=jnp.array([0.0, 1.0]))
    tokens = sample(rows, jnp.array([3, 3]), mixed)
    assert int(tokens[0]) == int(rows[0].argmax())
    assert int(tokens[1]) == int(sample(rows[1:], jnp.array([3]), how(1))[0])


def test_logprobs_equal_the_log_of_the_softmax(key):
    rows = np.asarray(jax.random.normal(key, (3, 40)))
    found = logprobs(jnp.asarray(rows), jnp.array([4, 9, 0]), 5)
    expected = np.stack([np.log(reference.softmax(row.astype(np.float64))) for row in rows])
    np.testing.assert_allclose(found.chosen_s, expected[[0, 1, 2], [4, 9, 0]], atol=1e-5)
    np.testing.assert_array_equal(found.top_ids_sk, np.argsort(-expected, axis=1)[:, :5])
    for row, token in enumerate((4, 9, 0)):
        assert found.rank_s[row] == 1 + (expected[row] > expected[row, token]).sum()
