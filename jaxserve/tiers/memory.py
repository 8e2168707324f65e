"""Pages in the host's memory."""

import threading
from collections import Counter, OrderedDict, defaultdict

from jaxserve.tiers.counters import Tally
from jaxserve.tiers.keys import Key
from jaxserve.tiers.limits import Limits
from jaxserve.tiers.tier import Value


class MemoryTier:
    """Keeps the values themselves, without a copy."""

    name = "memory"

    def __init__(self, limits: Limits):
        self.tally = Tally()
        self._limits, self._lock = limits, threading.Lock()
        self._values: OrderedDict[tuple[str, Key], Value] = OrderedDict()  # the longest unused first
        self._namespaces: defaultdict[str, OrderedDict[Key, None]] = defaultdict(OrderedDict)  # as well
        self._used: Counter[str] = Counter()  # bytes by namespace

    def get(self, namespace: str, key: Key) -> Value | None:
        with self.tally.seconds("read_seconds"), self._lock:
            value = self._values.get((namespace, key))
            if value is not None:
                self._use(namespace, key)
        self.tally.found(None if value is None else len(value))
        return value

    def put(self, namespace: str, key: Key, value: Value) -> None:
        with self.tally.seconds("write_seconds"), self._lock:
            if (namespace, key) in self._values:
                self._use(namespace, key)
                return
            if len(value) > self._limits.of(namespace):
                self.tally.add(dropped=1)
                return
            self._values[namespace, key] = value
            self._namespaces[namespace][key] = None
            self._used[namespace] += len(value)
            self._make_room(namespace)
        self.tally.add(written_bytes=len(value))

    def drop(self, namespace: str) -> bool:
        with self._lock:
            for key in list(self._namespaces.get(namespace, ())):
                self._remove(namespace, key)
        return True

    def close(self) -> None:
        """Forgets all."""
        with self._lock:
            self._values.clear()
            self._namespaces.clear()
            self._used.clear()

    def _use(self, namespace: str, key: Key) -> None:
        self._values.move_to_end((namespace, key))
        self._namespaces[namespace].move_to_end(key)

    def _make_room(self, namespace: str) -> None:
        while self._used[namespace] > self._limits.of(namespace):
            self._evict(namespace, next(iter(self._namespaces[namespace])))
        while self._used.total() > self._limits.total:
            self._evict(*next(iter(self._values)))

    def _evict(self, namespace: str, key: Key) -> None:
        self._remove(namespace, key)
        self.tally.add(evicted=1)

    def _remove(self, namespace: str, key: Key) -> None:
        self._used[namespace] -= len(self._values.pop((namespace, key)))
        del self._namespaces[namespace][key]
        if not self._namespaces[namespace]:
            del self._namespaces[namespace], self._used[namespace]
