"""Puts that nobody waits for."""

import threading
import time
from collections import OrderedDict

from jaxserve.tiers.keys import Key
from jaxserve.tiers.tier import Tier, Value


class Writer:
    """A thread that puts into a tier what is queued for it: of `limit` bytes at most, what doesn't fit is dropped."""

    def __init__(self, tier: Tier, limit: int):
        self.tier = tier
        self._limit, self._size, self._open = limit, 0, True
        self._queue: OrderedDict[tuple[str, Key], Value] = OrderedDict()
        self._writing: str | None = None  # the namespace of the value that is being put
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=f"{tier.name}-writer", daemon=True)
        self._thread.start()

    def put(self, namespace: str, key: Key, value: Value) -> None:
        """Never waits for the tier. A value that is queued already is not queued again."""
        with self._changed:
            if (namespace, key) in self._queue:
                return
            if not self._open or self._size + len(value) > self._limit:
                self.tier.tally.add(dropped=1)
                return
            self._queue[namespace, key] = value
            self._size += len(value)
            self._changed.notify_all()

    def drop(self, namespace: str) -> bool:
        """Removes all of a namespace, from the queue too; whether that could be done."""
        with self._changed:
            for place in [place for place in self._queue if place[0] == namespace]:
                self._size -= len(self._queue.pop(place))
            self._changed.wait_for(lambda: self._writing != namespace)
        return self.tier.drop(namespace)

    def flush(self, timeout: float) -> bool:
        """Waits until all that is queued has been put; whether that came to be within so many seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._queue and self._writing is None, timeout)

    def close(self, timeout: float) -> None:
        """Puts what is queued, for so many seconds at most, and closes the tier; then all puts are dropped."""
        end = time.monotonic() + timeout
        with self._changed:
            self._open = False
            self._changed.notify_all()
        self._thread.join(max(0.0, end - time.monotonic()))
        self.tier.close()

    def _run(self) -> None:
        while (taken := self._take()) is not None:
            place, value = taken
            self.tier.put(*place, value)
            with self._changed:
                self._writing = None
                self._changed.notify_all()

    def _take(self) -> tuple[tuple[str, Key], Value] | None:
        """What has waited longest; None when there will be no more."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or not self._open)
            if not self._queue:
                return None
            place, value = self._queue.popitem(last=False)
            self._size -= len(value)
            self._writing = place[0]
            return place, value
