"""From a plan to the arrays of a step."""

from collections.abc import Mapping
from collections.abc import Sequence as Items
from typing import Any

import jax
import numpy as np

from jaxserve.guidance import Guide
from jaxserve.programs import Tiles
from jaxserve.scheduler import Chunk, Sequence
from jaxserve.slots import Masks
from jaxserve.steps import Pack

Guides = Mapping[Sequence, Guide]


class Packer:
    """Fills steps of given shapes, and sends them to the device. What is the same as in the step before stays there."""

    def __init__(self, drafts: int, vocabulary: int, slots: int):
        self._drafts, self._words, self._nobody = drafts, -(-vocabulary // 32), slots
        self._free: dict[tuple[int, int, int], Masks] = {}  # masks that forbid nothing
        self._numbers: dict[int, jax.Array] = {}
        self._rows: tuple[tuple[int, ...], jax.Array] | None = None

    def chunks(self, chunks: Items[Chunk], shape: Tiles, guides: Guides) -> tuple[Pack, Masks]:
        """Each chunk begins a tile; those that complete their sequences get a row, in their order."""
        columns = _padding(shape, self._nobody)
        complete = [chunk for chunk in chunks if chunk.completes]
        for chunk, start in zip(chunks, starts(chunks, shape), strict=True):
            s, end = chunk.sequence, start + chunk.size
            columns["tokens_t"][start:end] = s.tokens[chunk.start : chunk.end]
            following = s.tokens[chunk.start + 1 : chunk.end + 1]
            columns["next_t"][start : start + len(following)] = following
            columns["positions_t"][start:end] = np.arange(chunk.start, chunk.end)
            columns["slots_a"][start // shape.width : -(-end // shape.width)] = s.slot
            if chunk.completes:
                row = complete.index(chunk)
                columns["rows_a"][row], columns["last_a"][row] = s.slot, end - 1
        columns["reported"] = np.array(any(chunk.sequence.whole for chunk in chunks))
        masks = self._masks([chunk.sequence for chunk in complete], shape.number, 0, guides)
        return jax.device_put(Pack(**columns)), masks

    def rows(self, rows: Items[Sequence], size: int, guides: Guides) -> tuple[jax.Array, Masks]:
        """The slots of the sequences that go on, filled up with numbers of none."""
        slots = tuple(s.slot if s.slot is not None else self._nobody for s in rows)
        slots += (self._nobody,) * (size - len(slots))
        if self._rows is None or self._rows[0] != slots:
            self._rows = slots, jax.device_put(np.array(slots, np.int32))
        return self._rows[1], self._masks(rows, size, self._drafts, guides)

    def number(self, value: int) -> jax.Array:
        if value not in self._numbers:
            self._numbers[value] = jax.device_put(np.int32(value))
        return self._numbers[value]

    def _masks(self, rows: Items[Sequence], size: int, guesses: int, guides: Guides) -> Masks:
        shape = (size, 1 + guesses, self._words)
        if not guides and shape in self._free:
            return self._free[shape]
        masked_s, bits_sw = np.zeros(size, bool), np.full(shape, 0xFFFFFFFF, np.uint32)
        for row, s in enumerate(rows):
            if guide := guides.get(s):
                masked_s[row] = True
                bits_sw[row] = guide.bits(guide.guesses if guesses else [])
        masks = Masks(*jax.device_put((masked_s, bits_sw)))
        if not guides:
            self._free[shape] = masks
        return masks


def starts(chunks: Items[Chunk], shape: Tiles) -> list[int]:
    """Where in the step each chunk's tokens begin."""
    tiles = [-(-chunk.size // shape.width) for chunk in chunks]
    return [shape.width * sum(tiles[:i]) for i in range(len(tiles))]


def _padding(shape: Tiles, nobody: int) -> dict[str, Any]:
    """The columns of a `Pack` without chunks."""
    return {
        "tokens_t": np.zeros(shape.tokens, np.int32),
        "next_t": np.zeros(shape.tokens, np.int32),
        "positions_t": np.full(shape.tokens, -1, np.int32),
        "slots_a": np.zeros(shape.number, np.int32),
        "rows_a": np.full(shape.number, nobody, np.int32),
        "last_a": np.full(shape.number, shape.tokens, np.int32),
    }
