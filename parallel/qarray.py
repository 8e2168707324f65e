"""Integers with a scale.

The rule, for weights and activations alike: symmetric, the largest magnitude is 127, rounded half to even; what is all
zeros has the scale 0. (Others divide by 127.5 or 128; codes made so are read as they are, with their scales.)
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

BOUND = 127


class QArray(NamedTuple):
    """`codes * scale`. Both have equal rank, so one tuple of axes places both; a scale is for a block of codes.

    The size of a block along an axis is `codes.shape // scale.shape`.
    """

    codes: Any  # int8
    scale: Any  # float32

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def ndim(self) -> int:
        return self.codes.ndim


def quantize(x: Float[Array, "..."], axes: tuple[int, ...], clip: Array | float | None = None) -> QArray:
    """Codes with one scale for all values along these axes; those above `clip` of the largest, a share, become that."""
    x = x.astype(jnp.float32)
    most = jnp.abs(x).max(axis=axes, keepdims=True)
    most = most if clip is None else most * clip
    inverse = jnp.where(most > 0, BOUND / jnp.where(most > 0, most, 1), 0)
    codes = jnp.round(x * inverse)
    codes = codes if clip is None else jnp.clip(codes, -BOUND, BOUND)
    return QArray(codes.astype(jnp.int8), most * (1 / BOUND))  # XLA may divide so itself


def quantize_blocks(x: Float[Array, "..."], count: int) -> QArray:
    """Codes with so many scales along the last axis, one for each block of equal size."""
    blocks = quantize(x.reshape(*x.shape[:-1], count, -1), (x.ndim,))
    return QArray(blocks.codes.reshape(x.shape), blocks.scale[..., 0])


def quantize_rows(x_td: Float[Array, "t d"]) -> QArray:
    """Rows as INT8 with a scale each (arXiv:2506.12708, section 4.5)."""
    return quantize(x_td, (1,))


def dequantize(x: QArray, dtype: Any) -> jax.Array:
    """The values."""
    scale = x.scale
    for axis, (size, count) in enumerate(zip(x.shape, scale.shape, strict=True)):
        scale = scale if count in (1, size) else jnp.repeat(scale, size // count, axis)
    return (x.codes.astype(jnp.float32) * scale).astype(dtype)
