"""Exact products of single rows of INT8 with matrices, in loops that XLA's CPU backend vectorizes.

It has no such loop for what it knows as a product: of one row it computes number by number, and for a few it packs the
whole matrix anew. But a sum of few terms it unrolls, and what is left is a loop over lanes. So the products of a row's
lanes are added up first, then the lanes. A matrix is read where it lies, one of many too, at the speed of memory.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Int8

LANES = 16
"""int32 numbers of the widest vector."""

UNROLLED, ADDENDS, TERMS = 32, 4, 96
"""What XLA makes one loop of: sums of so many terms, so many of them, and so many terms in all."""


def pays(width: int) -> bool:
    """Whether rows of this width have such a loop, on this platform."""
    return width % LANES == 0 and jax.default_backend() == "cpu"


def dot_rows(
    x_id: Int8[Array, "i d"], w: Int8[Array, "*e f d"], experts_i: Int[Array, " i"] | None = None
) -> Int[Array, "i f"]:
    """The sums of each row times its matrix, int32: the only one, or that of its expert.

    Rows of the same expert should stand together: the second finds the matrix in a cache. The width must be a multiple
    of LANES.
    """
    addends, terms = _split(x_id.shape[1] // LANES)
    x, w = jax.lax.optimization_barrier((x_id.astype(jnp.int32), w))  # or XLA would widen all of w before a loop
    x, w = (q.reshape(*q.shape[:-1], -1, addends, terms, LANES) for q in (x, w))
    w = w[None] if experts_i is None else w.at[experts_i].get(mode="promise_in_bounds")
    sums = sum((w[..., j, :, :].astype(jnp.int32) * x[:, None, :, j]).sum(axis=-2) for j in range(addends))
    return jax.lax.optimization_barrier(sums).sum(axis=(-2, -1))


def _split(count: int) -> tuple[int, int]:
    """How many sums, and of how many terms each, have the most of the `count` terms of a lane."""
    shapes = [(a, n) for a in range(1, ADDENDS + 1) for n in range(1, UNROLLED + 1) if a * n <= TERMS]
    return max((shape for shape in shapes if count % (shape[0] * shape[1]) == 0), key=lambda shape: shape[0] * shape[1])
