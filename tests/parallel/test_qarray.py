import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.parallel.qarray import QArray, dequantize, quantize_blocks, quantize_rows


def test_the_largest_value_of_a_row_is_127_and_the_error_is_half_a_step_at_most():
    x_td = np.random.default_rng(0).normal(size=(50, 33)).astype(np.float32) * np.logspace(-20, 20, 50)[:, None]
    x_td = x_td.astype(np.float32)
    codes, scale = quantize_rows(jnp.asarray(x_td))
    assert (codes.dtype, codes.shape, scale.dtype, scale.shape) == (jnp.int8, (50, 33), jnp.float32, (50, 1))
    assert np.abs(codes).max(axis=1).tolist() == [127] * 50
    assert (np.abs(np.asarray(codes) * np.asarray(scale) - x_td) <= 0.5001 * np.asarray(scale)).all()


def test_a_row_of_zeros_stays_one():
    codes, scale = quantize_rows(jnp.zeros((2, 3)))
    assert not codes.any() and not scale.any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_values_come_back_in_the_dtype_that_is_asked_for(dtype):
    x_td = jnp.array([[1.0, -127.0, 64.0], [0.0, 0.5, 0.25]])
    found = jax.jit(lambda x: dequantize(quantize_rows(x), dtype))(x_td)
    assert found.dtype == dtype
    np.testing.assert_allclose(found.astype(jnp.float32), x_td, atol=0.5)
    assert found[0].tolist() == [1.0, -127.0, 64.0]


def test_blocks_of_a_row_have_the_codes_and_scales_that_each_would_have_alone():
    x_td = jnp.asarray(np.random.default_rng(1).normal(size=(5, 24)) * np.logspace(-3, 3, 24), jnp.float32)
    codes, scale = quantize_blocks(x_td, 4)
    assert (codes.shape, scale.shape) == ((5, 24), (5, 4))
    for i in range(4):
        alone = quantize_rows(x_td[:, 6 * i : 6 * i + 6])
        assert np.array_equal(codes[:, 6 * i : 6 * i + 6], alone.codes)
        assert np.array_equal(scale[:, i : i + 1], alone.scale)


def test_values_have_the_scale_of_their_block_along_every_axis():
    codes = np.random.default_rng(2).integers(-127, 128, (4, 6, 8)).astype(np.int8)
    scale = np.random.default_rng(3).random((4, 2, 1)).astype(np.float32)
    expected = codes.reshape(4, 2, 3, 8) * scale[:, :, None]
    assert np.array_equal(
        dequantize(QArray(jnp.asarray(codes), jnp.asarray(scale)), jnp.float32), expected.reshape(4, 6, 8)
    )
