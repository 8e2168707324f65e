"""What lies ready for others to take: so many bytes at most, each for so long."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxserve.parallel.errors import TransferError


@dataclass
class Offer:
    """Arrays that wait to be taken."""

    arrays: Sequence[Any]  # of the host or of a device
    deadline: float  # of the clock
    nbytes: int  # in memory
    claimed: bool = False  # somebody takes it just now


class Offers:
    """Offers by name; threads may share them.

    They are held until they are taken, withdrawn or too old. One that is being taken is not thrown away meanwhile.
    """

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic):
        """`limit` is in bytes."""
        self.limit, self._clock = limit, clock
        self._lock, self._held = threading.Lock(), dict[str, Offer]()
        self.nbytes = self.expired = 0

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, name: str) -> bool:
        return name in self._held

    def add(self, name: str, arrays: Sequence[Any], seconds: float) -> bool:
        """Whether there is room; if not, nothing is kept.

        Raises TransferError, `refused`, if there never will be, or there is one of that name.
        """
        nbytes = sum(array.nbytes for array in arrays)
        if nbytes > self.limit:
            raise TransferError(f"{name} has {nbytes} bytes, all offers may have {self.limit}: raise that", "refused")
        self.expire()
        with self._lock:
            if name in self._held:
                raise TransferError(f"{name} is offered already", "refused")
            if self.nbytes + nbytes > self.limit:
                return False
            self._held[name] = Offer(arrays, self._clock() + seconds, nbytes)
            self.nbytes += nbytes
            return True

    def claim(self, name: str) -> Offer:
        """One that nobody else gets until it is put back. Raises TransferError: `gone`, `refused`."""
        self.expire()
        with self._lock:
            if name not in self._held:
                raise TransferError(f"{name} is not offered: it never was, was taken, or has become too old", "gone")
            offer = self._held[name]
            if offer.claimed:
                raise TransferError(f"{name} is being taken by another", "refused")
            offer.claimed = True
            return offer

    def put_back(self, name: str) -> None:
        """It was not taken after all."""
        with self._lock:
            if name in self._held:
                self._held[name].claimed = False

    def remove(self, name: str) -> None:
        """It was taken, or is not offered any more; fine if it isn't there."""
        with self._lock:
            self._drop(name)

    def expire(self) -> None:
        """Throws away what is too old."""
        now = self._clock()
        with self._lock:
            old = [name for name, offer in self._held.items() if offer.deadline < now and not offer.claimed]
            for name in old:
                self._drop(name)
            self.expired += len(old)

    def clear(self) -> None:
        """Throws all away."""
        with self._lock:
            for name in list(self._held):
                self._drop(name)

    def _drop(self, name: str) -> None:
        offer = self._held.pop(name, None)
        self.nbytes -= offer.nbytes if offer else 0
