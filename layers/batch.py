"""The tokens of a step and the paged memory of the sequences they belong to."""

from itertools import pairwise
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxserve.layers.dims import AnyArray, Leaf
from jaxserve.parallel.qarray import QArray, quantize_rows

BLOCK_TOKENS = 256
"""Cached tokens attended to at once: what bounds attention's working memory, whatever the context's length."""

DECODE_BLOCK_TOKENS = 64
"""Of tiles of DECODE_TILE tokens or fewer, on CPU: there a block takes as long as it is large, however little is seen
of it. A device that waits for launches wants few large blocks."""
DECODE_TILE = 9  # a token and eight guesses


@runtime_checkable
class Positions(Protocol):
    """Tokens that know where they stand."""

    @property
    def positions_t(self) -> Any: ...


class Batch(NamedTuple):
    """The tokens of one step. Consecutive runs of `t / a` tokens, the tiles, belong to one sequence each.

    Decode has a tile of one token (or 1 + drafts) per sequence; prefill has long tiles, filled up with padding.
    """

    tokens_t: Int[AnyArray, " t"]
    positions_t: Int[AnyArray, " t"]  # place in its sequence; -1 for padding, which is computed and has no effect
    slots_a: Int[AnyArray, " a"]  # the tile's sequence: a row of `pages_sp`
    pages_sp: Int[AnyArray, "s p"]  # pages of each sequence, in order; entries past its last token are never read

    @property
    def tile(self) -> int:
        return self.tokens_t.shape[0] // self.slots_a.shape[0]


class Fresh(NamedTuple):
    """A cache as it was before a step, and what the step's tokens are still to leave there."""

    pages: Leaf  # p b …
    rows: Leaf  # t …


class Rows(NamedTuple):
    """Some tokens of a batch."""

    index_s: Int[Array, " s"]  # where they are in `tokens_t`; a number past the last is none
    slots_s: Int[Array, " s"]  # the sequence of each


def whole(tokens_st: Int[AnyArray, "s t"]) -> Batch:
    """Whole sequences of equal length, each a tile, and in a page of its own."""
    s, t = tokens_st.shape
    return Batch(tokens_st.reshape(-1), jnp.tile(jnp.arange(t), s), jnp.arange(s), jnp.arange(s)[:, None])


def pick(batch: Batch, rows: Rows) -> Batch:
    """Some tokens of a batch as one, a tile each."""
    positions_s = jnp.take(batch.positions_t, rows.index_s, mode="fill", fill_value=-1)
    return Batch(jnp.take(batch.tokens_t, rows.index_s, mode="clip"), positions_s, rows.slots_s, batch.pages_sp)


