"""Pages that other engines may take: room for them is reserved before their prompt is computed."""

import itertools
import threading
from typing import Any

from jaxserve.parallel.errors import TransferError
from jaxserve.parallel.transfer import Sender
from jaxserve.peers import Peers
from jaxserve.request import Handover


class Exports:
    """Of one engine. Threads may share it, and none waits in it."""

    def __init__(self, peers: Peers):
        """Raises OSError if it can't listen for those who take them."""
        how = {"host": peers.host, "patience": peers.patience, "implementation": peers.implementation}
        self.sender, self._seconds = Sender(peers.token, peers.limit, **how), peers.seconds
        self._lock, self._serial = threading.Lock(), itertools.count()
        self._reserved: dict[str, int] = {}  # bytes, by the request: 0 as long as there is no room
        self._offered: dict[str, str] = {}  # what requests have on offer, or had a while ago

    @property
    def count(self) -> int:
        """Offers that nobody has taken yet, and those to come."""
        return len(self.sender.offers) + len(self._reserved)

    def expect(self, request_id: str) -> None:
        """Others want the pages of a request, until it is forgotten."""
        with self._lock:
            self._reserved[request_id] = 0

    def reserve(self, request_id: str, nbytes: int) -> bool:
        """Whether there is room for the pages of a request. Raises TransferError, `refused`, if there never is."""
        offers = self.sender.offers
        if nbytes > offers.limit:
            raise TransferError(f"the prompt's pages have {nbytes} bytes; {offers.limit} may be on offer", "refused")
        offers.expire()
        with self._lock:
            if request_id not in self._reserved:  # nobody wants them any more
                return True
            room = sum(self._reserved.values()) + offers.nbytes + nbytes <= offers.limit
            if room:
                self._reserved[request_id] = nbytes
            return room

    def offer(self, request_id: str, pages: Any, tokens: int) -> Handover:
        """Puts the pages of a request, with so many tokens, on offer if they are still wanted; says where they are."""
        name = f"{request_id}/{next(self._serial)}"
        with self._lock:  # so that nobody takes the room between the two
            wanted = self._reserved.pop(request_id, None) is not None
            if wanted and not self.sender.offer(name, pages, seconds=self._seconds):
                raise TransferError("there is no room for its pages", "refused")
            if wanted:
                held = self.sender.offers
                self._offered = {id: its for id, its in self._offered.items() if its in held} | {request_id: name}
        return Handover(*self.sender.address, name, tokens)

    def release(self, request_id: str) -> None:
        """A request will offer nothing; what it has on offer stays."""
        with self._lock:
            self._reserved.pop(request_id, None)

    def forget(self, request_id: str) -> None:
        """Nobody wants the pages of a request any more."""
        with self._lock:
            self._reserved.pop(request_id, None)
            if name := self._offered.pop(request_id, None):
                self.sender.withdraw(name)

    def withdraw(self) -> None:
        """Nobody will take what is on offer now."""
        with self._lock:
            self._offered.clear()
            self.sender.offers.clear()

    def close(self) -> None:
        self.sender.close()
