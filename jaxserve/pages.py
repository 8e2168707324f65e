"""Pages of the cache: who uses them, and which hold a beginning that another request shares. Plain Python, no JAX.

A page in use has a reference for each sequence that uses it. A full page can be published: it is then found by its
content, which is its own tokens after those of all pages before it, and shared. When the last reference goes, a
published page keeps its content, idle, until its room is needed; the one idle longest goes first.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

Key = bytes
ROOT: Key = b""
"""The key of what stands before the first page."""

Digest = Callable[[bytes], Key]


class Content(NamedTuple):
    """What a page holds. Two may share a key, which is a digest, so they are compared; but parents by key alone."""

    parent: Key
    tokens: tuple[int, ...]


def digest(data: bytes) -> Key:
    """The same for the same data in every process."""
    return hashlib.blake2b(data, digest_size=16).digest()


class PagePool:
    """Hands out `count` pages of `page_size` tokens each.

    `lookahead` is how many tokens after its last one the content of a page depends on: with an MTP module one, for its
    entry at a position is computed from the token that follows.
    """

    def __init__(self, count: int, page_size: int, lookahead: int = 0, digest: Digest = digest):
        self.count, self.page_size, self.lookahead = count, page_size, lookahead
        self._digest = digest
        self._references = [0] * count
        self._blank = list(reversed(range(count)))  # pages that hold nothing anyone could want
        self._idle: OrderedDict[int, None] = OrderedDict()  # published and unused, the longest so first
        self._contents: dict[int, Content] = {}
        self._published: dict[Key, int] = {}

    @property
    def available(self) -> int:
        """Pages that `allocate` can hand out."""
        return len(self._blank) + len(self._idle)

    @property
    def used(self) -> int:
        """Pages that some sequence uses."""
        return self.count - self.available

    def root(self, salt: str) -> Key:
        """The key of what stands before the first page of sequences that share with nobody who has another salt."""
        return self._digest(salt.encode()) if salt else ROOT

    def keys(self, tokens: Sequence[int], known: Sequence[Key] = (), root: Key = ROOT) -> list[Key]:
        """Keys of the pages that `tokens` fill, in order; `known` are the first of them, computed before."""
        keys = list(known)
        while self._end(len(keys)) <= len(tokens):
            keys.append(self._key(self._content(tokens, len(keys), keys[-1] if keys else root)))
        return keys

    def find(self, tokens: Sequence[int], keys: Sequence[Key], root: Key = ROOT) -> list[int]:
        """The longest run of published pages, from the first on, that hold `tokens`.

        Takes no reference: share them before the next `allocate`, which may evict them.
        """
        found: list[int] = []
        for index, key in enumerate(keys):
            page = self._published.get(key)
            parent = keys[index - 1] if index else root
            if page is None or self._contents[page] != self._content(tokens, index, parent):
                break
            found.append(page)
        return found

    def allocate(self, count: int) -> list[int] | None:
        """Pages with a reference each and content of no use, or None, and nothing is taken, if there are too few."""
        if count > self.available:
            return None
        pages = [self._blank.pop() if self._blank else self._evict() for _ in range(count)]
        for page in pages:
            self._references[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """One more reference to pages that `find` gave; a ValueError if they have been evicted or retracted since."""
        for page in pages:
            if page not in self._contents:
                raise ValueError(f"page {page} is shared and not published: share what find gives before allocating")
            self._references[page] += 1
            self._idle.pop(page, None)

    def release(self, pages: Sequence[int]) -> None:
        """One reference less to the pages of a sequence, in its order: those last in it are the first to be evicted.

        A ValueError if one is released more often than it was taken.
        """
        for page in reversed(pages):
            if not self._references[page]:
                raise ValueError(f"page {page} is released more often than it was taken")
            self._references[page] -= 1
            if self._references[page]:
                continue
            if page in self._contents:
                self._idle[page] = None
            else:
                self._blank.append(page)

    def publish(self, page: int, tokens: Sequence[int], index: int, keys: Sequence[Key], root: Key = ROOT) -> None:
        """Makes a page in use findable: the `index`-th of a sequence of `tokens`, whose pages' keys are `keys`.

        If another page has that key, it stays the one that is found. A ValueError if no sequence uses the page.
        """
        if not self._references[page]:
            raise ValueError(f"page {page} is published and not in use: publish before releasing")
        if page in self._contents or keys[index] in self._published:
            return
        self._contents[page] = self._content(tokens, index, keys[index - 1] if index else root)
        self._published[keys[index]] = page

    def retract(self, pages: Iterable[int]) -> None:
        """Makes pages unfindable, because what is in them turned out to be wrong."""
        for page in pages:
            if page not in self._contents:
                continue
            self._forget(page)
            if page in self._idle:
                del self._idle[page]
                self._blank.append(page)

    def clear(self) -> None:
        """Forgets all content that is not in use."""
        self.retract(list(self._idle))

    def _end(self, index: int) -> int:
        """How many tokens must be known for the content of the `index`-th page to be settled."""
        return (index + 1) * self.page_size + self.lookahead

    def _content(self, tokens: Sequence[int], index: int, parent: Key) -> Content:
        return Content(parent, tuple(tokens[index * self.page_size : self._end(index)]))

    def _key(self, content: Content) -> Key:
        return self._digest(content.parent + np.asarray(content.tokens, "<i4").tobytes())

    def _evict(self) -> int:
        page, _ = self._idle.popitem(last=False)
        self._forget(page)
        return page

    def _forget(self, page: int) -> None:
        del self._published[self._key(self._contents.pop(page))]
