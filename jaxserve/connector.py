"""The way between an engine's pages and those elsewhere: in the store behind them, or of another engine.

Whatever waits is in threads of its own: the engine asks for pages that a request begins with, gives away copies of
those that it has computed, and looks between two steps at what has come of it.
"""

import itertools
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxserve.arrivals import Arrival, Brought
from jaxserve.layout import PageLayout
from jaxserve.pages import Key
from jaxserve.parallel.errors import TransferError
from jaxserve.parallel.transfer import Receiver, Sender
from jaxserve.request import Handover, Output, Request
from jaxserve.tiers.keys import PageKind
from jaxserve.tiers.store import Store

log = logging.getLogger("jaxserve.connector")

FETCHES = 4
"""Requests whose pages are fetched from the store at once."""
PATIENCE = 2.0
"""Seconds after which a request begins with those pages of the store that have come."""
ATTEMPTS = 3
"""Times that another engine is asked for the same pages."""
AGAIN = "damaged", "dead", "refused"
"""What may be otherwise when it is asked again: a link that has ended is made anew, and its other end lets go."""
SLOWEST = 1 << 20
"""Bytes a second of a link that is not given up as long as it moves."""
CLOSING = 10.0
"""Seconds to write what still leaves when the engine is closed."""
LEAVING = 1 << 30
"""Bytes of pages that may wait to be copied off the device for the store; more aren't kept there."""
LOOK = 0.02
"""Seconds between two looks at whether offers have been taken, and before another engine is asked again."""


class Leaving(NamedTuple):
    """Pages of a request that leave the engine."""

    request: Request
    blocks: list[Any]  # copies on the device, trees of arrays `[n, b, …]` one after another; the last is padded
    pages: int  # in all
    keys: Sequence[Key]  # of those that the store is to have
    first: int  # of them, among the pages
    output: Output | None  # is said once others can have the pages
    tokens: int  # in all of them


