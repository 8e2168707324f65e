"""Each tier against a few lines that say what it should do."""

import tempfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from jaxserve.tiers.disk import DiskTier
from jaxserve.tiers.limits import Limits
from jaxserve.tiers.memory import MemoryTier
from jaxserve.tiers.records import HEADER
from jaxserve.tiers.shared import SharedTier
from jaxserve.tiers.tier import Tier
from tests.jaxserve.tiers.conftest import value_of

SETTINGS = hypothesis.settings(max_examples=40, stateful_step_count=40, deadline=None)
NAMESPACES = st.sampled_from(["a", "b", "", "../x ü"])
KEYS = st.integers(0, 7).map(lambda n: bytes([n]) * 32)


def size_of(key: bytes) -> int:
    """Bytes of the value under a key: some are larger than some capacities."""
    return [0, 1, 10, 100, 150, 200, 300, 500][key[0]]


class Model:
    """What a tier holds, the longest unused first."""

    def __init__(self, limits: Limits, overhead: int, has_total: bool):
        self.limits, self.overhead, self.has_total = limits, overhead, has_total
        self.held: OrderedDict[tuple[str, bytes], int] = OrderedDict()
        self.evicted = self.dropped = 0

    def get(self, namespace: str, key: bytes) -> bool:
        found = (namespace, key) in self.held
        if found:
            self.held.move_to_end((namespace, key))
        return found

    def put(self, namespace: str, key: bytes) -> None:
        size = size_of(key) + self.overhead
        if self.get(namespace, key):
            return
        if size > self.limits.of(namespace):
            self.dropped += 1
            return
        self.held[namespace, key] = size
        while self.size(namespace) > self.limits.of(namespace):
            self.evict(next(place for place in self.held if place[0] == namespace))
        while self.has_total and self.size() > self.limits.total:
            self.evict(next(iter(self.held)))

    def evict(self, place: tuple[str, bytes]) -> None:
        del self.held[place]
        self.evicted += 1

    def drop(self, namespace: str) -> None:
        for place in [place for place in self.held if place[0] == namespace]:
            del self.held[place]

    def size(self, namespace: str | None = None) -> int:
        return sum(size for place, size in self.held.items() if namespace in (None, place[0]))


class Machine(RuleBasedStateMachine):
    """Plays with a tier."""

    overhead, has_total, restarts = 0, True, False
    tier: Tier

    def open(self) -> Tier:
        raise NotImplementedError

    @initialize(total=st.integers(0, 1200), each=st.none() | st.integers(0, 900), own=st.integers(0, 900))
    def begin(self, total, each, own):
        self.limits = Limits(total, each, {"a": own})
        self.model = Model(self.limits, self.overhead, self.has_total)
        self.hits = self.misses = self.read = 0
        self.tier = self.open()

    @rule(namespace=NAMESPACES, key=KEYS)
    def put(self, namespace, key):
        self.tier.put(namespace, key, value_of(namespace, key, size_of(key)))
        self.model.put(namespace, key)

    @rule(namespace=NAMESPACES, key=KEYS)
    def get(self, namespace, key):
        found = self.model.get(namespace, key)
        wanted = value_of(namespace, key, size_of(key)) if found else None
        self.hits, self.misses = self.hits + found, self.misses + (not found)
        self.read += len(wanted) if wanted else 0
        assert self.tier.get(namespace, key) == wanted

    @rule(namespace=NAMESPACES)
    def drop(self, namespace):
        assert self.tier.drop(namespace)
        self.model.drop(namespace)

    @rule()
    def restart(self):
        if self.restarts:
            before = self.tier.tally
            self.tier.close()
            self.tier = self.open()
            self.tier.tally = before

    @invariant()
    def it_counts_what_happened(self):
        if hasattr(self, "tier"):
            found = self.tier.tally.read()
            assert (found.hits, found.misses, found.read_bytes) == (self.hits, self.misses, self.read)
            assert (found.evicted, found.dropped) == (self.model.evicted, self.model.dropped)
            assert (found.damaged, found.failed) == (0, 0)

    def teardown(self):
        if hasattr(self, "tier"):
            for namespace, key in list(self.model.held):
                self.get(namespace, key)
            self.tier.close()


def run(machine: Callable[[], Machine]) -> None:
    run_state_machine_as_test(machine, settings=SETTINGS)


def test_memory_holds_what_it_should():
    class Memory(Machine):
        def open(self):
            return MemoryTier(self.limits)

    run(Memory)


def test_a_folder_holds_what_it_should_and_keeps_it():
    class Disk(Machine):
        overhead, restarts = HEADER.size, True

        def __init__(self):
            super().__init__()
            self.folder = tempfile.TemporaryDirectory()

        def open(self):
            return DiskTier(Path(self.folder.name) / "pages", self.limits)

        @invariant()
        def files_are_what_the_capacity_counts(self):
            files = [path for path in Path(self.folder.name).rglob("*") if path.is_file() and "." not in path.name]
            if hasattr(self, "tier"):
                assert sorted(path.stat().st_size for path in files) == sorted(self.model.held.values())

        def teardown(self):
            super().teardown()
            self.folder.cleanup()

    run(Disk)


def test_a_server_holds_what_it_should_and_keeps_it(server):
    class Shared(Machine):
        overhead, has_total, restarts = HEADER.size, False, True

        def __init__(self):
            super().__init__()
            server.client.flushall()

        def open(self):
            return SharedTier(server.url, self.limits, parts=1)

        @invariant()
        def the_server_has_no_more_than_that(self):
            if hasattr(self, "tier"):
                values = [name for name in server.client.keys() if server.client.type(name) == b"string"]
                sizes = [server.client.strlen(name) for name in values]
                assert sorted(sizes) == sorted(self.model.held.values())

    run(Shared)


@pytest.mark.parametrize("limits", [Limits(1000), Limits(10_000, 1000), Limits(10_000, 10_000, {"a": 1000})])
def test_what_was_not_used_for_longest_makes_room(limits):
    tier = MemoryTier(limits)
    keys = [bytes([n]) for n in range(11)]
    for key in keys[:10]:
        tier.put("a", key, value_of("a", key))
    tier.get("a", keys[0])
    tier.put("a", keys[10], value_of("a", keys[10]))
    assert [key for key in keys if tier.get("a", key) is None] == [keys[1]]