def divide(batch: Batch, count: int) -> tuple[Batch, ...]:
    """Its tiles in parts of about equal size, in order: as many parts as are asked for, or one for each tile."""
    tiles, w = batch.slots_a.shape[0], batch.tile
    count = min(count, tiles)
    if count == 1:
        return (batch,)

    def part(first: int, end: int) -> Batch:
        tokens = slice(first * w, end * w)
        return Batch(batch.tokens_t[tokens], batch.positions_t[tokens], batch.slots_a[first:end], batch.pages_sp)

    return tuple(part(*ends) for ends in pairwise(tiles * i // count for i in range(count + 1)))


def kept(rows: Leaf, pages: Leaf) -> Leaf:
    """Rows as the pages keep them, in their dtypes or as integers with a scale; what is so already does not change."""

    def one(page: Leaf, row: Leaf) -> Leaf:
        if isinstance(page, QArray):
            return row if isinstance(row, QArray) else quantize_rows(row)
        return row.astype(page.dtype)

    return jax.tree.map(one, pages, rows, is_leaf=lambda leaf: isinstance(leaf, QArray))


def write(pages: Leaf, rows: Leaf, batch: Batch) -> Leaf:
    """Stores one row per token where its position belongs, as the pages keep it: `pages[p, b, …]` and `rows[t, …]`."""
    b = jax.tree.leaves(pages)[0].shape[1]
    slots_t = jnp.repeat(batch.slots_a, batch.tile)
    page_t = batch.pages_sp[slots_t, jnp.maximum(batch.positions_t, 0) // b]
    nowhere = jax.tree.leaves(pages)[0].shape[0]
    page_t = jnp.where(batch.positions_t < 0, nowhere, page_t)
    store = lambda page, row: page.at[page_t, batch.positions_t % b].set(row, mode="drop")  # noqa: E731
    return jax.tree.map(store, pages, kept(rows, pages))


def once_read(pages: Leaf, states: Any) -> Leaf:
    """The pages, to be written when the states that were made from them are there: earlier, they would be copied."""
    return jax.lax.optimization_barrier((pages, states))[0]


def read_block(pages: Leaf, batch: Batch, i: Int[Array, ""] | int) -> tuple[Leaf, Array]:
    """The i-th block of each tile's sequence, `[a, j, …]` for pages `[p, b, …]`, and what of it is seen, `[a, w, j]`.

    A token sees what stands at its position or before it. What no token of a tile sees is 0: what another sequence left
    in a page may be NaN, and 0 times NaN would not be 0.
    """
    b = jax.tree.leaves(pages)[0].shape[1]
    per_block = pages_of_block(b, batch.tile)
    columns = i * per_block + jnp.arange(per_block)
    ids_ap = jnp.take(batch.pages_sp, columns, axis=1, mode="fill", fill_value=0)[batch.slots_a]
    positions_j = (columns[:, None] * b + jnp.arange(b)[None]).reshape(-1)
    positions_aw = batch.positions_t.reshape(-1, batch.tile)
    seen_awj = positions_j[None, None] <= positions_aw[:, :, None]
    used_aj = seen_awj.any(axis=1)

    def gather(page):
        block = page[ids_ap].reshape(*used_aj.shape, *page.shape[2:])
        return jnp.where(used_aj.reshape(*used_aj.shape, *(1,) * (block.ndim - 2)), block, 0)

    return jax.tree.map(gather, pages), seen_awj


def read_own(fresh: Fresh, batch: Batch) -> tuple[Leaf, Array]:
    """What each tile's tokens are to leave in the cache, `[a, w, …]`, as it keeps it; and who sees it, `[a, w, j]`.

    Like `read_block`, a token sees what stands at its position or before it, and 0 stands for what none sees.
    """
    positions_aw = jnp.reshape(batch.positions_t, (-1, batch.tile))
    real_aw = positions_aw >= 0
    seen_awj = real_aw[:, None] & (positions_aw[:, None] <= positions_aw[:, :, None])

    def own(rows):
        block = rows.reshape(*positions_aw.shape, *rows.shape[1:])
        return jnp.where(real_aw.reshape(*real_aw.shape, *(1,) * (block.ndim - 2)), block, 0)

    return jax.tree.map(own, kept(fresh.rows, fresh.pages)), seen_awj


def before(batch: Batch) -> Batch:
    """The batch as if all tokens stood just before their tile, whose padding comes last: they see what was there."""
    positions_aw = batch.positions_t.reshape(-1, batch.tile)
    before_aw = jnp.where(positions_aw >= 0, positions_aw[:, :1] - 1, -1)
    return batch._replace(positions_t=before_aw.reshape(-1))


def pages_of_block(page_size: int, tile: int) -> int:
    """How many pages are attended to at once."""
    short = tile <= DECODE_TILE and jax.default_backend() == "cpu"
    return max(1, (min(DECODE_BLOCK_TOKENS, BLOCK_TOKENS) if short else BLOCK_TOKENS) // page_size)


def num_blocks(pages: Leaf, batch: Batch) -> Int[Array, ""] | int:
    """How many blocks the longest sequence of the step fills; a Python number where one block holds any of them."""
    b = jax.tree.leaves(pages)[0].shape[1]
    block = pages_of_block(b, batch.tile) * b
    if batch.pages_sp.shape[1] * b <= block:
        return 1
    return jnp.max(batch.positions_t) // block + 1
