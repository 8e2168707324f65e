"""The few shapes in which the steps are compiled, before the first request."""

import math
import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax

from jaxserve.compilation import OPTIONS
from jaxserve.executables import Executables, Program

Progress = Callable[[int, int], None]
"""Called with the number of programs that are compiled, and of those there are."""


class Tiles(NamedTuple):
    """The shape of a prefill step: so many tiles of so many tokens each, and on a mesh so many of the past.

    It may consist of parts, microbatches: tiles and past are those of all, an equal share of each.
    """

    number: int
    width: int
    past: int = 0
    parts: int = 1

    @property
    def tokens(self) -> int:
        return self.number * self.width


class Shapes(NamedTuple):
    """The shapes that steps may have, the smallest first."""

    prefill: tuple[Tiles, ...]
    decode: tuple[int, ...]  # rows

    @classmethod
    def of(cls, tokens: int, slots: int) -> "Shapes":
        """For steps of at most so many prompt tokens and sequences.

        A step is up to 16 tiles, for chunks of many prompts, or one that is as long as all of them: attention of a
        single long chunk costs less so. Where all but the last token of a prompt is known, as when another engine has
        computed it, a tile is a token: it costs what a row does. Rows go up by fours.
        """
        width = -(-tokens // 16)
        most = tokens // width
        single = [Tiles(n, 1) for n in (1, 4) if n < width]
        packed = [Tiles(n, width) for n in (1, 2, 4) if n < most] + [Tiles(most, width)]
        long = [Tiles(1, tokens)] if tokens > width else []
        rows = [4**i for i in range(16) if 4**i < slots]
        return cls((*single, *packed, *long), (*rows, slots))

    @property
    def tile(self) -> int:
        """Tokens that a chunk of more than a few is filled up to a multiple of."""
        return max(self.prefill, key=lambda tiles: tiles.number).width

    @classmethod
    def over(cls, ranks: int, tokens: int, slots: int, longest: int, parts: int = 1) -> "Shapes":
        """For the ranks of a mesh: prompt tokens of all, in equal parts; sequences of each; tokens of the longest.

        The largest step may also have several parts, of each of which every rank computes as many tokens.
        """
        most = -(-16 // ranks) * ranks
        width = -(-tokens // most)
        numbers = [ranks * 4**i for i in range(16) if ranks * 4**i < most] + [most]
        pasts = 0, -(-longest // (width * parts)) * parts
        shapes = [Tiles(n, width, past) for n in numbers for past in pasts]
        if parts > 1:
            unit = math.lcm(ranks, parts * ranks // math.gcd(ranks, width))
            shapes += [Tiles(-(-most // unit) * unit, width, past, parts) for past in pasts]
        return cls(tuple(shapes), cls.of(tokens, slots).decode)

    def for_chunks(self, sizes: Iterable[int], past: int = 0) -> Tiles:
        """The smallest that holds chunks of these sizes, none of which shares a tile with another, and the past."""
        sizes = list(sizes)
        whole = (t for t in self.prefill if t.parts == 1 and past <= t.past)
        fits = (t for t in whole if sum(-(-size // t.width) for size in sizes) <= t.number)
        return min(fits, key=lambda t: (t.tokens, t.number, t.past))

    def in_parts(self, shape: Tiles) -> Tiles | None:
        """The shape of several parts that may serve instead of one that is whole: it is hardly larger."""
        largest = max(t.number for t in self.prefill if t.parts == 1)
        wanted = (t for t in self.prefill if t.parts > 1 and t.past == shape.past and shape.number == largest)
        return next(wanted, None)

    def for_rows(self, count: int) -> int:
        return next(rows for rows in self.decode if rows >= count)


class Programs:
    """Compiled programs by their shape; `call` says what is to be lowered for one, with this platform's options.

    Those that are kept as executables are loaded. What wasn't there beforehand is made when it is needed, and counted:
    its step waits for it.
    """

    def __init__(self, call: Callable[[Any], Any], executables: Executables | None = None):
        self._call, self._executables = call, executables or Executables()
        self._options = OPTIONS.get(jax.default_backend())
        self._compiled: dict[Any, Any] = {}
        self.late = 0

    def __len__(self) -> int:
        return len(self._compiled)

    def compile(self, shapes: Iterable[Any], progress: Progress | None = None) -> None:
        """Loads or compiles several at once: XLA works while the next is traced."""
        shapes = [shape for shape in shapes if shape not in self._compiled]
        progress = progress or (lambda done, total: None)
        futures: dict[Any, Future] = {}
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            programs = {shape: self._program(shape) for shape in shapes}
            loaded = {shape: threads.submit(program.load) for shape, program in programs.items()}
            for shape, future in loaded.items():
                progress(sum(future.done() for future in futures.values()), len(shapes))
                futures[shape] = future if future.result() else threads.submit(programs[shape].lower())
            for done, (shape, future) in enumerate(futures.items(), start=1):
                self._compiled[shape] = future.result()
                progress(done, len(shapes))

    def __getitem__(self, shape: Any) -> Any:
        if shape not in self._compiled:
            program = self._program(shape)
            self._compiled[shape] = program.load() or program.lower()()
            self.late += 1
        return self._compiled[shape]

    def _program(self, shape: Any) -> Program:
        return self._executables.program(self._call(shape), self._options)
