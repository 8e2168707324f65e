"""Held-out modules as a reader of Python sees them: words with their places, and the text before a place."""

import ast
import hashlib
import io
import tokenize
from bisect import bisect_left
from collections.abc import Hashable, Iterable, Iterator, Sequence
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple

from jaxserve.checkpoints.embedded import corpus

CONTEXT = 600  # characters before a place that a task shows


class Word(NamedTuple):
    """A token of Python. Places are in characters from the module's beginning."""

    kind: int  # as in the module `token`
    text: str
    start: int
    end: int
    opens: bool  # a logical line, after whatever comments


class Source(NamedTuple):
    """A module and its words, without comments and line ends."""

    name: str
    text: str
    words: tuple[Word, ...]

    def neighbours(self) -> Iterator[tuple[Word, Word, Word]]:
        """Each word, with the one before it and the one after it."""
        return zip(self.words, self.words[1:], self.words[2:], strict=False)

    def seen(self, some: Sequence[Word], place: int) -> Sequence[Word]:
        """Those of some words, in order, that the context of a place has."""
        start = lambda word: word.start  # noqa: E731
        first, end = (bisect_left(some, at, key=start) for at in (context_start(self.text, place), place))
        return some[first:end]

    def tree(self) -> ast.Module:
        return ast.parse(self.text)


@cache
def held_out() -> tuple[Source, ...]:
    """The held-out modules of the running interpreter's library, by name."""
    return tuple(Source(m.name, m.text, tuple(words(m.text))) for m in corpus.split(corpus.modules())[1])


def words(text: str) -> Iterator[Word]:
    """The words of a module."""
    starts, opens = line_starts(text), True
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        (row, column), (last, until) = token.start, token.end
        if token.type == tokenize.NEWLINE:
            opens = True
        elif token.string.strip() and token.type != tokenize.COMMENT:
            yield Word(token.type, token.string, starts[row - 1] + column, starts[last - 1] + until, opens)
            opens = False


def line_starts(text: str) -> list[int]:
    """Where each line begins, and at last where the text ends."""
    return list(accumulate(map(len, io.StringIO(text)), initial=0))


def context_start(text: str, place: int, size: int = CONTEXT) -> int:
    """Where the context of a place begins: with a line, at most `size` characters before it."""
    return 0 if place <= size else text.find("\n", place - size - 1, place) + 1 or place


def line_end(text: str, place: int) -> int:
    """Where the line ends that a place is in."""
    end = text.find("\n", place)
    return len(text) if end < 0 else end


def digest(*parts: Any) -> str:
    """A number in place of chance: the same in every process, for every version of Python."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()


def in_turns(found: Iterable[Any], kind: Any) -> list[Any]:
    """One of each kind, in the order given, then a second of each, and so on."""
    seen: dict[Hashable, int] = {}

    def turn(one: Any) -> int:
        seen[kind(one)] = seen.get(kind(one), 0) + 1
        return seen[kind(one)]

    return sorted(found, key=turn)
