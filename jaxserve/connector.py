"""The way between an engine's pages and those elsewhere: in the store behind them, or of another engine.

Whatever waits is in threads of its own: the engine asks for pages that a request begins with, gives away copies of
those that it has computed, and looks between two steps at what has come of it.
"""

import logging
import queue
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxserve.arrivals import Arrival, Brought
from jaxserve.exports import Exports
from jaxserve.layout import PageLayout
from jaxserve.pages import Key
from jaxserve.parallel.errors import TransferError
from jaxserve.peers import Peers, Pulls
from jaxserve.request import Output, Request
from jaxserve.tiers.keys import PageKind
from jaxserve.tiers.store import Store

log = logging.getLogger("jaxserve.connector")

FETCHES = 4
"""Requests whose pages are fetched from the store at once."""
PATIENCE = 2.0
"""Seconds after which a request begins with those pages of the store that have come."""
CLOSING = 10.0
"""Seconds to write what still leaves when the engine is closed."""
LEAVING = 1 << 30
"""Bytes of pages that may wait to be copied off the device for the store; more aren't kept there."""


class Leaving(NamedTuple):
    """Pages of a request that leave the engine."""

    request: Request
    blocks: list[Any]  # copies on the device, trees of arrays `[n, b, …]` one after another; the last is padded
    pages: int  # in all
    keys: Sequence[Key]  # of those that the store is to have
    first: int  # of them, among the pages
    output: Output | None  # is said once others can have the pages
    tokens: int  # in all of them


