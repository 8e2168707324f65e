"""How probable a model finds what may follow a context.

Items are packed into steps of one shape, tile by tile, as an engine packs its prompts: the choices of an item share its
context's part of the cache, so that a context is computed once.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from os.path import commonprefix
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxserve.checkpoints.evaluation.tasks import Item
from jaxserve.layers.batch import Batch
from jaxserve.layers.config import Config
from jaxserve.layers.dims import AnyArray
from jaxserve.layers.transformer import Model, cache_params, forward, logits
from jaxserve.parallel.errors import RequestError
from jaxserve.parallel.sharding import zeros

TILE = 16  # tokens of a tile, and of a page: tile i of a step is page i of its cache
TILES = 64  # of a step, if no item needs more
HEAD_ROWS = 128  # tokens whose scores of the whole vocabulary are there at once

Encode = Callable[[str], Sequence[int]]
"""From a text to its tokens, with the one that opens a text, if the model has it."""
Show = Callable[[int, int], None]
"""Told how many items are done, and how many there are."""


class Likelihood(NamedTuple):
    """What a model makes of a choice."""

    log2: float  # of its probability after the context
    tokens: int
    expected: int  # of them, those that were the most probable


class Encoded(NamedTuple):
    """An item in tokens."""

    rows: tuple[tuple[int, ...], ...]  # the context and a choice, for each choice
    first: int  # the first token of a row that counts for the choice

    @property
    def shared(self) -> int:
        """Full tiles at the rows' beginning that are the same for all, the last token before `first` not among them."""
        return (self.first - 1) // TILE

    @property
    def tiles(self) -> int:
        """In all: nothing follows a row's last token, so it isn't computed."""
        return self.shared + sum(-(-(len(row) - 1) // TILE) - self.shared for row in self.rows)


class Step(NamedTuple):
    """Many items' tokens, and what is asked of them."""

    batch: Batch
    next_t: Int[AnyArray, " t"]  # the token after each
    asked_t: Bool[AnyArray, " t"]  # whether its probability is wanted


class Answers(NamedTuple):
    """Of each token that was asked for."""

    log2_t: Float[Array, " t"]  # of the next token's probability
    expected_t: Bool[Array, " t"]  # whether that was the most probable


def encode_item(item: Item, encode: Encode) -> Encoded:
    """The tokens of context and choice are those of both as one text.

    What counts for a choice begins where its tokens differ from those of another, or of the context alone. If no token
    crosses from the context into a choice, that is where the choice begins; else it is the same text for all choices.
    A last token always counts, also of choices that the vocabulary can't tell apart.
    """
    rows = tuple(tuple(encode(item.context + choice)) for choice in item.choices)
    same = len(commonprefix([tuple(encode(item.context)), *rows]))
    return Encoded(rows, max(1, min([same, *(len(row) - 1 for row in rows)])))


def likelihoods(
    model: Model, cfg: Config, encode: Encode, items: Sequence[Item], show: Show = lambda done, total: None
) -> list[list[Likelihood]]:
    """What the model makes of each choice of each item, and `show` is told of the items that are done.

    Raises RequestError for an item with more tokens than the model has positions.
    """
    encoded, found = [encode_item(item, encode) for item in items], []
    longest = max((len(row) - 1 for item in encoded for row in item.rows), default=0)
    if longest > cfg.max_positions:
        raise RequestError(
            f"an item has {longest} tokens before its last one, the model has {cfg.max_positions} positions; "
            "leave out the tasks with long contexts"
        )
    tiles = max([TILES, *(item.tiles for item in encoded)])
    for part in _parts(encoded, tiles):
        step = pack(part, tiles, -(-longest // TILE))
        found += _read(step, part, answer(model, jax.tree.map(jnp.asarray, step), cfg))
        show(len(found), len(items))
    return found


def _parts(encoded: Sequence[Encoded], tiles: int) -> Iterator[list[Encoded]]:
    """Items in order, as many together as fit into a step."""
    part: list[Encoded] = []
    for item in encoded:
        if part and sum(one.tiles for one in part) + item.tiles > tiles:
            yield part
            part = []
        part.append(item)
    if part:
        yield part


def pack(part: Sequence[Encoded], tiles: int, pages: int) -> Step:
    """A step of so many tiles, for rows of up to so many pages; each row is a sequence with a slot of its own.

    Tiles that an item's rows share are the first row's; the others see them in their pages.
    """
    tokens, following = np.zeros((2, tiles, TILE), np.int32)
    positions, asked = np.full((tiles, TILE), -1, np.int32), np.zeros((tiles, TILE), bool)
    slots, pages_sp = np.zeros(tiles, np.int32), np.zeros((tiles, pages), np.int32)
    tile = slot = 0
    for item in part:
        first_slot = slot
        for row in item.rows:
            start = 0 if slot == first_slot else item.shared * TILE
            pages_sp[slot] = pages_sp[first_slot]
            for place in range(start, len(row) - 1, TILE):
                ids = row[place : place + TILE + 1]
                used = slice(len(ids) - 1)
                tokens[tile, used], following[tile, used] = ids[:-1], ids[1:]
                positions[tile, used] = place + np.arange(len(ids) - 1)
                slots[tile], pages_sp[slot, place // TILE] = slot, tile
                tile += 1
            slot += 1
        asked[slots >= first_slot] = (positions >= item.first - 1)[slots >= first_slot]
    return Step(
        Batch(tokens.reshape(-1), positions.reshape(-1), slots, pages_sp), following.reshape(-1), asked.reshape(-1)
    )


@partial(jax.jit, static_argnames="cfg")
def answer(model: Model, step: Step, cfg: Config) -> Answers:
    """Runs a step; the head reads only the tokens that are asked for, a few at a time."""
    t, tiles = step.next_t.shape[0], step.batch.slots_a.shape[0]
    out = forward(model, step.batch, zeros(cache_params(cfg, tiles, TILE, model.norm.dtype)), cfg)
    rows, order_t = min(HEAD_ROWS, t), jnp.argsort(~step.asked_t)

    def read(i: Array, found: Answers) -> Answers:
        index_t = jax.lax.dynamic_slice_in_dim(order_t, i * rows, rows)
        scores_tu, next_t = logits(model, out.hidden_td[index_t]), step.next_t[index_t]
        log_t = jnp.take_along_axis(jax.nn.log_softmax(scores_tu), next_t[:, None], axis=1)[:, 0]
        return Answers(
            found.log2_t.at[index_t].set(log_t / jnp.log(2.0)),
            found.expected_t.at[index_t].set(jnp.argmax(scores_tu, axis=-1) == next_t),
        )

    none = Answers(jnp.zeros(t), jnp.zeros(t, bool))
    return jax.lax.fori_loop(0, -(-step.asked_t.sum() // rows), read, none)


def _read(step: Step, part: Sequence[Encoded], got: Answers) -> list[list[Likelihood]]:
    """The sums of each row of a step's items."""
    slots = np.repeat(step.batch.slots_a, TILE)[step.asked_t]
    parts = np.asarray(got.log2_t, np.float64)[step.asked_t], None, np.asarray(got.expected_t)[step.asked_t]
    log2, tokens, expected = (np.bincount(slots, weights, len(step.batch.slots_a)) for weights in parts)
    rows = iter(zip(log2.tolist(), tokens.astype(int).tolist(), expected.astype(int).tolist(), strict=True))
    return [[Likelihood(*next(rows)) for _ in item.rows] for item in part]
