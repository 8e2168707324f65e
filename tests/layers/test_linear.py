import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.layers.attention import merge_heads
from jaxserve.layers.linear import einsum, matvec, product, quantized_like
from jaxserve.parallel.qarray import QArray, quantize, quantize_blocks
from tests.layers.helpers import f64, intermediates, normal
from tests.tolerances import LAYER, OP, assert_close


def rows_of_product(x, w) -> int:
    """Rows of activations in the product that is run."""
    ((rows, columns),) = intermediates(jax.make_jaxpr(lambda x, w: einsum("td,fd->tf", x, w))(x, w), "dot_general")
    return rows if columns == len(w) else columns


@pytest.mark.parametrize(
    ("spec", "x", "w"),
    [
        ("td,fd->tf", (5, 7), (3, 7)),
        ("td,hrd->thr", (1, 7), (2, 3, 7)),
        ("thv,dhv->td", (5, 2, 3), (7, 2, 3)),
        *(("thn,hnc->thc", (rows, 2, 7), (2, 7, 3)) for rows in (1, 5, 40)),
        *(("thc,hvc->thv", (rows, 2, 7), (2, 3, 7)) for rows in (1, 5, 40)),
        ("td,efd->etf", (5, 7), (4, 3, 7)),
        ("td,efd->etf", (1, 7), (4, 3, 7)),
        ("etf,edf->etd", (4, 1, 7), (4, 3, 7)),
        ("etd,efd->etf", (4, 5, 7), (4, 3, 7)),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_it_equals_the_product_in_float64(rng, spec, x, w, dtype):
    x_array = normal(rng, *x, dtype=dtype)
    w_array = normal(rng, *w, dtype=dtype)
    y = einsum(spec, x_array, w_array)
    assert y.dtype == dtype
    assert_close(y, np.einsum(spec, f64(x_array), f64(w_array)), OP if dtype == jnp.float32 else 1, dtype)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_single_row_of_16_bits_is_computed_as_two(rng, dtype):
    x, w = normal(rng, 1, 64, dtype=dtype), normal(rng, 9, 64, dtype=dtype)
    assert rows_of_product(x, w) == 2
    alone, beside = einsum("td,fd->tf", x, w), einsum("td,fd->tf", jnp.concatenate([x, 3 * x]), w)
    assert alone.shape == (1, 9)
    np.testing.assert_array_equal(alone, beside[:1])


def test_other_products_have_no_row_too_many(rng):
    w = normal(rng, 9, 64)
    assert rows_of_product(jnp.ones((1, 64)), w) == 1
    assert rows_of_product(jnp.ones((3, 64), jnp.bfloat16), w.astype(jnp.bfloat16)) == 3


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_vector_times_a_matrix_out_of_several_equals_the_product_in_float64(rng, dtype):
    x, w_efd = normal(rng, 70, dtype=dtype), normal(rng, 4, 30, 70, dtype=dtype)
    y = jax.jit(lambda x, w, i: matvec(x, jax.lax.dynamic_index_in_dim(w, i, keepdims=False)))(x, w_efd, 2)
    assert y.dtype == dtype
    assert_close(y, f64(w_efd)[2] @ f64(x), OP if dtype == jnp.float32 else 1, dtype)
    ones = jnp.ones(4096, jnp.bfloat16)
    assert_close(matvec(ones, ones[None]), [4096.0], 0)  # summed in bfloat16, they would stop at 256


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_sums_of_16_bit_products_do_not_saturate(rows):
    """Summed in bfloat16, ones would stop at 256."""
    y = einsum("td,fd->tf", jnp.ones((rows, 4096), jnp.bfloat16), jnp.ones((2, 4096), jnp.bfloat16))
    assert_close(y, np.full((rows, 2), 4096.0), 0)


@pytest.mark.parametrize(
    ("spec", "w", "rows", "product"),
    [
        ("thn,hnc->thc", (6, 32, 64), 2, (6, 2, 64)),
        ("thn,hnc->thc", (6, 32, 64), 40, (6, 40, 64)),
        ("thc,hvc->thv", (6, 64, 32), 2, (6, 64, 2)),
        ("thc,hvc->thv", (6, 64, 32), 40, (6, 40, 64)),
    ],
)
def test_products_of_heads_have_the_heads_in_front(spec, w, rows, product):
    """As written, XLA's CPU backend runs the first one number by number: 6 to 20 times slower."""
    jaxpr = jax.make_jaxpr(lambda x, w: einsum(spec, x, w))(jnp.ones((rows, 6, 32)), jnp.ones(w))
    assert list(intermediates(jaxpr, "dot_general")) == [product]


def test_float32_keeps_its_precision(rng):
    x, w = normal(rng, 2, 300), normal(rng, 3, 300)
    assert_close(einsum("td,fd->tf", x, w), f64(x) @ f64(w).T, LAYER)


SPECS = [  # rows by a matrix, by one for each expert, for each head; rows of each expert by its own
    ("td,fd->tf", (1, 70), (30, 70)),
    ("td,fd->tf", (5, 70), (30, 70)),
    ("td,fd->tf", (40, 70), (30, 70)),
    ("td,hrd->thr", (3, 70), (2, 5, 70)),
    ("td,efd->etf", (1, 70), (4, 30, 70)),
    ("td,efd->etf", (9, 70), (4, 30, 70)),
    ("etf,edf->etd", (4, 1, 30), (4, 70, 30)),
    ("etf,edf->etd", (4, 6, 30), (4, 70, 30)),
]
CODES = {
    "random": lambda rng, shape: rng.integers(-127, 128, shape),
    "extreme": lambda rng, shape: rng.choice([-127, 127], shape),
    "equal": lambda rng, shape: np.full(shape, -127),
    "zero": lambda rng, shape: np.zeros(shape),
}


@pytest.mark.parametrize(("spec", "x", "w"), SPECS)
@pytest.mark.parametrize("kind", CODES)
def test_sums_of_int8_are_exact(rng, spec, x, w, kind):
    x, w = (CODES[kind](rng, shape).astype(np.int8) for shape in (x, w))
    sums = jax.jit(lambda x, w: product(spec, x, w))(x, w)
    assert sums.dtype == jnp.int32
    assert np.array_equal(sums, np.einsum(spec, x.astype(np.int64), w.astype(np.int64)))


def test_long_sums_of_int8_are_exact():
    """Of DeepSeek-V3's widest matrix: more than float32 can count."""
    x, w = jnp.full((2, 18432), 127, jnp.int8), jnp.full((3, 18432), 127, jnp.int8)
    assert np.array_equal(product("td,fd->tf", x, w), np.full((2, 3), 18432 * 127**2))


@pytest.mark.parametrize(("spec", "x", "w"), SPECS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_quantized_weight_is_multiplied_in_integers_and_scaled_after(rng, spec, x, w, dtype):
    """By the rule written out in NumPy: 127 is the largest magnitude, halves go to even, zero rows stay."""

    def rounded(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        most = np.abs(values).max(axis=-1, keepdims=True)
        return np.round(values * np.divide(127, most, out=np.zeros_like(most), where=most > 0)), most / 127

    x_array, w_array = normal(rng, *x, dtype=dtype), normal(rng, *w)
    x_array, w_array = x_array.at[..., -1, :].set(0), w_array.at[..., 0, :].set(0)
    y = jax.jit(lambda x, w: einsum(spec, x, quantize(w, (w.ndim - 1,))))(x_array, w_array)
    assert y.dtype == dtype
    (x_codes, x_scale), (w_codes, w_scale) = rounded(np.asarray(x_array, np.float32)), rounded(np.asarray(w_array))
    scales = np.einsum(spec, np.broadcast_to(x_scale, x), np.broadcast_to(w_scale, w)) / x[-1]  # one for each sum
    assert_close(y, np.einsum(spec, f64(x_codes), f64(w_codes)) * scales, OP if dtype == jnp.float32 else 1, dtype)


def test_rows_that_are_quantized_already_give_the_same(rng):
    x, w = normal(rng, 3, 70), quantize(normal(rng, 30, 70), (1,))
    before = einsum("td,fd->tf", quantize(x, (1,)), w, jnp.float32)
    assert np.array_equal(before, einsum("td,fd->tf", x, w))


def test_a_row_gives_the_same_alone_and_among_others(rng):
    x, w = normal(rng, 40, 70), quantize(normal(rng, 30, 70), (1,))
    together = einsum("td,fd->tf", x, w)
    for rows in (1, 2, 20):
        assert np.array_equal(einsum("td,fd->tf", x[:rows], w), together[:rows])


def by_blocks(values: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes `[…, count, size]` and scales `[…, count]`, by the rule written out in NumPy, in float32."""
    blocks = values.astype(np.float32).reshape(*values.shape[:-1], count, -1)
    most = np.abs(blocks).max(axis=-1)
    inverse = np.divide(np.float32(127), most, out=np.zeros_like(most), where=most > 0)
    return np.round(blocks * inverse[..., None]).astype(np.int64), most * np.float32(1 / 127)


def summed_by_blocks(spec: str, x, x_scale, w, w_scale) -> np.ndarray:
    """Sums of blocks in int64, scaled and added in float32, the first block first."""
    total = np.zeros((), np.float32)
    for i in range(w.shape[-2]):
        sums = np.einsum(spec, x[..., i, :], w[..., i, :]).astype(np.float32)
        of_x = np.einsum(spec, x_scale[..., i, None], np.ones_like(w_scale[..., :1]))
        of_w = np.einsum(spec, np.ones_like(x_scale[..., :1]), w_scale[..., i, None])
        total = total + sums * of_x * of_w
    return total


BLOCKED = [  # as SPECS, of widths that have blocks
    ("td,fd->tf", (1, 48), (30, 48)),
    ("td,fd->tf", (40, 48), (30, 48)),
    ("td,hrd->thr", (3, 48), (2, 5, 48)),
    ("td,efd->etf", (9, 48), (4, 30, 48)),
    ("etf,edf->etd", (4, 1, 48), (4, 70, 48)),
]


@pytest.mark.parametrize(("spec", "x", "w"), BLOCKED)
@pytest.mark.parametrize("count", [2, 6])
@pytest.mark.parametrize("kind", ["random", "extreme", "zero"])
def test_blocks_are_summed_in_integers_then_scaled_and_added_in_their_order(rng, spec, x, w, count, kind):
    x_array, w_array = (np.asarray(CODES[kind](rng, shape), np.float32) for shape in (x, w))
    w_array[..., 0, :] = 0
    y = jax.jit(lambda x, w: einsum(spec, x, quantize_blocks(w, count)))(x_array, w_array)
    expected = summed_by_blocks(spec, *by_blocks(x_array, count), *by_blocks(w_array, count))
    np.testing.assert_array_equal(y, expected)


def test_rows_with_one_scale_are_multiplied_by_weights_with_several(rng):
    """What an exchange may send."""
    x, w = normal(rng, 3, 48), quantize_blocks(normal(rng, 30, 48), 6)
    x_codes, x_scale = quantize(x, (1,))
    y = einsum("td,fd->tf", QArray(x_codes, x_scale), w, jnp.float32)
    repeated = np.repeat(x_scale, 6, axis=1)
    blocks = np.asarray(x_codes, np.int64).reshape(3, 6, 8), repeated, np.asarray(w.codes, np.int64).reshape(30, 6, 8)
    np.testing.assert_array_equal(y, summed_by_blocks("td,fd->tf", *blocks, np.asarray(w.scale)))
    rounded = quantized_like(w, x)
    assert rounded.scale.shape == (3, 6)
    np.testing.assert_array_equal(einsum("td,fd->tf", rounded, w, jnp.float32), einsum("td,fd->tf", x, w))


def test_a_row_of_blocks_gives_the_same_alone_and_among_others(rng):
    x, w = normal(rng, 40, 96), quantize_blocks(normal(rng, 30, 96), 6)
    together = einsum("td,fd->tf", x, w)
    for rows in (1, 2, 20, 33):
        assert np.array_equal(einsum("td,fd->tf", x[:rows], w), together[:rows])


@pytest.mark.parametrize("scale", [(7, 1, 1), (7, 6, 1), (7, 3, 1), (7, 6, 2)])
def test_heads_are_merged_by_weights_whose_blocks_are_heads_or_parts_or_several_of_them(rng, scale):
    codes, o_thv = rng.integers(-127, 128, (7, 6, 4)).astype(np.int8), np.asarray(normal(rng, 5, 6, 4))
    w_o = QArray(jnp.asarray(codes), jnp.asarray(rng.random(scale), jnp.float32))
    count = scale[1] * scale[2]
    flat = np.asarray(codes, np.int64).reshape(7, count, -1), np.asarray(w_o.scale).reshape(7, -1)
    expected = summed_by_blocks("td,fd->tf", *by_blocks(o_thv.reshape(5, -1), count), *flat)
    np.testing.assert_array_equal(merge_heads(jnp.asarray(o_thv), w_o), expected)
