"""Rotary position embedding (RoFormer, arXiv:2104.09864) with YaRN (arXiv:2309.00071) for long contexts."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxserve.layers.config import Rope, Yarn
from jaxserve.layers.dims import AnyArray


def frequencies(rope: Rope) -> np.ndarray:
    """Radians per position of each pair of dimensions, float64[dim / 2]."""
    plain = rope.theta ** (-np.arange(0, rope.dim, 2) / rope.dim)
    if rope.yarn is None:
        return plain
    kept = 1.0 - _ramp(rope, rope.yarn)
    return plain / rope.yarn.factor * (1.0 - kept) + plain * kept


def _ramp(rope: Rope, yarn: Yarn) -> np.ndarray:
    """0 where a pair turns more than `beta_fast` times in the trained context, 1 below `beta_slow` (section 3.2)."""

    def dimension(turns: float) -> float:
        return rope.dim * math.log(yarn.original_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(yarn.beta_fast), dimension(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    width = high - low if high != low else 0.001  # as the published code does, against division by zero
    return np.clip((np.arange(rope.dim // 2) - low) / width, 0, 1)


def rotate(x: Float[Array, "t h r"], positions_t: Int[AnyArray, " t"], rope: Rope) -> Float[Array, "t h r"]:
    """Turns each pair of dimensions of `x` by its position times its frequency. Angles are float32."""
    angles = positions_t[:, None, None].astype(jnp.float32) * jnp.asarray(frequencies(rope), jnp.float32)[None, None]
    magnitude = rope.yarn.magnitude if rope.yarn else 1.0
    cos, sin = jnp.cos(angles) * magnitude, jnp.sin(angles) * magnitude
    turn = _rotate_interleaved if rope.interleaved else _rotate_halves
    return turn(x.astype(jnp.float32), cos, sin).astype(x.dtype)


def _rotate_interleaved(x, cos, sin):
    even, odd = x[..., 0::2], x[..., 1::2]
    return jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1).reshape(x.shape)


def _rotate_halves(x, cos, sin):
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
