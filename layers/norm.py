"""Root mean square normalization (arXiv:1910.07467)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(x: Float[Array, "*t d"], gain: Float[Array, " d"], eps: float) -> Float[Array, "*t d"]:
    """`x / sqrt(mean(x²) + eps) * gain` over the last axis, in x's dtype.

    Squares, mean and quotient are float32; the quotient is rounded to x's dtype before the gain multiplies it in that
    dtype, as in Hugging Face's code.
    """
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * scale).astype(x.dtype) * gain.astype(x.dtype).reshape((1,) * (x.ndim - 1) + gain.shape)
