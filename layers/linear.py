"""Products with weights. Every product of an activation with a matrix of the model goes through `einsum`."""

import jax
import jax.numpy as jnp

from jaxserve.layers.dims import Leaf


def einsum(spec: str, x: jax.Array, w: Leaf) -> jax.Array:
    """`jnp.einsum` of activations and a weight, in the activations' dtype. `t` is the letter of rows."""
    if x.ndim == 2 and spec.startswith("t"):
        out = jnp.einsum(spec, two_rows(x), w)
        return jax.lax.slice_in_dim(out, 0, x.shape[0], axis=spec.split("->")[1].index("t"))
    return jnp.einsum(spec, x, w)


def two_rows(x: jax.Array) -> jax.Array:
    """`x`, but a single row of 16-bit values twice: XLA's CPU backend has a scalar loop for one, 20 times slower."""
    return jnp.concatenate([x, x]) if x.shape[0] == 1 and x.dtype.itemsize < 4 else x
