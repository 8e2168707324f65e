"""What a tier counts, in whichever thread it is used."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace


@dataclass
class TierCounters:
    """Sums since the tier was opened."""

    hits: int = 0
    misses: int = 0  # of all kinds: not there, damaged, the tier has failed
    read_bytes: int = 0  # of hits
    written_bytes: int = 0
    read_seconds: float = 0.0  # of hits and of misses
    write_seconds: float = 0.0
    evicted: int = 0  # entries that made room for others
    damaged: int = 0  # entries that were not what had been put, and were removed
    failed: int = 0  # operations that the disk or the server refused or did not answer
    dropped: int = 0  # puts that were not tried: larger than the capacity, too many before them, a server that is down


class Tally:
    """Counters that threads share."""

    def __init__(self):
        self._counters, self._lock = TierCounters(), threading.Lock()

    def add(self, **amounts: float) -> None:
        with self._lock:
            for name, amount in amounts.items():
                setattr(self._counters, name, getattr(self._counters, name) + amount)

    def found(self, nbytes: int | None) -> None:
        """A get: of so many bytes, or a miss."""
        if nbytes is None:
            self.add(misses=1)
        else:
            self.add(hits=1, read_bytes=nbytes)

    @contextmanager
    def seconds(self, name: str) -> Iterator[None]:
        """Adds the time that its body takes."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(**{name: time.perf_counter() - began})

    def read(self) -> TierCounters:
        """A copy of now."""
        with self._lock:
            return replace(self._counters)
