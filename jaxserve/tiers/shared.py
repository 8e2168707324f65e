"""Pages in a Valkey or Redis server, or a cluster of them, for many instances."""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

from redis import Redis, RedisCluster
from redis.backoff import NoBackoff
from redis.connection import parse_url
from redis.exceptions import ResponseError
from redis.retry import Retry

from jaxserve.parallel.errors import RequestError
from jaxserve.tiers import scripts
from jaxserve.tiers.counters import Tally
from jaxserve.tiers.keys import Key, digest_of
from jaxserve.tiers.limits import Limits
from jaxserve.tiers.records import HEADER, header, unpack
from jaxserve.tiers.scripts import Part
from jaxserve.tiers.tier import Value

log = logging.getLogger("jaxserve.tiers")

T = TypeVar("T")

CONNECTIONS = 8
"""Operations on their way at once."""
QUIET = 60.0
"""Seconds in which what fails is logged once."""


class SharedTier:
    """No operation takes longer than `deadline` seconds; after one that fails, none is tried for `pause` seconds.

    A namespace is in so many `parts`, each of which has an equal share of its capacity and lies on one node of a
    cluster; all who use the server must say the same number. What nobody uses for `lifetime` seconds goes. There is no
    capacity of all namespaces: that is the server's own (`maxmemory`, with a policy that evicts).
    """

    name = "shared"

    def __init__(
        self,
        url: str,
        limits: Limits,
        *,
        parts: int = 16,
        deadline: float = 1.0,
        pause: float = 1.0,
        lifetime: float = 7 * 24 * 3600.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Connects when it is first used. A RequestError if that is no URL, or no number of parts."""
        _check(url, parts)
        self.tally = Tally()
        self._url = url
        self._client: Any = Redis.from_url(url, **_options(deadline))  # which doesn't connect yet
        self._knows_cluster = False
        self._limits, self._parts = limits, parts
        self._deadline, self._pause, self._lifetime, self._clock = deadline, pause, int(lifetime * 1000), clock
        self._lock = threading.Lock()
        self._down_until = self._quiet_until = -float("inf")
        self._threads = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="shared-tier")

    def get(self, namespace: str, key: Key) -> Value | None:
        part, name = self._part(namespace, key), key.hex().encode()
        with self.tally.seconds("read_seconds"):
            record = self._ask(lambda client: scripts.GET(client, part, name, self._lifetime))
            value = None if record is None else unpack(namespace, key, record)
        if record is not None and value is None:
            self.tally.add(damaged=1)
            self._ask(lambda client: scripts.REMOVE(client, part, name))
        self.tally.found(None if value is None else len(value))
        return value

    def put(self, namespace: str, key: Key, value: Value) -> None:
        part, name = self._part(namespace, key), key.hex().encode()
        limit = self._limits.of(namespace) // self._parts
        if HEADER.size + len(value) > limit or self._is_down():
            self.tally.add(dropped=1)
            return
        with self.tally.seconds("write_seconds"):
            if self._ask(lambda client: scripts.USE(client, part, name, self._lifetime)) != 0:
                return  # it is there, or nobody answers
            record = b"".join((header(namespace, key, value), value))
            evicted = self._ask(lambda client: scripts.PUT(client, part, name, self._lifetime, record, limit))
        if evicted is not None:
            self.tally.add(written_bytes=len(value), evicted=evicted)

    def drop(self, namespace: str) -> bool:
        parts = [_part(namespace, number) for number in range(self._parts)]
        return all([self._ask(lambda client, part=part: scripts.DROP(client, part)) for part in parts])

    def close(self) -> None:
        self._down_until = float("inf")
        self._disconnect()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _part(self, namespace: str, key: Key) -> Part:
        return _part(namespace, int.from_bytes(digest_of(key)[:4], "little") % self._parts)

    def _ask(self, operation: Callable[[Any], T]) -> T | None:
        """What the server answers; None if it refuses, can't be reached or takes too long, or has lately."""
        if self._is_down():
            return None
        try:
            asked = self._threads.submit(lambda: operation(self._connected()))
            try:
                return asked.result(self._deadline)
            finally:
                asked.cancel()  # if it has not begun
        except Exception as error:  # of whatever kind: it comes from what a server has said, or has not
            self._fail(error)
            return None

    def _is_down(self) -> bool:
        return self._clock() < self._down_until

    def _connected(self) -> Any:
        """The client; the first time, it asks the server whether it belongs to a cluster."""
        with self._lock:
            if not self._knows_cluster:
                info: Any = self._client.info("cluster")
                if info["cluster_enabled"]:
                    self._client.close()
                    options = _options(self._deadline)
                    self._client = RedisCluster.from_url(self._url, require_full_coverage=False, **options)
                self._knows_cluster = True
            return self._client

    def _fail(self, error: Exception) -> None:
        self.tally.add(failed=1)
        if self._clock() >= self._quiet_until:
            log.warning("the shared store does not do what it is asked: %s", str(error)[:200] or type(error).__name__)
            self._quiet_until = self._clock() + QUIET
        if not isinstance(error, ResponseError):  # which says that it is there, and refuses this
            self._down_until = max(self._down_until, self._clock() + self._pause)
            self._disconnect()

    def _disconnect(self) -> None:
        """Ends all operations that are on their way; the client connects again when it is asked again."""
        client = self._client
        with suppress(Exception):  # it may be in whatever state
            if isinstance(client, RedisCluster):
                client.disconnect_connection_pools()
            else:
                client.connection_pool.disconnect()


def _options(deadline: float) -> dict[str, Any]:
    """Of a client. It tries a second time, for a connection that was idle may have been closed."""
    return {"socket_timeout": deadline, "socket_connect_timeout": deadline, "retry": Retry(NoBackoff(), 1)}


def _check(url: str, parts: int) -> None:
    if not isinstance(parts, int) or isinstance(parts, bool) or parts < 1:
        raise RequestError(f"parts = {parts!r}: it must be a whole number, 1 or more")
    try:
        parse_url(url)
    except ValueError:
        raise RequestError(  # without the URL, which may have a password in it
            "the URL of a shared store must be redis://[[user]:password@]host[:port], or so with rediss:// for TLS"
        ) from None


def _part(namespace: str, number: int) -> Part:
    return Part(b"jaxserve:{%s:%d}:" % (digest_of(namespace.encode())[:16].hex().encode(), number))
