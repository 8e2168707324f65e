"""Products with weights: `einsum` for activations and a matrix, `matvec` for one token and one of many matrices."""

import jax
import jax.numpy as jnp

from jaxserve.layers.dims import Leaf

FEW_ROWS = 32
"""Up to so many rows, XLA on CPU is faster if the weight is the left factor: it packs the right one each time."""


def einsum(spec: str, x: jax.Array, w: Leaf) -> jax.Array:
    """`jnp.einsum` of activations and a weight, in the activations' dtype. `t` is the letter of rows."""
    factors, out = spec.split("->")
    left, right = factors.split(",")
    if left[0] != "t":
        return jnp.einsum(spec, x, w)
    if x.ndim == 2 and out[1:] + left[1] == right and w.ndim > 2:  # a matrix; XLA copies it for a single row otherwise
        return einsum("td,ud->tu", x, w.reshape(-1, w.shape[-1])).reshape(x.shape[0], *w.shape[:-1])
    rows = two_rows(x)
    return jax.lax.slice_in_dim(_product(left, right, out, rows, w), 0, x.shape[0], axis=out.index("t"))


def matvec(x: jax.Array, w: Leaf) -> jax.Array:
    """A vector `[d]` times a matrix `[f, d]` that is cut out of a larger array: `[f]`.

    XLA's CPU backend reads it where it lies, which takes half as long as to copy it for `einsum`, a fifth in 16 bits.
    """
    return jnp.dot(x, w.T, preferred_element_type=jnp.float32).astype(x.dtype)


def two_rows(x: jax.Array) -> jax.Array:
    """`x`, but a single row of 16-bit values twice: XLA's CPU backend has a scalar loop for one, 20 times slower."""
    return jnp.concatenate([x, x]) if x.shape[0] == 1 and x.dtype.itemsize < 4 else x


def _product(left: str, right: str, out: str, x: jax.Array, w: Leaf) -> jax.Array:
    """With factors and dimensions in the order for which XLA's CPU backend has its fastest loop, by the rows there are.

    A product for each head needs the heads in front, unless there are few rows and the weight is summed over its last
    dimension: XLA would multiply numbers one by one.
    """
    heads = [letter for letter in right if letter in left and letter in out]
    if x.shape[0] == 1:
        return jnp.einsum(f"{left},{right}->{out}", x, w)
    if x.shape[0] <= FEW_ROWS and right[-1] in left:
        return _in_order(f"{right},{left}->{out.replace('t', '')}t", out, w, x)
    if heads:
        front = "".join([*heads, "t"])
        inner, outer = (side.translate(str.maketrans("", "", front)) for side in (left, out))
        x = jnp.einsum(f"{left}->{front}{inner}", x)
        return _in_order(f"{front}{inner},{right}->{front}{outer}", out, x, w)
    return jnp.einsum(f"{left},{right}->{out}", x, w)


def _in_order(spec: str, out: str, *factors: Leaf) -> jax.Array:
    """A product computed as it is written, then transposed to `out`; XLA would fold the transpose into the product."""
    return jnp.einsum(f"{spec.split('->')[1]}->{out}", jax.lax.optimization_barrier(jnp.einsum(spec, *factors)))
