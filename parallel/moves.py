"""Weights from one rank to another, inside a `shard_map`."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxserve.parallel.ranks import Ranks, total

MOVES = 8
"""Slots that `move` writes at once: what bounds the memory it needs."""


def move(slots_x: Any, sources_k: Int[Array, " k"], targets_k: Int[Array, " k"], ranks: Ranks) -> Any:
    """Copies what some slots hold to others; all are read before any is written.

    `slots_x` is a tree of arrays whose first axis are the slots of this rank; sources and targets are numbered over all
    ranks. A target that is no slot is not written; one whose source is none gets zeros. Each copy reaches every rank:
    there is no cheaper collective for pairs that are known only at run time.
    """

    def one(array: Array) -> Array:
        count = array.shape[0]
        here = lambda numbers: numbers - ranks.rank * count  # noqa: E731
        mine_k = (here(sources_k) >= 0) & (here(sources_k) < count)
        held = jnp.take(array, here(sources_k), axis=0, mode="clip")
        held = jnp.where(mine_k.reshape(-1, *(1,) * (array.ndim - 1)), held, jnp.zeros_like(held))
        came = total(held, ranks)  # all but one are zero: exact
        return array.at[jnp.where(here(targets_k) >= 0, here(targets_k), count)].set(came, mode="drop")

    return jax.tree.map(one, slots_x)
