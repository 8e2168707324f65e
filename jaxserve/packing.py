"""From the plans of all ranks to the arrays of a step."""

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Items
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxserve.guidance import Guide
from jaxserve.packed_prefill import SharedPack
from jaxserve.parallel.sharding import Devices
from jaxserve.programs import Tiles
from jaxserve.scheduler import Chunk, Sequence
from jaxserve.slots import Masks
from jaxserve.steps import Pack

Guides = Mapping[Sequence, Guide]


class Spot(NamedTuple):
    """Where a chunk is in a step."""

    chunk: Chunk
    begin: int  # of its tokens
    row: int | None  # of its next token, if it completes its sequence
    past: int = 0  # where that of its sequence begins, in tiles


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
        columns = _padding(shape, self._nobody)
        for chunk, begin, row, _ in spots:
            s, end = chunk.sequence, begin + chunk.size
            _write_tokens(columns, chunk, begin)
            columns["slots_a"][begin // shape.width : -(-end // shape.width)] = s.slot
            if row is not None:
                columns["rows_a"][row], columns["last_a"][row] = s.slot, end - 1
        columns["reported"] = np.array(any(spot.chunk.sequence.whole for spot in spots))
        return Pack(**self._devices.same(columns)), self._masks(_completed(spots), shape.number, 0, guides)

    def shared_chunks(self, spots: Items[Spot], shape: Tiles, guides: Guides) -> tuple[SharedPack, Masks]:
        """Chunks of all ranks, one after another. A rank has rows for as many as it has slots, or there are tiles."""
        ranks, size, w = self._devices.count, self.rows_each(shape), shape.width
        known, own = _shared_padding(shape, size * ranks), _owned_padding(shape, size, ranks, self._nobody)
        for chunk, begin, row, past in spots:
            s, end, tile, before = chunk.sequence, begin + chunk.size, begin // w, chunk.start // w
            tiles = slice(tile, -(-end // w))
            _write_tokens(known, chunk, begin)
            known["first_a"][tiles], known["starts_a"][tiles], known["past_a"][tiles] = tile, chunk.start, past
            known["past_starts_p"][past : past + before] = w * np.arange(before)
            own["slots_a"][s.rank, tiles] = own["past_slots_p"][s.rank, past : past + before] = s.slot
            if row is not None:
                own["rows_s"][divmod(row, size)], known["last_s"][row] = s.slot, end - 1
        known["reported"] = np.array(any(spot.chunk.sequence.whole for spot in spots))
        split = self._devices.split({name: column.reshape(-1) for name, column in own.items()})
        return SharedPack(**self._devices.same(known), **split), self._masks(_completed(spots), size * ranks, 0, guides)

    def rows_each(self, shape: Tiles) -> int:
        """Rows of a rank in a prefill step."""
        return min(shape.number, self._nobody)

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


def spots(chunks_r: Items[Items[Chunk]], width: int, rows: int) -> Iterator[Spot]:
    """The chunks of the ranks, one after another in tiles of this width; each rank has so many rows."""
    begin = past = 0
    for rank, chunks in enumerate(chunks_r):
        row = rank * rows
        for chunk in chunks:
            yield Spot(chunk, begin, row if chunk.completes else None, past)
            begin += -(-chunk.size // width) * width
            past += chunk.start // width
            row += chunk.completes


def row_numbers(rows_r: Items[Items[Sequence]], size: int) -> dict[int, Sequence]:
    """The rows of each rank, `size` of which it has."""
    return {rank * size + place: s for rank, rows in enumerate(rows_r) for place, s in enumerate(rows)}


def _completed(spots: Items[Spot]) -> dict[int, Sequence]:
    """The sequences that have rows, by these."""
    return {spot.row: spot.chunk.sequence for spot in spots if spot.row is not None}


def _write_tokens(columns: dict[str, Any], chunk: Chunk, begin: int) -> None:
    """A chunk's tokens, those that follow them as far as they are known, and their positions."""
    tokens, end = chunk.sequence.tokens, begin + chunk.size
    following = tokens[chunk.start + 1 : chunk.end + 1]
    columns["tokens_t"][begin:end] = tokens[chunk.start : chunk.end]
    columns["next_t"][begin : begin + len(following)] = following
    columns["positions_t"][begin:end] = np.arange(chunk.start, chunk.end)


def _no_tokens(count: int) -> dict[str, Any]:
    return {
        "tokens_t": np.zeros(count, np.int32),
        "next_t": np.zeros(count, np.int32),
        "positions_t": np.full(count, -1, np.int32),
    }


def _padding(shape: Tiles, nobody: int) -> dict[str, Any]:
    """The columns of a `Pack` without chunks."""
    return _no_tokens(shape.tokens) | {
        "slots_a": np.zeros(shape.number, np.int32),
        "rows_a": np.full(shape.number, nobody, np.int32),
        "last_a": np.full(shape.number, shape.tokens, np.int32),
    }


def _shared_padding(shape: Tiles, rows: int) -> dict[str, Any]:
    """What all ranks know of a `SharedPack` without chunks."""
    return _no_tokens(shape.tokens) | {
        **{name: np.zeros(shape.number, np.int32) for name in ("first_a", "starts_a", "past_a")},
        "past_starts_p": np.zeros(shape.past, np.int32),
        "last_s": np.full(rows, shape.tokens, np.int32),
    }


def _owned_padding(shape: Tiles, rows: int, ranks: int, nobody: int) -> dict[str, Any]:
    """What is each rank's own of it."""
    sizes = {"slots_a": shape.number, "past_slots_p": shape.past, "rows_s": rows}
    return {name: np.full((ranks, size), nobody, np.int32) for name, size in sizes.items()}
