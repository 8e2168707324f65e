"""Integers with a scale."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class QArray(NamedTuple):
    """`codes * scale`. Both have equal rank, so one tuple of axes places both; a scale is for a block of codes.

    The size of a block along an axis is `codes.shape // scale.shape`.
    """

    codes: Any  # int8
    scale: Any  # float32


def quantize_rows(x_td: Float[Array, "t d"]) -> QArray:
    """Rows as INT8 with a scale each, symmetric: the largest value is 127 (arXiv:2506.12708, section 4.5).

    A row of zeros has the scale 0.
    """
    x_td = x_td.astype(jnp.float32)
    most_t1 = jnp.abs(x_td).max(axis=1, keepdims=True)
    inverse_t1 = jnp.where(most_t1 > 0, 127 / jnp.where(most_t1 > 0, most_t1, 1), 0)
    return QArray(jnp.round(x_td * inverse_t1).astype(jnp.int8), most_t1 * (1 / 127))  # XLA may divide so itself


def dequantize(x: QArray, dtype: Any) -> jax.Array:
    """The values of rows with a scale each."""
    return (x.codes.astype(jnp.float32) * x.scale).astype(dtype)
