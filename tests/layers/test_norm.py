import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.layers import norm
from tests.layers.helpers import f64, normal
from tests.oracles import reference
from tests.tolerances import OP, assert_close

rms_norm = jax.jit(norm.rms_norm, static_argnames="eps")


def test_a_worked_example():
    y = rms_norm(jnp.array([[3.0, 4.0]]), jnp.array([1.0, 10.0]), eps=0.0)
    assert_close(y, [[3 / 12.5**0.5, 40 / 12.5**0.5]], OP)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("shape", [(5, 48), (2, 3, 48), (48,)])
def test_it_equals_the_reference_over_the_last_axis_and_keeps_the_dtype(rng, shape, dtype):
    x = normal(rng, *shape, dtype=dtype)
    gain = 1 + normal(rng, *shape[-1:], dtype=dtype)
    y = rms_norm(x, gain, eps=1e-3)
    assert y.dtype == dtype
    assert_close(y, reference.rms_norm(f64(x), f64(gain), 1e-3), OP, dtype)


def test_eps_outweighs_a_vanishing_row():
    y = rms_norm(jnp.array([[0.0, 0.0], [1e-4, 1e-4]]), jnp.ones(2), eps=1e-6)
    assert_close(y, [[0, 0], [1e-4 / 1.01e-6**0.5] * 2], OP)


def test_squares_of_float16_do_not_overflow():
    y = rms_norm(jnp.full((1, 4), 3e4, jnp.float16), jnp.ones(4, jnp.float16), eps=1e-6)
    assert_close(y, np.ones((1, 4)), OP, jnp.float16)


def test_the_gain_may_have_another_dtype():
    assert rms_norm(jnp.ones((1, 4), jnp.bfloat16), jnp.ones(4), eps=1e-6).dtype == jnp.bfloat16
