"""Text that comes in pieces, cut at the marks in it."""

import re
from collections.abc import Collection
from functools import lru_cache
from typing import NamedTuple


class Cut(NamedTuple):
    """Text up to the first mark, that mark, and what is after it.

    Without a mark in it (it is "" then), `rest` is the end of the text that may be the beginning of one.
    """

    before: str
    mark: str
    rest: str


class Marks:
    """A set of marks, of which none is part of another."""

    def __init__(self, marks: Collection[str]):
        self._pattern = re.compile("|".join(map(re.escape, marks)))
        self._beginnings = frozenset(mark[:n] for mark in marks for n in range(1, len(mark)))
        self._longest = max(map(len, self._beginnings), default=0)

    def cut(self, text: str) -> Cut:
        found = self._pattern.search(text)
        if found:
            return Cut(text[: found.start()], found[0], text[found.end() :])
        lengths = range(min(self._longest, len(text)), 0, -1)
        at = len(text) - next((n for n in lengths if text[-n:] in self._beginnings), 0)
        return Cut(text[:at], "", text[at:])


@lru_cache(maxsize=64)
def marks_of(marks: frozenset[str]) -> Marks:
    """Made once: a tokenizer may have a thousand special tokens."""
    return Marks(marks)
