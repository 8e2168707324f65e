import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxserve.parallel.errors import RequestError
from jaxserve.tiers.counters import Tally
from jaxserve.tiers.limits import Limits
from jaxserve.tiers.memory import MemoryTier
from jaxserve.tiers.store import Store, StoreConfig, open_store
from jaxserve.tiers.tier import Value
from tests.jaxserve.tiers.conftest import value_of
from tests.waiting import SOON

KEYS = [bytes([n]) * 32 for n in range(8)]


class Slow:
    """A tier that waits where it is told to."""

    name = "slow"

    def __init__(self, *held: bytes):
        self.tally = Tally()
        self.held: dict[tuple[str, bytes], Value] = {("a", key): value_of("a", key) for key in held}
        self.asked: list[bytes] = []
        self.reads, self.writes = threading.Event(), threading.Event()
        self.entered = threading.Event()
        self.closed = False
        self.reads.set()
        self.writes.set()

    def get(self, namespace: str, key: bytes) -> Value | None:
        self.asked.append(key)
        value = self.held.get((namespace, key))
        self.entered.set()
        assert self.reads.wait(SOON)
        return value

    def put(self, namespace: str, key: bytes, value: Value) -> None:
        self.entered.set()
        assert self.writes.wait(SOON)
        self.held[namespace, key] = value

    def drop(self, namespace: str) -> bool:
        for place in [place for place in self.held if place[0] == namespace]:
            del self.held[place]
        return True

    def close(self) -> None:
        self.closed = True


@contextmanager
def store_of(*slower: Slow, queue_bytes: int = 1 << 20) -> Iterator[Store]:
    store = Store(MemoryTier(Limits(1 << 20)), slower, queue_bytes)
    try:
        yield store
    finally:
        for tier in slower:
            tier.writes.set()
        store.close(SOON)
        for tier in slower:
            tier.reads.set()


def put(store: Store, *keys: bytes, namespace: str = "a") -> None:
    for key in keys:
        store.put(namespace, key, value_of(namespace, key))


def held(tier: Slow) -> list[bytes]:
    return sorted(key for _, key in tier.held)


def test_all_tiers_get_what_is_put():
    first, second = Slow(), Slow()
    with store_of(first, second) as store:
        put(store, *KEYS)
        assert store.flush(SOON)
        assert held(first) == held(second) == KEYS
        assert [store.get("a", key) for key in KEYS] == [value_of("a", key) for key in KEYS]
        assert first.asked == second.asked == []


def test_what_a_slow_tier_has_the_faster_ones_get():
    first, second = Slow(), Slow(KEYS[0])
    with store_of(first, second) as store:
        assert store.get("a", KEYS[0]) == value_of("a", KEYS[0])
        assert store.flush(SOON) and held(first) == KEYS[:1]
        assert store.get("a", KEYS[0]) == value_of("a", KEYS[0])
        assert (first.asked, second.asked) == (KEYS[:1], KEYS[:1])
        assert store.get("a", KEYS[1]) is None and store.get("b", KEYS[0]) is None


def test_a_put_waits_for_nobody_and_what_can_not_be_queued_is_dropped_and_counted():
    slow = Slow()
    slow.writes.clear()
    with store_of(slow, queue_bytes=300) as store:
        put(store, KEYS[0])
        assert slow.entered.wait(SOON)
        put(store, *KEYS[1:])
        assert not store.flush(0.01)
        assert [store.get("a", key) for key in KEYS] == [value_of("a", key) for key in KEYS]
        assert slow.tally.read().dropped == 4
        slow.writes.set()
        assert store.flush(SOON) and held(slow) == KEYS[:4]


def test_what_is_queued_is_not_queued_again():
    slow = Slow()
    slow.writes.clear()
    with store_of(slow, queue_bytes=300) as store:
        put(store, KEYS[0])
        assert slow.entered.wait(SOON)
        put(store, *[KEYS[1]] * 9, KEYS[2])
        assert slow.tally.read().dropped == 0


def test_a_slow_tier_does_not_hold_up_another():
    stuck, other = Slow(), Slow()
    stuck.writes.clear()
    with store_of(stuck, other) as store:
        put(store, *KEYS)
        assert store._writers[1].flush(SOON)
        assert held(other) == KEYS and held(stuck) == []


def test_what_was_put_may_be_any_contiguous_bytes_and_is_given_read_only():
    with store_of() as store:
        array = np.arange(6, dtype=np.float32).reshape(2, 3)
        for number, data in enumerate([b"bytes", bytearray(b"array"), memoryview(array)]):
            store.put("a", KEYS[number], data)
            value = store.get("a", KEYS[number])
            assert value is not None and value.readonly and value == memoryview(data).cast("B")
        with pytest.raises(TypeError, match="contiguous"):
            store.put("a", KEYS[4], memoryview(array[:, ::2]))


@pytest.mark.parametrize("missing", [0, 3, 8])
def test_the_longest_beginning_that_is_there_is_prefetched(missing):
    with store_of(Slow(*KEYS[:missing], *KEYS[missing + 1 :])) as store:
        prefetch = store.prefetch("a", KEYS)
        assert prefetch.wait(SOON) == [value_of("a", key) for key in KEYS[:missing]] and prefetch.done


def test_a_prefetch_is_polled_without_waiting_and_can_be_given_up():
    slow = Slow(*KEYS)
    slow.reads.clear()
    with store_of(slow) as store:
        put(store, KEYS[0])
        prefetch = store.prefetch("a", KEYS)
        assert slow.entered.wait(SOON)
        assert not prefetch.done and prefetch.values() in ([], [value_of("a", KEYS[0])])
        prefetch.cancel()
        assert prefetch.done
        slow.reads.set()
    assert len(slow.asked) < len(KEYS)


