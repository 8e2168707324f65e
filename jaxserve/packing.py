"""From the plans of all ranks to the arrays of a step."""

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Items
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxserve.guidance import Guide
from jaxserve.parallel.sharding import Devices
from jaxserve.programs import Tiles
from jaxserve.scheduler import Chunk, Sequence
from jaxserve.slots import Masks
from jaxserve.steps import Pack

Guides = Mapping[Sequence, Guide]


class Spot(NamedTuple):
    """Where a chunk is in a step of all ranks."""

    chunk: Chunk
    begin: int  # of its tokens
    row: int | None  # of its next token, if it completes its sequence


class Packer:
    """Fills steps of given shapes, and sends them to the devices. What is as in the step before stays there."""

    def __init__(self, drafts: int, vocabulary: int, slots: int, devices: Devices | None = None):
        """`slots` are those of a rank."""
        self._drafts, self._words, self._nobody = drafts, -(-vocabulary // 32), slots
        self._devices = devices or Devices()
        self._free: dict[tuple[int, int, int], Masks] = {}  # masks that forbid nothing
        self._numbers: dict[int, jax.Array] = {}
        self._rows: tuple[np.ndarray, jax.Array] | None = None

    def chunks(self, spots: Items[Spot], shape: Tiles, guides: Guides) -> tuple[Pack, Masks]:
        """Each chunk begins a tile; those that complete their sequences have a row of their rank's."""
        columns = _padding(shape, self._nobody, self._devices.count)
        for chunk, begin, row in spots:
            s, end = chunk.sequence, begin + chunk.size
            columns["tokens_t"][begin:end] = s.tokens[chunk.start : chunk.end]
            following = s.tokens[chunk.start + 1 : chunk.end + 1]
            columns["next_t"][begin : begin + len(following)] = following
            columns["positions_t"][begin:end] = np.arange(chunk.start, chunk.end)
            columns["slots_a"][begin // shape.width : -(-end // shape.width)] = s.slot
            if row is not None:
                columns["rows_a"][row], columns["last_a"][row] = s.slot, (end - 1) % shape.tokens
        reported = self._devices.same(np.array(any(spot.chunk.sequence.whole for spot in spots)))
        rows = {spot.row: spot.chunk.sequence for spot in spots if spot.row is not None}
        masks = self._masks(rows, shape.number * self._devices.count, 0, guides)
        return Pack(**self._devices.split(columns), reported=reported), masks

    def rows(self, rows: Mapping[int, Sequence], size: int, guides: Guides) -> tuple[jax.Array, Masks]:
        """The slots of the sequences that go on, at their rows, `size` for each rank; the others are none."""
        slots_s: Any = np.full(size * self._devices.count, self._nobody, np.int32)
        for row, s in rows.items():
            slots_s[row] = s.slot
        if self._rows is None or not np.array_equal(self._rows[0], slots_s):
            self._rows = slots_s, self._devices.split(slots_s.copy())
        return self._rows[1], self._masks(rows, len(slots_s), self._drafts, guides)

    def number(self, value: int) -> jax.Array:
        if value not in self._numbers:
            self._numbers[value] = self._devices.same(np.int32(value))
        return self._numbers[value]

    def _masks(self, rows: Mapping[int, Sequence], size: int, guesses: int, guides: Guides) -> Masks:
        shape = (size, 1 + guesses, self._words)
        if not guides and shape in self._free:
            return self._free[shape]
        masked_s, bits_sw = np.zeros(size, bool), np.full(shape, 0xFFFFFFFF, np.uint32)
        for row, s in rows.items():
            if guide := guides.get(s):
                masked_s[row] = True
                bits_sw[row] = guide.bits(guide.guesses if guesses else [])
        masks = Masks(*self._devices.split((masked_s, bits_sw)))
        if not guides:
            self._free[shape] = masks
        return masks


def spots(chunks_r: Items[Items[Chunk]], shape: Tiles) -> Iterator[Spot]:
    """The chunks of each rank, one after another from the beginning of its part on."""
    for rank, chunks in enumerate(chunks_r):
        begin, row = rank * shape.tokens, rank * shape.number
        for chunk in chunks:
            yield Spot(chunk, begin, row if chunk.completes else None)
            begin += -(-chunk.size // shape.width) * shape.width
            row += chunk.completes


def row_numbers(rows_r: Items[Items[Sequence]], size: int) -> dict[int, Sequence]:
    """The rows of each rank, `size` of which it has."""
    return {rank * size + place: s for rank, rows in enumerate(rows_r) for place, s in enumerate(rows)}


def _padding(shape: Tiles, nobody: int, ranks: int) -> dict[str, Any]:
    """The columns of a `Pack` without chunks."""
    tokens, tiles = shape.tokens * ranks, shape.number * ranks
    return {
        "tokens_t": np.zeros(tokens, np.int32),
        "next_t": np.zeros(tokens, np.int32),
        "positions_t": np.full(tokens, -1, np.int32),
        "slots_a": np.zeros(tiles, np.int32),
        "rows_a": np.full(tiles, nobody, np.int32),
        "last_a": np.full(tiles, shape.tokens, np.int32),
    }
