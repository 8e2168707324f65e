import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.layers.sampling import FEW, Sampling, allow, argmax, entropy, forbid, least, logprobs, penalize, sample
from tests.oracles import reference
from tests.oracles.generate import penalized
from tests.tolerances import OP, assert_close

run_least = jax.jit(least)


def how(count, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, repetition=1.0, presence=0.0, frequency=0.0):
    fill = lambda value, dtype=jnp.float32: jnp.full(count, value, dtype)  # noqa: E731
    return Sampling(
        fill(temperature), fill(top_k, jnp.int32), fill(top_p), fill(min_p), fill(seed, jnp.uint32), fill(repetition),
        fill(presence), fill(frequency),
    )  # fmt: skip


def kept(scores, params):
    """The set of tokens that may be drawn from one row."""
    logits_su = jnp.asarray(scores, jnp.float32)[None]
    logits_su = logits_su - logits_su.max()
    least_s = run_least(logits_su, params)
    return set(np.flatnonzero(np.isfinite(logits_su[0]) & (np.asarray(logits_su[0]) >= least_s[0])).tolist())


@settings(max_examples=400)
@given(
    seed=st.integers(0, 2**31),
    vocabulary=st.sampled_from([61, FEW, FEW + 1, 1000]),
    spread=st.sampled_from([0.3, 2.0, 6.0]),
    top_k=st.sampled_from([0, 1, 2, 7, 40, FEW, FEW + 1, 900, 2000]),
    top_p=st.sampled_from([1.0, 0.999, 0.95, 0.5, 0.05]),
    min_p=st.sampled_from([0.0, 0.02, 0.4, 1.0]),
)
def test_the_filters_keep_the_sets_of_the_reference(seed, vocabulary, spread, top_k, top_p, min_p):
    scores = (spread * np.random.default_rng(seed).standard_normal(vocabulary)).astype(np.float32)
    expected = reference.kept_set(scores.astype(np.float64), 1.0, min(top_k, vocabulary) or vocabulary, top_p, min_p)
    assert kept(scores, how(1, top_k=top_k, top_p=top_p, min_p=min_p)) == expected


def test_a_row_that_is_sorted_as_a_whole_leaves_the_others_as_they_are(key):
    rows = jax.random.normal(key, (8, 1000)) * jnp.linspace(0.1, 8, 8)[:, None]
    rows -= rows.max(axis=-1, keepdims=True)
    params = how(8, top_p=0.97)
    together = run_least(rows, params)
    alone = [run_least(rows[i : i + 1], how(1, top_p=0.97))[0] for i in range(8)]
    np.testing.assert_array_equal(together, alone)
    kept_rows = (rows >= together[:, None]).sum(axis=-1)
    assert kept_rows[0] > FEW > kept_rows[-1]


@pytest.mark.parametrize("filters", [{"top_k": 2}, {"top_p": 0.6}])
def test_all_tokens_as_probable_as_the_last_that_stays_do_so_too(filters):
    assert kept([1.0, 3.0, 2.0, 2.0, 0.0], how(1, **filters)) == {1, 2, 3}


@pytest.mark.parametrize("filters", [{"top_k": 3}, {"top_p": 0.5}, {"min_p": 1.0}])
def test_ties_beyond_the_few_that_are_looked_at_first_stay(filters):
    assert kept([0.0] * (3 * FEW) + [-9.0], how(1, **filters)) == set(range(3 * FEW))


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


@pytest.mark.parametrize(
    "filters", [{"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.3}, {"top_k": 4, "top_p": 0.9, "min_p": 0.05}]
)
def test_draws_after_filters_and_penalties_follow_the_softmax_of_what_is_left(filters):
    scores, said, prompt, temperature = np.array([1.0, 0.0, -1.0, 2.0, 0.5]), [0, 0, 1], [2, 3], 1.3
    costs = {"repetition": 1.2, "presence": 0.1, "frequency": 0.2}
    left = penalized(scores, said, prompt, {f"{name}_penalty": cost for name, cost in costs.items()})
    keeps = {"k": filters.get("top_k", 5), "p": filters.get("top_p", 1.0), "min_p": filters.get("min_p", 0.0)}
    kept_ids = sorted(reference.kept_set(left, temperature, **keeps))
    count = 20_000
    params = how(count, temperature, **filters, **costs)
    rows = jnp.broadcast_to(jnp.asarray(scores, jnp.float32), (count, 5))
    counts = jnp.broadcast_to(jnp.asarray(np.bincount(said, minlength=5), jnp.int32), (count, 5))
    marks = jnp.broadcast_to(jnp.asarray(np.isin(np.arange(5), prompt)), (count, 5))
    drawn = np.asarray(sample(penalize(rows, counts, marks, params), jnp.arange(count), params))
    assert sorted(set(drawn.tolist())) == kept_ids
    assert 1 < len(kept_ids) < 5
    expected = reference.softmax(left[kept_ids] / temperature) * count
    chi_square = ((np.bincount(drawn, minlength=5)[kept_ids] - expected) ** 2 / expected).sum()
    assert chi_square < 16.3  # exceeded once in a thousand at three degrees of freedom, less often at fewer


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 9.9e-6])
def test_a_tiny_temperature_takes_the_most_probable_token(temperature, key):
    rows = jax.random.normal(key, (20, 50))
    found = sample(rows, jnp.arange(20), how(20, temperature))
    np.testing.assert_array_equal(found, rows.argmax(axis=-1))