class Peers(NamedTuple):
    """How an engine exchanges pages with others."""

    token: bytes  # all know it
    name: str  # of this engine
    host: str = "127.0.0.1"  # where others reach this engine
    limit: int = 1 << 30  # bytes on offer
    seconds: float = 60.0  # that an offer stands
    patience: float = 10.0  # seconds that a link may stand still; a pull has more, by its bytes
    implementation: Any = None  # of the links, see `parallel.carriers`


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
        self._page_size, self._kind, self._peers = page_size, kind, peers
        self._sender = _sender(peers) if peers and exports else None
        self._links: dict[tuple[str, int], Receiver] = {}
        self._lock = threading.Condition()
        self._exports: dict[str, int] = {}  # bytes that requests have reserved for their pages, on offer later
        self._promised: set[str] = set()  # requests of which it will say something, until the engine has that
        self._offers: dict[str, str] = {}  # what requests have on offer, or had a while ago
        self._said: deque[Output] = deque()
        self._happened = threading.Event()
        self._leaving: queue.SimpleQueue[Leaving | threading.Event | None] = queue.SimpleQueue()
        self._leaving_bytes, self._serial, self._closed = 0, itertools.count(), False
        self._fetches = ThreadPoolExecutor(FETCHES, "connector fetch")
        self._pullers: dict[tuple[str, int], ThreadPoolExecutor] = {}
        self._admissions = ThreadPoolExecutor(1, "connector admission")
        self._thread = threading.Thread(target=self._copy_out, name="connector", daemon=True)
        self._thread.start()

    @property
    def address(self) -> tuple[str, int] | None:
        """Where other engines find what is on offer here."""
        return self._sender.address if self._sender else None

    @property
    def offered(self) -> int:
        """Offers that nobody has taken yet, and those to come."""
        return (len(self._sender.offers) if self._sender else 0) + len(self._exports)

    @property
    def busy(self) -> bool:
        """Whether there is something that it will still say."""
        return bool(self._promised)

    def bring(self, request: Request, keys: Sequence[Key], found: int) -> Arrival | None:
        """The pages that a request can begin with, if there can be any; the first `found` of those with keys are here.

        They are asked for when the arrival is started; that of a request which is to export pages is, for it waits for
        room first, one after another.
        """
        if (handover := request.handover) is not None:
            return Arrival(lambda: self._watch(self._puller(handover).submit(self._pull, handover)))
        missing = list(keys[found:]) if self.store else []
        if request.export:
            self._exports[request.id] = 0
            arrival = Arrival(lambda: self._watch(self._admissions.submit(self._admit, request, missing, found)))
            arrival.start()
            return arrival
        if not missing:
            return None
        salt = request.cache_salt
        return Arrival(lambda: self._watch(self._fetches.submit(self._fetch, salt, missing, found)))

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
            self._exports.pop(request_id, None)
            self._promised.discard(request_id)
            self._said = deque(output for output in self._said if output.request_id != request_id)
            name = self._offers.pop(request_id, None)
            if self._sender and name:
                self._sender.withdraw(name)

    def withdraw(self) -> None:
        """Nobody will take what is on offer now."""
        with self._lock:
            self._offers.clear()
            if self._sender:
                self._sender.offers.clear()

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
        with self._lock:
            self._closed = True
            links = list(self._links.values())
            self._lock.notify_all()
        self._leaving.put(None)
        self._thread.join(CLOSING)
        for pool in (self._fetches, self._admissions, *self._pullers.values()):
            pool.shutdown(wait=False, cancel_futures=True)
        for end in (*links, self._sender, self.store):
            if end is not None:
                end.close()

    # In threads: what comes.

    def _watch(self, future: "Future[Brought | None]") -> "Future[Brought | None]":
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

    def _pull(self, handover: Handover) -> Brought:
        """The pages of another engine. Raises TransferError if they can't be had any more."""
        assert self._peers is not None
        like = self.layout.like(pages := self._pages(handover.tokens))
        seconds = self._peers.patience + pages * self.layout.page_bytes / SLOWEST
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return Brought(0, handover.tokens, self._link(handover).pull(handover.name, like, seconds).result())
            except TransferError as error:
                if attempt == ATTEMPTS or error.kind not in AGAIN or self._closed:
                    raise
                time.sleep(LOOK)
        raise AssertionError

    def _puller(self, handover: Handover) -> ThreadPoolExecutor:
        """Of each other engine: its link gives one after another, and one that stalls delays nobody else's."""
        address = handover.host, handover.port
        if address not in self._pullers:
            self._pullers[address] = ThreadPoolExecutor(1, "connector pull")
        return self._pullers[address]

    def _link(self, handover: Handover) -> Receiver:
        """The only one to another engine, whose sender closes the first if there is a second."""
        assert self._peers is not None
        address = handover.host, handover.port
        link = self._links.get(address)
        if link is None or link.failure:
            how = {"patience": self._peers.patience, "implementation": self._peers.implementation}
            self._links[address] = link = Receiver(address, self._peers.token, self._peers.name, **how)
        return link

    # In threads: what leaves.

    def _admit(self, request: Request, keys: list[Key], found: int) -> Brought | None:
        """Waits for room for what a request is to export, and then for what the store has of it."""
        assert self._sender is not None and self._peers is not None
        nbytes = self._pages(len(request.prompt_token_ids) + len(request.answered)) * self.layout.page_bytes
        limit, offers = self._peers.limit, self._sender.offers
        if nbytes > limit:
            raise TransferError(f"the prompt's pages have {nbytes} bytes; {limit} may be on offer", "refused")
        with self._lock:
            while request.id in self._exports and sum(self._exports.values()) + offers.nbytes + nbytes > limit:
                self._lock.wait(LOOK)
                offers.expire()
                if self._closed:
                    raise TransferError("the engine has been closed", "dead")
            if request.id in self._exports:
                self._exports[request.id] = nbytes
        return self._fetch(request.cache_salt, keys, found) if keys else None

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
        with self._lock:
            self._exports.pop(leaving.request.id, None)
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
        return leaving.output and self._offer(leaving, leaving.output, pages)

    def _offer(self, leaving: Leaving, output: Output, pages: Any) -> Output:
        assert self._sender is not None and self._peers is not None
        name = f"{leaving.request.id}/{next(self._serial)}"
        with self._lock:  # so that nobody takes the room between the two
            wanted = self._exports.pop(leaving.request.id, None) is not None
            if wanted and not self._sender.offer(name, pages, seconds=self._peers.seconds):
                raise TransferError("there is no room for its pages", "refused")
            if wanted:
                held = self._sender.offers
                self._offers = {id: its for id, its in self._offers.items() if its in held} | {leaving.request.id: name}
        return replace(output, handover=Handover(*self._sender.address, name, leaving.tokens))

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self._page_size)


def _joined(parts: Sequence[np.ndarray], count: int) -> np.ndarray:
    """The first so many rows of arrays one after another, and no memory besides."""
    rows = sum(map(len, parts)) - count
    return np.concatenate([*parts[:-1], parts[-1][: len(parts[-1]) - rows]])


def _sender(peers: Peers) -> Sender:
    return Sender(
        peers.token, peers.limit, host=peers.host, patience=peers.patience, implementation=peers.implementation
    )
