"""Products with weights: `einsum` for activations and a matrix; `each_by_own`, `matvec` for one of many matrices.

A weight that is a `QArray` is multiplied in integers: activations are quantized too, with a scale a row, the sums of
int8 x int8 are exact in int32, and only then come both scales. So a row's result has the same bits whatever other rows
there are, and on any number of devices: no rule of placement splits an axis that is summed along. That holds too if
rows of the weight have scales for blocks of inputs: then so have those of activations, and the scaled sums of blocks
are added in float32, always in the same order. A product in floats promises neither: XLA adds in an order that depends
on the shapes.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.layers.dims import Leaf
from jaxserve.layers.rows import dot_rows, pays
from jaxserve.parallel.qarray import QArray, quantize, quantize_blocks

FEW_ROWS = 32
"""Up to so many rows, XLA on CPU is faster if the weight is the left factor: it packs the right one each time."""

ONE_BY_ONE = 3
"""Up to so many rows of INT8 are faster computed one by one (see `rows`) than packed."""

LARGE = 4096
"""With more rows, a matrix of INT8 is faster as the right factor, however few rows the left one has."""


def einsum(spec: str, x: Leaf, w: Leaf, dtype: Any = None) -> jax.Array:
    """`jnp.einsum` of activations and a weight, in the activations' dtype. `t` is the letter of rows.

    Activations may be quantized already, for a weight that is too; the result's `dtype` must be given then.
    """
    factors, out = spec.split("->")
    left, right = factors.split(",")
    if x.ndim == 2 and out[1:] + left[1] == right and w.ndim > 2:  # a matrix; XLA copies it for a single row otherwise
        flat = jax.tree.map(lambda part: part.reshape(-1, part.shape[-1]), w)
        return einsum("td,ud->tu", x, flat, dtype).reshape(x.shape[0], *w.shape[:-1])
    if not isinstance(w, QArray):
        return product(spec, x, w)
    dtype = dtype or x.dtype
    if (blocks := w.scale.shape[-1]) > 1:
        return _sum_blocks(spec, x if isinstance(x, QArray) else quantize_blocks(x, blocks), w, blocks).astype(dtype)
    x = x if isinstance(x, QArray) else quantize(x, tuple(left.index(letter) for letter in left if letter not in out))
    return _scaled(spec, x, w).astype(dtype)


def _scaled(spec: str, x: QArray, w: QArray) -> jax.Array:
    """Exact sums, times both scales: float32."""
    factors, out = spec.split("->")
    left, right = factors.split(",")
    sums = product(spec, x.codes, w.codes)
    return sums.astype(jnp.float32) * _along(x.scale, left, out) * _along(w.scale, right, out)


def _sum_blocks(spec: str, x: QArray, w: QArray, count: int) -> jax.Array:
    """The products of blocks of inputs, the last axis of both factors, added one after another.

    Each is added when the next is computed: multiplied and added at once, it would be rounded once on some machines,
    in some shapes.
    """
    size = w.shape[-1] // count

    def block(q: QArray, i: Any) -> QArray:
        scale = q.scale if q.scale.shape[-1] == 1 else jax.lax.dynamic_slice_in_dim(q.scale, i, 1, -1)
        return QArray(jax.lax.dynamic_slice_in_dim(q.codes, i * size, size, -1), scale)

    def step(i: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        total, term = carry
        return total + term, _scaled(spec, block(x, i), block(w, i))

    nothing = jnp.zeros(jax.eval_shape(lambda: _scaled(spec, block(x, 0), block(w, 0))).shape)
    total, last = jax.lax.fori_loop(0, count, step, (nothing, nothing))
    return total + last


def product(spec: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """`einsum` of arrays in the order that is fast; of int8, the exact sums, int32."""
    factors, out = spec.split("->")
    left, right = factors.split(",")
    if x.dtype == jnp.int8 and x.ndim == w.ndim == 2 and left[-1] == right[-1]:
        if len(x) <= ONE_BY_ONE and pays(x.shape[1]):
            return dot_rows(x, w)
        if len(x) > 1 and len(w) > LARGE:
            return _einsum(spec, x, w)
    if left[0] != "t":
        few = x.shape[left.index("t")] <= FEW_ROWS if "t" in left else False
        return _in_order(f"{right},{left}->{out.replace('t', '')}t", out, w, x) if few else _einsum(spec, x, w)
    found = _ordered(left, right, out, two_rows(x), w)
    return jax.lax.slice_in_dim(found, 0, x.shape[0], axis=out.index("t"))


def quantized_like(w: Leaf, x: jax.Array) -> Leaf:
    """Rows as products with this weight need them: for several, they are quantized once."""
    return quantize_blocks(x, w.scale.shape[-1]) if isinstance(w, QArray) else x


def each_by_own(x: QArray, w: QArray, which_i: jax.Array, dtype: Any) -> jax.Array:
    """Rows `[i, d]`, each times its own of the matrices `[e, f, d]`, which `multiplies_rows` must allow: `[i, f]`."""
    sums = dot_rows(x.codes, w.codes, which_i).astype(jnp.float32)
    return (sums * x.scale * w.scale[which_i, :, 0]).astype(dtype)


def multiplies_rows(w: Leaf) -> bool:
    """Whether `each_by_own` is for these matrices, here: INT8 with a scale a row, on CPU."""
    return isinstance(w, QArray) and w.scale.shape[-1] == 1 and pays(w.shape[-1])


def matvec(x: jax.Array, w: Leaf) -> jax.Array:
    """A vector `[d]` times a matrix `[f, d]` that is cut out of a larger array: `[f]`.

    XLA's CPU backend reads it where it lies, which takes half as long as to copy it for `einsum`, a fifth in 16 bits.
    """
    return jnp.dot(x, w.T, preferred_element_type=jnp.float32).astype(x.dtype)


def two_rows(x: Leaf) -> Leaf:
    """`x`, but a single row of 8 or 16 bits twice: XLA's CPU backend has a scalar loop for one, 20 times slower."""
    narrow = isinstance(x, QArray) or x.dtype.itemsize < 4
    return jax.tree.map(lambda part: jnp.concatenate([part, part]), x) if x.shape[0] == 1 and narrow else x


