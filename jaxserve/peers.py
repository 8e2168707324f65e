"""Other engines that pages come from, each over a link of its own: one that stalls delays nobody else's."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from jaxserve.arrivals import Brought
from jaxserve.layout import PageLayout
from jaxserve.parallel.errors import TransferError
from jaxserve.parallel.transfer import Receiver
from jaxserve.request import Handover

ATTEMPTS = 3
"""Times that another engine is asked for the same pages."""
AGAIN = "damaged", "dead", "refused"
"""What may be otherwise when it is asked again: a link that has ended is made anew once, and its other end lets go."""
SLOWEST = 1 << 20
"""Bytes a second of a link that is not given up as long as it moves."""
PROBED = 2.0
"""Seconds in which the other end of a link answers before it is asked for pages."""
LOOK = 0.02
"""Seconds before it is asked again."""

Address = tuple[str, int]


class Peers(NamedTuple):
    """How an engine exchanges pages with others."""

    token: bytes  # all know it
    name: str  # of this engine
    host: str = "127.0.0.1"  # where others reach this engine
    limit: int = 1 << 30  # bytes on offer
    seconds: float = 60.0  # that an offer stands
    patience: float = 10.0  # seconds that a link may stand still; a pull has more, by its bytes
    implementation: Any = None  # of the links, see `parallel.carriers`


class Pulls:
    """What comes from other engines. One thread asks; any may close it."""

    def __init__(self, layout: PageLayout, page_size: int, how: Peers):
        self.how, self._layout, self._page_size = how, layout, page_size
        self._peers: dict[Address, Peer] = {}

    def pull(self, handover: Handover) -> "Future[Brought]":
        """The pages of another engine, or a TransferError if they can't be had any more."""
        for address in [address for address, peer in self._peers.items() if peer.ended]:
            self._peers.pop(address).close()
        address = handover.host, handover.port
        if address not in self._peers:
            self._peers[address] = Peer(address, self.how)
        pages = -(-handover.tokens // self._page_size)
        return self._peers[address].pull(handover, self._layout.like(pages), pages * self._layout.page_bytes)

    def close(self) -> None:
        """Ends all links; what is asked for doesn't come."""
        for peer in list(self._peers.values()):
            peer.close()


class Peer:
    """Another engine, which gives one thing after another."""

    def __init__(self, address: Address, how: Peers):
        self._address, self._how = address, how
        self._pool = ThreadPoolExecutor(1, "pull")
        self._asked: list[Future[Brought]] = []  # what may not have come yet
        self._link: Receiver | None = None
        self._failed: tuple[float, TransferError] | None = None  # when no link could be made, and why
        self._closed = False

    @property
    def ended(self) -> bool:
        """Whether nothing is left of it but a thread."""
        return all(each.done() for each in self._asked) and (self._link is None or self._link.failure is not None)

    def pull(self, handover: Handover, like: Any, nbytes: int) -> "Future[Brought]":
        """So many bytes of pages, which are `like` that."""
        seconds = self._how.patience + nbytes / SLOWEST
        wanted = self._pool.submit(self._pull, handover, like, seconds, time.monotonic())
        self._asked = [*(each for each in self._asked if not each.done()), wanted]
        return wanted

    def close(self) -> None:
        self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._link:
            self._link.close()

    # In its thread.

    def _pull(self, handover: Handover, like: Any, seconds: float, asked: float) -> Brought:
        if self._failed and self._failed[0] > asked:
            raise TransferError(str(self._failed[1]), self._failed[1].kind)
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return Brought(0, handover.tokens, self._linked().pull(handover.name, like, seconds).result())
            except TransferError as error:
                if attempt == ATTEMPTS or error.kind not in AGAIN or self._closed or not self._link:
                    raise
                time.sleep(LOOK)
        raise AssertionError

    def _linked(self) -> Receiver:
        """The only link to it, whose sender closes the first if there is a second.

        Where none can be made, that is not tried again for what was asked for before: each would wait as long.
        """
        if self._link and not self._link.failure:
            if self._link.probe(PROBED) != "dead":
                return self._link
            self._link.close()
        self._link = None
        if self._closed:
            raise TransferError("the engine has been closed", "dead")
        how = {"patience": self._how.patience, "implementation": self._how.implementation}
        try:
            self._link = Receiver(self._address, self._how.token, self._how.name, **how)
        except TransferError as error:
            self._failed = time.monotonic(), TransferError(str(error), error.kind)
            raise
        if self._closed:  # while it was made
            self._link.close()
        return self._link