def test_who_still_waits_for_a_prefetch_when_the_store_is_closed_gets_what_has_come():
    slow = Slow(*KEYS)
    slow.reads.clear()
    with store_of(slow) as store:
        prefetch = store.prefetch("a", KEYS)
        waiting = store.prefetch("a", KEYS)
        assert slow.entered.wait(SOON)
    assert len(prefetch.wait(SOON)) < len(KEYS) and waiting.wait(SOON) == []


def test_a_namespace_that_is_dropped_is_gone_from_all_tiers_and_others_stay():
    slow = Slow()
    with store_of(slow) as store:
        put(store, *KEYS)
        put(store, *KEYS, namespace="b")
        assert store.drop("a")
        assert store.flush(SOON)
        assert {namespace for namespace, _ in slow.held} == {"b"}
        assert [store.get("a", key) for key in KEYS] == [None] * len(KEYS)
        assert [store.get("b", key) for key in KEYS] == [value_of("b", key) for key in KEYS]


def in_thread(call, *arguments: Any) -> threading.Thread:
    thread = threading.Thread(target=call, args=arguments)
    thread.start()
    return thread


def test_what_is_being_written_when_its_namespace_is_dropped_goes_too():
    slow = Slow()
    slow.writes.clear()
    with store_of(slow) as store:
        put(store, KEYS[0])
        assert slow.entered.wait(SOON)
        put(store, *KEYS[1:])
        dropping = in_thread(store.drop, "a")
        slow.writes.set()
        dropping.join(SOON)
        assert store.flush(SOON) and not slow.held


def test_what_is_being_read_when_its_namespace_is_dropped_is_not_kept():
    first, second = Slow(), Slow(KEYS[0])
    second.reads.clear()
    with store_of(first, second) as store:
        reading = in_thread(store.get, "a", KEYS[0])
        assert second.entered.wait(SOON)
        store.drop("a")
        second.reads.set()
        reading.join(SOON)
        assert store.get("a", KEYS[0]) is None and store.flush(SOON) and not first.held


def test_what_was_queued_is_written_before_it_closes_and_later_puts_are_dropped():
    slow = Slow()
    slow.writes.clear()
    with store_of(slow) as store:
        put(store, *KEYS[:4])
        closing = in_thread(store.close, SOON)
        slow.writes.set()
        closing.join(SOON)
        assert held(slow) == KEYS[:4] and slow.closed
        put(store, KEYS[5])
        assert held(slow) == KEYS[:4] and slow.tally.read().dropped == 1


def test_a_tier_that_hangs_does_not_hold_up_the_end():
    slow = Slow()
    slow.writes.clear()
    with store_of(slow) as store:
        put(store, *KEYS)
        store.close(timeout=0.01)
        assert slow.closed


def configured(folder: Path, kind: str, request: pytest.FixtureRequest) -> StoreConfig:
    where: dict[str, Any] = {} if kind == "memory" else {"folder": folder}
    return StoreConfig(**where, **({"url": request.getfixturevalue("server").url} if kind == "all" else {}))


@pytest.mark.parametrize(("kind", "tiers"), [("memory", 1), ("disk", 2), ("all", 3)])
def test_each_choice_of_tiers_keeps_what_it_should_over_a_restart(tmp_path, kind, tiers, request):
    config = configured(tmp_path / "pages", kind, request)
    store = open_store(config)
    assert list(store.counters()) == ["memory", "disk", "shared"][:tiers]
    put(store, *KEYS)
    store.close()
    store = open_store(config)
    wanted = [] if kind == "memory" else [value_of("a", key) for key in KEYS]
    assert store.prefetch("a", KEYS).wait(SOON) == wanted
    counters = store.counters()
    assert counters["memory"].misses >= 1 and all(counters[name].failed == 0 for name in counters)
    assert kind == "memory" or counters["disk"].hits == len(KEYS)
    store.close()


def test_an_instance_with_another_folder_finds_pages_in_the_server_and_keeps_them(tmp_path, server):
    configs = [StoreConfig(folder=tmp_path / name, url=server.url) for name in ("one", "two")]
    store = open_store(configs[0])
    put(store, *KEYS)
    store.close()
    for tier in ("shared", "disk"):
        store = open_store(configs[1])
        assert store.prefetch("a", KEYS).wait(SOON) == [value_of("a", key) for key in KEYS]
        assert store.counters()[tier].hits == len(KEYS)
        store.close()


def test_a_shared_store_needs_its_client(monkeypatch):
    monkeypatch.setitem(sys.modules, "redis", None)
    monkeypatch.delitem(sys.modules, "jaxserve.tiers.shared", raising=False)
    monkeypatch.delitem(sys.modules, "jaxserve.tiers.scripts", raising=False)
    with pytest.raises(RequestError, match=r"pip install 'jaxserve\[store\]'"):
        open_store(StoreConfig(url="redis://localhost"))


@pytest.mark.parametrize("what", ["folder", "url"])
def test_what_can_not_be_as_configured_is_refused(tmp_path, what):
    (tmp_path / "file").touch()
    wrong: dict[str, Any] = {"folder": tmp_path / "file"} if what == "folder" else {"url": "nowhere"}
    with pytest.raises(RequestError, match="it is a file, not a folder|URL of a shared store"):
        open_store(StoreConfig(**wrong))
