import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.layers.linear import each_by_own, einsum
from jaxserve.layers.rows import LANES, dot_rows, pays
from jaxserve.parallel.qarray import QArray, quantize
from tests.layers.helpers import intermediates, normal

WIDTHS = [16, 48, 64, 176, 512, 1024, 1408, 2048, 2816, 7168, 18432, 16 * 97]


def codes(rng, *shape) -> np.ndarray:
    return rng.integers(-127, 128, shape, dtype=np.int8)


@pytest.mark.parametrize("width", WIDTHS)
def test_sums_of_rows_with_one_matrix_are_exact(rng, width):
    x, w = codes(rng, 3, width), codes(rng, 5, width)
    sums = jax.jit(dot_rows)(x, w)
    assert sums.dtype == jnp.int32
    assert np.array_equal(sums, x.astype(np.int64) @ w.astype(np.int64).T)


@pytest.mark.parametrize("width", WIDTHS[:6])
def test_sums_of_rows_with_the_matrix_of_each_are_exact(rng, width):
    x, w, experts = codes(rng, 7, width), codes(rng, 4, 5, width), rng.integers(0, 4, 7)
    sums = jax.jit(dot_rows)(x, w, experts)
    assert np.array_equal(sums, np.einsum("id,ifd->if", x.astype(np.int64), w.astype(np.int64)[experts]))


def test_the_largest_sums_are_exact():
    x, w = jnp.full((1, 18432), -127, jnp.int8), jnp.full((2, 18432), 127, jnp.int8)
    assert np.array_equal(dot_rows(x, w), np.full((1, 2), -18432 * 127**2))


def test_widths_that_are_no_multiple_of_the_lanes_have_no_such_loop():
    assert pays(5 * LANES)
    assert not pays(5 * LANES + 8)


def test_elsewhere_a_product_is_as_good(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not pays(5 * LANES)


@pytest.mark.parametrize("rows", [1, 3])
def test_few_rows_of_a_quantized_product_are_computed_so(rng, rows):
    """XLA would compute one number by number, and pack the matrix for each product of more."""
    w = quantize(normal(rng, 30, 64), (1,))
    alone = jax.make_jaxpr(lambda x: einsum("td,fd->tf", x, w))(jnp.ones((rows, 64)))
    assert not list(intermediates(alone, "dot_general"))
    many = jax.make_jaxpr(lambda x: einsum("td,fd->tf", x, w))(jnp.ones((8, 64)))
    assert list(intermediates(many, "dot_general"))


def test_rows_by_their_own_matrices_have_the_bits_of_single_products(rng):
    x, w = quantize(normal(rng, 6, 64), (1,)), quantize(normal(rng, 3, 30, 64), (2,))
    which = jnp.array([2, 0, 0, 1, 2, 2])
    found = jax.jit(lambda x, w: each_by_own(x, w, which, jnp.float32))(x, w)
    for i, expert in enumerate(which.tolist()):
        row, matrix = QArray(x.codes[i : i + 1], x.scale[i : i + 1]), QArray(w.codes[expert], w.scale[expert])
        assert np.array_equal(found[i], einsum("td,fd->tf", row, matrix, jnp.float32)[0])


def test_no_matrix_is_copied_or_widened(rng):
    """Not even before a loop, where XLA moves what stays the same."""
    w, x, experts = jnp.asarray(codes(rng, 4, 128, 1024)), jnp.ones((2, 1024), jnp.int8), jnp.asarray([1, 3])

    def several(x, w, experts):
        step = lambda _, x: jnp.tile(dot_rows(x, w, experts), (1, 8)).astype(jnp.int8)  # noqa: E731
        return jax.lax.fori_loop(0, experts[0] + 2, step, x)

    compiled = jax.jit(several).lower(x, w, experts).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < w.nbytes // 4