def _along(scale: jax.Array, letters: str, out: str) -> jax.Array:
    """Scales of a factor with the axes of the result; along those that are summed over there is only one."""
    kept = [letters.index(letter) for letter in out if letter in letters]
    summed = [axis for axis in range(len(letters)) if axis not in kept]
    ordered = scale.transpose(*kept, *summed).reshape([scale.shape[axis] for axis in kept])
    return jnp.expand_dims(ordered, [axis for axis, letter in enumerate(out) if letter not in letters])


def _einsum(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Of integers, with exact sums."""
    return jnp.einsum(spec, x, y, preferred_element_type=jnp.int32 if x.dtype == jnp.int8 else None)


def _ordered(left: str, right: str, out: str, x: jax.Array, w: Leaf) -> jax.Array:
    """With factors and dimensions in the order for which XLA's CPU backend has its fastest loop, by the rows there are.

    A product for each head needs the heads in front, unless there are few rows and the weight is summed over its last
    dimension: XLA would multiply numbers one by one.
    """
    heads = [letter for letter in right if letter in left and letter in out]
    if x.shape[0] == 1:
        return _einsum(f"{left},{right}->{out}", x, w)
    if x.shape[0] <= FEW_ROWS and right[-1] in left:
        return _in_order(f"{right},{left}->{out.replace('t', '')}t", out, w, x)
    if heads:
        front = "".join([*heads, "t"])
        inner, outer = (side.translate(str.maketrans("", "", front)) for side in (left, out))
        x = jnp.einsum(f"{left}->{front}{inner}", x)
        return _in_order(f"{front}{inner},{right}->{front}{outer}", out, x, w)
    return _einsum(f"{left},{right}->{out}", x, w)


def _in_order(spec: str, out: str, *factors: Leaf) -> jax.Array:
    """A product computed as it is written, then transposed to `out`; XLA would fold the transpose into the product."""
    return jnp.einsum(f"{spec.split('->')[1]}->{out}", jax.lax.optimization_barrier(_einsum(spec, *factors)))