class Connector:
    """Belongs to one engine, whose thread calls all of its methods but `close`."""

    def __init__(
        self, layout: PageLayout, page_size: int, *, store: Store | None = None, kind: PageKind | None = None,
        peers: Peers | None = None, exports: bool = False,
    ):  # fmt: skip
        """A `store` needs the `kind` of its pages; `exports` says that `peers` take pages from here.

        Raises OSError if it can't listen for them.
        """
        self.layout, self.store, self.version = layout, store, kind and kind.version
        self.dropped = 0  # pages that did not get into the store
        self._page_size, self._kind = page_size, kind
        self._pulls = Pulls(layout, page_size, peers) if peers else None
        self._exports = Exports(peers) if peers and exports else None
        self._lock = threading.Lock()
        self._promised: set[str] = set()  # requests of which it will say something, until the engine has that
        self._said: deque[Output] = deque()
        self._happened = threading.Event()
        self._leaving: queue.SimpleQueue[Leaving | threading.Event | None] = queue.SimpleQueue()
        self._leaving_bytes = 0
        self._fetches = ThreadPoolExecutor(FETCHES, "connector fetch")
        self._thread = threading.Thread(target=self._copy_out, name="connector", daemon=True)
        self._thread.start()

    @property
    def address(self) -> tuple[str, int] | None:
        """Where other engines find what is on offer here."""
        return self._exports.sender.address if self._exports else None

    @property
    def takes(self) -> bool:
        """Whether it can have pages of other engines."""
        return self._pulls is not None

    @property
    def offered(self) -> int:
        """Offers that nobody has taken yet, and those to come."""
        return self._exports.count if self._exports else 0

    @property
    def busy(self) -> bool:
        """Whether there is something that it will still say."""
        return bool(self._promised)

    def bring(self, request: Request, keys: Sequence[Key], found: int) -> Arrival | None:
        """The pages that a request can begin with, if there can be any; the first `found` of those with keys are here.

        They are asked for when the arrival is started. That of a request which is to export pages can't be as long as
        there is no room for those.
        """
        if (handover := request.handover) is not None:
            assert self._pulls is not None
            pulls = self._pulls
            return Arrival(lambda: self._watch(pulls.pull(handover)))
        missing = list(keys[found:]) if self.store else []
        if request.export:
            assert self._exports is not None
            self._exports.expect(request.id)
            return Arrival(lambda: self._admit(request, missing, found))
        return Arrival(lambda: self._fetched(request, missing, found)) if missing else None

    def give(self, leaving: Leaving) -> None:
        """Takes copies of pages; if there is something to be said then, `said` has it later."""
        nbytes = leaving.pages * self.layout.page_bytes
        with self._lock:
            if leaving.output is None and self._leaving_bytes + nbytes > LEAVING:
                self.dropped += leaving.pages
                return
            self._leaving_bytes += nbytes
        if leaving.output is not None:
            self._promised.add(leaving.request.id)
        self._leaving.put(leaving)

    def holds(self, request_id: str) -> bool:
        """Whether what is to be said of a request comes from `said`."""
        return request_id in self._promised

    def forget(self, request_id: str) -> None:
        """Nobody wants anything of a request any more: it exports nothing, and what it has on offer is withdrawn."""
        with self._lock:
            self._promised.discard(request_id)
            self._said = deque(output for output in self._said if output.request_id != request_id)
        if self._exports:
            self._exports.forget(request_id)

    def withdraw(self) -> None:
        """Nobody will take what is on offer now."""
        if self._exports:
            self._exports.withdraw()

    def said(self) -> list[Output]:
        """What has come to be said since the last time."""
        self._happened.clear()
        with self._lock:
            said, self._said = list(self._said), deque()
            self._promised.difference_update(output.request_id for output in said)
        return said

    def wait(self, seconds: float) -> None:
        """Waits until something has come or can be said, so long at most."""
        self._happened.wait(seconds)

    def flush(self) -> None:
        """Waits until all pages that have left are in the store's queues."""
        done = threading.Event()
        self._leaving.put(done)
        done.wait()

    def close(self) -> None:
        """Ends links and threads, and closes the store."""
        self._leaving.put(None)
        self._thread.join(CLOSING)
        self._fetches.shutdown(wait=False, cancel_futures=True)
        for end in (self._pulls, self._exports, self.store):
            if end is not None:
                end.close()

    # What comes.

    def _admit(self, request: Request, missing: list[Key], found: int) -> "Future[Brought | None] | None":
        """Reserves room for what a request is to export, and asks for what the store has of it; None: there is none."""
        assert self._exports is not None
        pages = -(-(len(request.prompt_token_ids) + len(request.answered)) // self._page_size)
        try:
            room = self._exports.reserve(request.id, pages * self.layout.page_bytes)
        except TransferError as error:
            return _done(error)
        if not room:
            return None
        return self._fetched(request, missing, found) if missing else _done(None)

    def _fetched(self, request: Request, missing: list[Key], found: int) -> "Future[Brought | None]":
        return self._watch(self._fetches.submit(self._fetch, request.cache_salt, missing, found))

    def _watch(self, future: "Future[Any]") -> "Future[Any]":
        future.add_done_callback(lambda _: self._happened.set())
        return future

    def _fetch(self, namespace: str, keys: list[Key], first: int) -> Brought | None:
        """What the store has of some pages of which `first` others are before; if it fails, they are computed."""
        try:
            return self._find(namespace, keys, first)
        except Exception:
            log.exception("pages could not be fetched from the store")
            return None

    def _find(self, namespace: str, keys: list[Key], first: int) -> Brought | None:
        assert self.store is not None and self._kind is not None
        prefetch = self.store.prefetch(namespace, [self._kind.key(key) for key in keys])
        values = prefetch.wait(PATIENCE)
        prefetch.cancel()
        if not values:
            return None
        return Brought(first, (first + len(values)) * self._page_size, self.layout.unpack(values))

    # In a thread: what leaves.

    def _copy_out(self) -> None:
        while (leaving := self._leaving.get()) is not None:
            if isinstance(leaving, threading.Event):
                leaving.set()
                continue
            self._take(leaving)

    def _take(self, leaving: Leaving) -> None:
        try:
            said = self._copy(leaving)
        except Exception as error:  # whoever waits must be told, whatever it was
            log.exception("pages of a request could not be copied")
            text = f"the pages could not be copied: {error!r}"
            said = leaving.output and replace(leaving.output, finish_reason="error", error=text)
        if self._exports:
            self._exports.release(leaving.request.id)
        with self._lock:
            self._leaving_bytes -= leaving.pages * self.layout.page_bytes
            if said is not None and said.request_id in self._promised:
                self._said.append(said)
        self._happened.set()

    def _copy(self, leaving: Leaving) -> Output | None:
        """Takes pages off the device, to the store and on offer; what is to be said then."""
        blocks = [jax.device_get(block) for block in leaving.blocks]
        pages = jax.tree.map(lambda *parts: _joined(parts, leaving.pages), *blocks)
        if self.store is not None and self._kind is not None:
            for index, key in enumerate(leaving.keys, start=leaving.first):
                self.store.put(leaving.request.cache_salt, self._kind.key(key), self.layout.pack(pages, index))
        if leaving.output is None:
            return None
        assert self._exports is not None
        return replace(leaving.output, handover=self._exports.offer(leaving.request.id, pages, leaving.tokens))


def _joined(parts: Sequence[np.ndarray], count: int) -> np.ndarray:
    """The first so many rows of arrays one after another, and no memory besides."""
    rows = sum(map(len, parts)) - count
    return np.concatenate([*parts[:-1], parts[-1][: len(parts[-1]) - rows]])


def _done(error: TransferError | None) -> "Future[Brought | None]":
    """Of an arrival that brings nothing, or will not come."""
    future: Future[Brought | None] = Future()
    future.set_exception(error) if error else future.set_result(None)
    return future
