"""Products with weights. Every product of an activation with a matrix of the model goes through `einsum`."""

import jax
import jax.numpy as jnp

from jaxserve.layers.dims import Leaf


def einsum(spec: str, x: jax.Array, w: Leaf) -> jax.Array:
    """`jnp.einsum` of activations and a weight, in the activations' dtype; sums are kept in float32 where it matters.

    A 16-bit product with a single row of activations is computed with two: XLA's CPU backend has a scalar loop for one
    row that is 20 times slower than its matrix kernel.
    """
    if x.ndim == 2 and x.shape[0] == 1 and x.dtype.itemsize < 4:
        return jnp.einsum(spec, jnp.concatenate([x, x]), w)[:1]
    return jnp.einsum(spec, x, w)
