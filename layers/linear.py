"""Products with weights. Every product of an activation with a matrix of the model goes through `einsum`."""

import jax
import jax.numpy as jnp

from jaxserve.layers.dims import Leaf

FEW_ROWS = 32
"""Up to so many rows, XLA on CPU is faster if the weight is the left factor: it packs the right one each time."""


def einsum(spec: str, x: jax.Array, w: Leaf) -> jax.Array:
    """`jnp.einsum` of activations and a weight, in the activations' dtype. `t` is the letter of rows."""
    factors, out = spec.split("->")
    left, right = factors.split(",")
    if x.ndim != 2 or left[0] != "t":
        return jnp.einsum(spec, x, w)
    if out[1:] + left[1] == right and w.ndim > 2:  # a matrix; unless it is given as one, XLA copies it for a single row
        return einsum("td,ud->tu", x, w.reshape(-1, w.shape[-1])).reshape(x.shape[0], *w.shape[:-1])
    rows = two_rows(x)
    few = 1 < rows.shape[0] <= FEW_ROWS
    product = _weight_first(left, right, out, rows, w) if few else jnp.einsum(spec, rows, w)
    return jax.lax.slice_in_dim(product, 0, x.shape[0], axis=out.index("t"))


def two_rows(x: jax.Array) -> jax.Array:
    """`x`, but a single row of 16-bit values twice: XLA's CPU backend has a scalar loop for one, 20 times slower."""
    return jnp.concatenate([x, x]) if x.shape[0] == 1 and x.dtype.itemsize < 4 else x


def _weight_first(left: str, right: str, out: str, x: jax.Array, w: Leaf) -> jax.Array:
    turned = jnp.einsum(f"{right},{left}->{out.replace('t', '')}t", w, x)
    # Without the barrier XLA folds the transpose into the product, and turns it back.
    return jnp.moveaxis(jax.lax.optimization_barrier(turned), -1, out.index("t"))