@pytest.mark.parametrize("largest", [1.0, 1e4, 3e38])
def test_a_small_temperature_overflows_nowhere(largest):
    row = jnp.zeros((1, 50)).at[0, :3].set(jnp.array([-largest, largest, -jnp.inf]))
    assert int(sample(row, jnp.array([3]), how(1, 1e-4, top_p=0.99, top_k=3, min_p=0.01))[0]) == 1


def test_a_small_temperature_still_draws_between_tokens_as_close_as_it():
    count, temperature = 20_000, 1e-4
    row = np.array([0.0, 1e-4, 2e-4, -1.0, 1e-4])
    rows = jnp.broadcast_to(jnp.asarray(row, jnp.float32), (count, 5))
    drawn = np.asarray(sample(rows, jnp.arange(count), how(count, temperature)))
    found, expected = np.bincount(drawn, minlength=5), reference.softmax(row / temperature) * count
    assert found[3] == 0
    assert (np.delete((found - expected) ** 2, 3) / np.delete(expected, 3)).sum() < 16.3  # as above


TOKENS = st.lists(st.integers(0, 10), max_size=12)
COSTS = st.tuples(st.floats(0.25, 4), st.floats(-2, 2), st.floats(-2, 2))


@settings(max_examples=100)
@given(
    st.lists(st.floats(-20, 20, width=32, allow_subnormal=False), min_size=22, max_size=22),
    st.tuples(TOKENS, TOKENS), st.tuples(TOKENS, TOKENS), st.tuples(COSTS, COSTS),
)  # fmt: skip
def test_penalties_are_those_of_the_reference(scores, said, prompts, costs):
    scores_su = np.array(scores, np.float32).reshape(2, 11)
    counts_su = np.stack([np.bincount(np.array(ids, int), minlength=11) for ids in said])
    prompt_su = np.stack([np.isin(np.arange(11), ids) for ids in prompts])
    repetition, presence, frequency = (np.array(column, np.float32) for column in zip(*costs, strict=True))
    params = how(2)._replace(repetition_s=repetition, presence_s=presence, frequency_s=frequency)
    found = penalize(jnp.asarray(scores_su), jnp.asarray(counts_su, jnp.int32), jnp.asarray(prompt_su), params)
    names = ("repetition_penalty", "presence_penalty", "frequency_penalty")
    for row in range(2):
        given_costs = dict(zip(names, map(float, (repetition[row], presence[row], frequency[row])), strict=True))
        expected = penalized(scores_su[row].astype(np.float64), said[row], prompts[row], given_costs)
        assert_close(found[row], expected, OP)


def test_penalties_that_are_off_change_nothing_and_what_is_forbidden_stays_so(key):
    row = jax.random.normal(key, (1, 9)).at[0, 4].set(-jnp.inf)
    counts, marks = jnp.full((1, 9), 3), jnp.ones((1, 9), bool)
    np.testing.assert_array_equal(penalize(row, counts, marks, how(1)), row)
    assert penalize(row, counts, marks, how(1, repetition=1.5, presence=-2, frequency=-2))[0, 4] == -jnp.inf


@given(st.lists(st.lists(st.integers(-1, 10), min_size=3, max_size=3), min_size=2, max_size=2))
def test_forbidden_tokens_of_a_row_and_no_others_become_impossible(ids):
    scores = np.arange(22, dtype=np.float32).reshape(2, 11)
    found = np.asarray(forbid(jnp.asarray(scores), jnp.array(ids)))
    for row in range(2):
        out = np.isin(np.arange(11), ids[row])
        np.testing.assert_array_equal(found[row], np.where(out, -np.inf, scores[row]))


@pytest.mark.parametrize("vocabulary", [31, 97, 128])
def test_bit_i_of_word_j_allows_token_32_j_plus_i(vocabulary, key):
    words = -(-vocabulary // 32)
    bits = np.asarray(jax.random.bits(key, (3, words), jnp.uint32))
    scores = np.asarray(jax.random.normal(key, (3, vocabulary)))
    kept_su = np.unpackbits(bits.astype("<u4").view(np.uint8), axis=1, bitorder="little")[:, :vocabulary]
    found = allow(jnp.asarray(scores), jnp.asarray(bits))
    np.testing.assert_array_equal(found, np.where(kept_su, scores, -np.inf))


def test_of_equal_scores_the_first_is_the_largest_and_any_row_names_a_token():
    rows = jnp.array([[1.0, 3.0, 3.0], [-jnp.inf, -jnp.inf, -jnp.inf], [-jnp.inf, -5.0, -5.0], [1.0, jnp.nan, 2.0]])
    np.testing.assert_array_equal(argmax(rows)[:3], [1, 0, 1])
    assert 0 <= int(argmax(rows)[3]) < 3


def test_entropy_is_that_of_the_softmax_and_at_most_the_logarithm_of_the_vocabulary(key):
    rows = np.asarray(3 * jax.random.normal(key, (4, 40)), np.float64)
    mass = np.stack([reference.softmax(row) for row in rows])
    assert_close(entropy(jnp.asarray(rows, jnp.float32)), -(mass * np.log(mass)).sum(axis=1), OP)
    assert_close(entropy(jnp.zeros((1, 40))), [np.log(40)], OP)
    assert_close(entropy(jnp.array([[0.0, 200.0, 0.0]])), [0.0], OP)


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
