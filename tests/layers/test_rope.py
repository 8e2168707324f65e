import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.layers import rope as rope_module
from jaxserve.layers.config import Config, Rope, Yarn
from jaxserve.layers.rope import frequencies
from tests.layers import published
from tests.layers.helpers import f64, normal, raw_config
from tests.oracles import reference
from tests.tolerances import LAYER, OP, assert_close

rotate = jax.jit(rope_module.rotate, static_argnames="rope")
TURNS = {True: reference.rotate_interleaved, False: reference.rotate_half_split}

_YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 24, "beta_fast": 32, "beta_slow": 1}
CONFIGS = {
    "plain": raw_config("deepseek_v3"),
    "half ramp": raw_config("deepseek_v2", rope_scaling=_YARN | {"mscale": 1.0, "mscale_all_dim": 0.707}, rope_theta=9),
    "uneven ramp": raw_config("qwen3", rope_scaling=_YARN | {"truncate": False}, rope_theta=20.0),
    "given factor": raw_config("qwen3", rope_scaling=_YARN | {"attention_factor": 1.5}, rope_theta=20.0),
    "v3": published.DEEPSEEK_V3,
    "kimi": published.KIMI_K2,
    "qwen": published.QWEN3_06B,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_frequencies_and_magnitude_equal_the_reference(name):
    rope, (expected, magnitude) = Config.from_hf(CONFIGS[name]).rope, reference.rope_frequencies(CONFIGS[name])
    np.testing.assert_allclose(frequencies(rope), expected, rtol=1e-14)
    assert (rope.yarn.magnitude if rope.yarn else 1.0) == pytest.approx(magnitude, rel=1e-14)


def test_yarn_keeps_fast_pairs_and_divides_slow_ones_by_the_factor():
    plain, yarn = Rope(64, 1e4, True), Rope(64, 1e4, True, Yarn(factor=40.0, original_positions=4096))
    ratio = frequencies(plain) / frequencies(yarn)
    assert ratio[:10] == pytest.approx(1.0) and ratio[24:] == pytest.approx(40.0)
    assert (np.diff(ratio[10:24]) > 0).all()


@pytest.mark.parametrize("interleaved", [True, False])
def test_both_conventions_equal_the_reference(rng, interleaved):
    rope = Rope(8, 100.0, interleaved, Yarn(4.0, 64, magnitude=1.3))
    x, positions = normal(rng, 5, 3, 8), np.array([0, 1, 7, 100, 511], np.int32)
    expected = TURNS[interleaved](np.asarray(x), positions, frequencies(rope), 1.3)
    # An angle of 511 has, in float32, an error of 511 roundings.
    assert_close(rotate(x, jnp.asarray(positions), rope), expected, 511 + OP)


def test_a_pair_turns_by_its_position():
    for interleaved, second in ((True, [0.0, 0.0]), (False, [0.0, np.sin(2)])):
        y = rotate(jnp.array([[[1.0, 0, 0, 0]]]), jnp.array([2]), Rope(4, 1e9, interleaved))
        y = np.asarray(y)[0, 0]
        assert_close(y[[0, 2]], [np.cos(2), second[1]], OP)
        assert_close(y[1], np.sin(2) if interleaved else 0.0, OP)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("shift", [1, 37, 300])
def test_products_of_queries_and_keys_depend_on_the_distance_only(rng, interleaved, shift):
    rope = Rope(16, 1e4, interleaved)
    q, k = normal(rng, 2, 6, 1, 16)
    places_q, places_k = jnp.arange(6) * 3 + 5, jnp.arange(6)

    def products(by: int):
        turned_q, turned_k = rotate(q, places_q + by, rope), rotate(k, places_k + by, rope)
        return np.einsum("thr,jhr->tj", f64(turned_q), f64(turned_k))

    assert_close(products(shift), products(0), LAYER + shift)
    assert np.abs(products(0) - np.einsum("thr,jhr->tj", q, k)).max() > 0.1


def test_position_zero_changes_nothing_but_the_magnitude(rng):
    x = normal(rng, 1, 2, 8)
    assert_close(rotate(x, jnp.array([0]), Rope(8, 1e4, True)), x, 0)
    assert_close(rotate(x, jnp.array([0]), Rope(8, 1e4, False, Yarn(2.0, 64, magnitude=1.25))), 1.25 * x, OP)


def test_the_dtype_is_kept_and_angles_have_float32(rng):
    x = normal(rng, 1, 2, 8, dtype=jnp.bfloat16)
    rope, place = Rope(8, 1e4, True), np.array([300])
    y = rotate(x, jnp.asarray(place, jnp.int32), rope)
    assert y.dtype == jnp.bfloat16
    assert_close(y, reference.rotate_interleaved(f64(x), place, frequencies(rope)), 1, jnp.bfloat16)
