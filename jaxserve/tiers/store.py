"""The context cache: memory before disk before a store of many instances, as one."""

import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from jaxserve.parallel.errors import RequestError
from jaxserve.tiers.counters import TierCounters
from jaxserve.tiers.disk import DiskTier
from jaxserve.tiers.keys import Key
from jaxserve.tiers.limits import Limits, check_bytes
from jaxserve.tiers.memory import MemoryTier
from jaxserve.tiers.prefetch import Prefetch
from jaxserve.tiers.tier import Tier, Value, as_value
from jaxserve.tiers.writing import Writer

READERS = 4


@dataclass(frozen=True, kw_only=True)
class StoreConfig:
    """Which tiers there are, and what each may hold.

    memory        of this process
    folder        pages on disk, for the next process and others on this machine; None: no such tier
    disk          of the folder, whoever has written it
    url           of a Valkey or Redis server, or of a node of a cluster: redis://host:6379; None: no such tier
    shared        of each namespace there; its `total` is only the most that a namespace may have
    queue_bytes   that wait to be written, for each of the slower tiers; what comes then is dropped
    """

    memory: Limits = Limits(1 << 30)
    folder: Path | None = None
    disk: Limits = Limits(16 << 30)
    url: str | None = None
    shared: Limits = Limits(64 << 30)
    queue_bytes: int = 256 << 20

    def __post_init__(self):
        check_bytes("queue_bytes", self.queue_bytes)


def open_store(config: StoreConfig) -> "Store":
    """A store of the tiers that are configured; a RequestError if one can't be as configured."""
    slower: list[Tier] = []
    if config.folder is not None:
        slower.append(DiskTier(config.folder, config.disk))
    if config.url is not None:
        slower.append(_shared(config.url, config.shared))
    return Store(MemoryTier(config.memory), slower, config.queue_bytes)


class Store:
    """Values by namespace and key. Any thread may call; whatever happens to a tier, no call raises because of it.

    Namespaces isolate tenants: what one has put no other finds, be it the same.
    """

    def __init__(self, memory: MemoryTier, slower: Sequence[Tier] = (), queue_bytes: int = 256 << 20):
        """`slower` tiers from the fastest to the slowest. All belong to the store now, which closes them."""
        self._memory = memory
        self._writers = [Writer(tier, queue_bytes) for tier in slower]
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="tiers-reader")
        self._drops: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._closed = False

    def get(self, namespace: str, key: Key) -> Value | None:
        """What was put, from the fastest tier that has it; faster ones then have it too. Waits for disk and server."""
        value = self._memory.get(namespace, key)
        drops = self._drops[namespace]
        passed: list[Writer] = []
        for writer in self._writers if value is None else ():
            value = writer.tier.get(namespace, key)
            if value is not None:
                self._keep(namespace, key, value, passed, drops)
                break
            passed.append(writer)
        return value

    def put(self, namespace: str, key: Key, data: bytes | bytearray | memoryview) -> None:
        """Keeps what must not change any more; returns at once: slower tiers are written by threads of their own."""
        self._keep(namespace, key, as_value(data), self._writers, self._drops[namespace])

    def prefetch(self, namespace: str, keys: Sequence[Key]) -> Prefetch:
        """Brings the values of the longest beginning of `keys` that is there; returns at once."""
        prefetch, keys = Prefetch(len(keys)), tuple(keys)
        for _ in keys[:READERS]:
            reading = self._readers.submit(self._bring, prefetch, namespace, keys)
            reading.add_done_callback(lambda done: prefetch.cancel() if done.cancelled() else None)
        return prefetch

    def drop(self, namespace: str) -> bool:
        """Removes all of a namespace, also what waits to be written; whether that could be done in all tiers."""
        with self._lock:
            self._drops[namespace] += 1
            self._memory.drop(namespace)
        return all([writer.drop(namespace) for writer in self._writers])

    def counters(self) -> dict[str, TierCounters]:
        """By tier, from the fastest to the slowest."""
        tiers: list[Tier] = [self._memory, *(writer.tier for writer in self._writers)]
        return {tier.name: tier.tally.read() for tier in tiers}

    def flush(self, timeout: float) -> bool:
        """Waits until all that was put is written; whether that came to be, within so many seconds for each tier."""
        return all([writer.flush(timeout) for writer in self._writers])

    def close(self, timeout: float = 10.0) -> None:
        """Writes what waits, for so many seconds at most for each tier. What is put later is dropped."""
        self._closed = True
        self._readers.shutdown(wait=False, cancel_futures=True)
        for writer in self._writers:
            writer.close(timeout)
        self._memory.close()

    def _keep(self, namespace: str, key: Key, value: Value, writers: Iterable[Writer], drops: int) -> None:
        """Nothing, if the namespace was dropped since the value was there."""
        with self._lock:
            if self._drops[namespace] != drops:
                return
            self._memory.put(namespace, key, value)
            for writer in writers:
                writer.put(namespace, key, value)

    def _bring(self, prefetch: Prefetch, namespace: str, keys: Sequence[Key]) -> None:
        while (index := prefetch.take()) is not None:
            value = None
            try:
                value = self.get(namespace, keys[index])
            finally:  # nobody may wait for it for ever
                prefetch.settle(index, value)
            if self._closed:
                prefetch.cancel()


def _shared(url: str, limits: Limits) -> Tier:
    try:
        from jaxserve.tiers.shared import SharedTier
    except ImportError:
        raise RequestError(
            "a shared store needs the package redis, which is not installed: pip install 'jaxserve[store]'"
        ) from None
    return SharedTier(url, limits)
