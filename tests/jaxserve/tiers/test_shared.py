import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from jaxserve.parallel.errors import RequestError
from jaxserve.tiers.limits import Limits
from jaxserve.tiers.shared import SharedTier
from tests.jaxserve.tiers.conftest import Server, value_of
from tests.waiting import SOON, eventually

ROOM = Limits(1 << 30)
KEYS = [bytes([n]) * 32 for n in range(40)]


@contextmanager
def connected(server: Server, limits: Limits = ROOM, **options) -> Iterator[SharedTier]:
    """With patience: these tests run beside others."""
    tier = SharedTier(server.url, limits, **{"deadline": SOON, "pause": 0.05} | options)
    try:
        yield tier
    finally:
        tier.close()


def fill(tier: SharedTier, namespace: str = "a", size: int = 100) -> None:
    for key in KEYS:
        tier.put(namespace, key, value_of(namespace, key, size))


def found(tier: SharedTier, namespace: str = "a", size: int = 100) -> list[bytes]:
    """Keys whose values come back as they were put; any other value is an error."""
    values = {key: tier.get(namespace, key) for key in KEYS}
    assert all(value in (None, value_of(namespace, key, size)) for key, value in values.items())
    return [key for key, value in values.items() if value is not None]


def values_in(server: Server) -> list[bytes]:
    return [name for name in server.client.keys() if server.client.type(name) == b"string"]


def test_what_one_instance_has_put_another_finds(server):
    with connected(server) as one, connected(server) as other:
        fill(one, size=100_000)
        assert found(other, size=100_000) == KEYS
        assert found(other, "b") == []
        assert other.tally.read().read_bytes == one.tally.read().written_bytes == 100_000 * len(KEYS)


def test_what_is_there_is_not_sent_again(server):
    with connected(server) as one, connected(server) as other:
        fill(one)
        fill(other)
        assert (other.tally.read().written_bytes, len(values_in(server))) == (0, len(KEYS))


def test_a_capacity_holds_for_all_instances_together(server):
    limits = Limits(1 << 30, None, {"a": 4 * 1000})
    with connected(server, limits, parts=4) as one, connected(server, limits, parts=4) as other:
        for key in KEYS:
            one.put("a", key, value_of("a", key))
            other.put("a", key[::2], value_of("a", key[::2]))
            one.put("b", key, value_of("b", key))
        sizes = [server.client.strlen(name) for name in values_in(server)]
        assert sum(sizes) <= 4000 + len(found(one, "b")) * 148
        assert len(found(one, "b")) == len(KEYS)
        assert one.tally.read().evicted + other.tally.read().evicted > 0


def test_a_namespace_can_be_dropped_and_nothing_of_it_stays(server):
    with connected(server) as tier:
        fill(tier)
        assert tier.drop("a") and server.client.keys() == []
        fill(tier)
        fill(tier, "b")
        assert tier.drop("a")
        assert (found(tier), found(tier, "b")) == ([], KEYS)


@pytest.mark.parametrize("damage", [b"", b"short", None, "another"])
def test_damaged_bytes_are_noticed_counted_and_removed(server, damage):
    with connected(server) as tier:
        fill(tier)
        names = values_in(server)
        whole = server.client.get(names[0])
        another = server.client.get(names[1])
        flipped = whole[:60] + bytes([whole[60] ^ 1]) + whole[61:]
        server.client.set(names[0], flipped if damage is None else another if damage == "another" else damage)
        assert len(found(tier)) == len(KEYS) - 1
        assert (tier.tally.read().damaged, tier.tally.read().failed) == (1, 0)
        assert set(values_in(server)) == set(names[1:])
        fill(tier)
        assert found(tier) == KEYS


def test_what_is_something_else_by_that_name_is_a_failure_of_this_call_alone(server):
    with connected(server, pause=3600.0) as tier:
        fill(tier)
        server.client.delete(name := values_in(server)[0])
        server.client.lpush(name, "x")
        assert len(found(tier)) == len(KEYS) - 1 and tier.tally.read().failed == 1


def test_values_that_the_server_has_evicted_make_no_trouble(server):
    with connected(server, Limits(16 * 148 * 3)) as tier:
        fill(tier)
        for name in values_in(server)[::2]:
            server.client.delete(name)
        held = found(tier)
        assert len(held) == len(values_in(server)) > 0
        fill(tier)
        assert tier.tally.read().failed == tier.tally.read().damaged == 0
        server.client.flushall()
        fill(tier)
        assert len(found(tier)) == len(values_in(server)) > 0


@pytest.mark.parametrize("books", ["order", "sizes"])
def test_when_the_server_has_evicted_books_the_capacity_is_used_again(server, books):
    with connected(server, Limits(10 * 148), parts=1) as tier:
        fill(tier)
        assert found(tier) == KEYS[-10:]
        server.client.delete(*server.client.keys(f"*:{books}"))
        fill(tier, "b")
        fill(tier)
        for key in KEYS[-10:]:
            tier.put("a", key, value_of("a", key))
        assert found(tier)[-10:] == KEYS[-10:] and tier.tally.read().failed == 0
        for key in KEYS[:5]:
            tier.put("a", key, value_of("a", key))
        assert found(tier)[-10:] == KEYS[:5] + KEYS[-5:]


def test_a_server_that_has_no_room_refuses_a_put_and_gives_what_it_has(server):
    with connected(server, pause=3600.0) as tier:
        tier.put("a", KEYS[0], value_of("a", KEYS[0]))
        server.client.config_set("maxmemory", 1)
        tier.put("a", KEYS[1], value_of("a", KEYS[1]))
        assert tier.get("a", KEYS[0]) == value_of("a", KEYS[0]) and tier.tally.read().failed == 1
        server.client.config_set("maxmemory", 0)
        assert found(tier) == KEYS[:1] and tier.tally.read().failed == 1


def test_what_nobody_uses_goes_in_the_end_with_all_that_belongs_to_it(server):
    with connected(server, lifetime=0.05) as tier:
        fill(tier)
        assert eventually(lambda: server.client.keys() == [])
        assert found(tier) == [] and tier.tally.read().failed == 0


def test_scripts_that_a_server_has_forgotten_are_sent_again(server):
    with connected(server) as tier:
        fill(tier)
        server.client.script_flush()
        assert found(tier) == KEYS and tier.tally.read().failed == 0


def test_a_server_that_dies_is_a_miss_and_one_that_comes_back_is_used(server):
    with connected(server) as tier:
        fill(tier)
        server.kill()
        assert found(tier) == [] and tier.tally.read().failed > 0
        tier.put("a", KEYS[0], value_of("a", KEYS[0]))
        assert not tier.drop("a")
        server.start()
        assert eventually(lambda: fill(tier) or found(tier) == KEYS)


def test_a_server_that_was_not_there_at_first_is_found_later(server):
    server.kill()
    with connected(server) as tier:
        assert found(tier) == []
        server.start()
        assert eventually(lambda: fill(tier) or found(tier) == KEYS)


def test_that_nobody_answers_is_logged_once_a_minute(caplog):
    clock = [0.0]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    tier = SharedTier(f"redis://:secret@127.0.0.1:{port}", ROOM, pause=0.0, clock=lambda: clock[0])
    for now in (0.0, 30.0, 61.0, 62.0):
        clock[0] = now
        assert tier.get("a", KEYS[0]) is None
    tier.close()
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "the shared store does not do what it is asked" in caplog.text and "secret" not in caplog.text


def test_while_a_server_is_down_nothing_is_asked_of_it(server):
    times = []
    server.kill()
    with connected(server, pause=10.0, clock=lambda: times[-1]) as tier:
        for time_now in (0.0, 9.9, 10.0, 19.9):
            times.append(time_now)
            tier.get("a", KEYS[0])
            tier.put("a", KEYS[0], value_of("a", KEYS[0]))
        counters = tier.tally.read()
        assert (counters.failed, counters.misses, counters.dropped) == (2, 4, 4)


def test_a_server_that_hangs_costs_its_deadline_and_is_used_when_it_goes_on(server):
    with connected(server) as tier:
        fill(tier)
    with connected(server, deadline=0.2, pause=3600.0) as tier:
        server.freeze()
        assert found(tier) == [] and tier.tally.read().failed == 1
        server.go_on()
    with connected(server) as tier:
        assert found(tier) == KEYS


def test_a_server_that_is_killed_in_the_middle_gives_nothing_wrong(server):
    with connected(server, deadline=1.0) as tier:
        end = threading.Event()

        def use(seed: int) -> None:
            draw = random.Random(seed)
            while not end.is_set():
                key = draw.choice(KEYS)
                if tier.get("a", key) not in (None, value_of("a", key, 100_000)):
                    wrong.append(key)
                tier.put("a", key, value_of("a", key, 100_000))

        wrong: list[bytes] = []
        threads = [threading.Thread(target=use, args=[seed]) for seed in range(4)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(3):
                hits = tier.tally.read().hits
                assert eventually(lambda before=hits: tier.tally.read().hits > before)
                server.kill()
                server.start()
        finally:
            end.set()
            for thread in threads:
                thread.join(SOON)
        assert not wrong and tier.tally.read().damaged == 0


@contextmanager
def impostor(answer) -> Iterator[str]:
    """The URL of a server that says to whoever connects what it was told to say."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with listening.accept()[0] as connection:
                answer(connection)

        def accept() -> None:
            while True:
                try:
                    serve()
                except OSError:
                    if listening.fileno() < 0:
                        return

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield f"redis://127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)
    thread.join(SOON)


def trickle(connection: socket.socket) -> None:
    """Never silent for as long as a socket's timeout, and never done."""
    connection.sendall(b"$1000000\r\n")
    while True:
        connection.sendall(b"x")
        time.sleep(0.02)


@pytest.mark.parametrize(
    "answer",
    [
        trickle,
        lambda connection: connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
        lambda connection: connection.sendall(b"\0\xff\r\n" * 1000),
        lambda connection: connection.sendall(b":1\r\n" * 1000),
        lambda connection: connection.sendall(b"$nonsense\r\n"),
        lambda connection: None,
    ],
    ids=["trickle", "http", "binary", "numbers", "nonsense", "closed"],
)
def test_whatever_a_server_says_instead_is_a_miss(answer):
    with impostor(answer) as url:
        tier = SharedTier(url, ROOM, deadline=0.3, pause=0.0)
        assert [tier.get("a", key) for key in KEYS[:3]] == [None] * 3
        tier.put("a", KEYS[0], value_of("a", KEYS[0]))
        assert tier.tally.read().failed >= 4 and tier.tally.read().hits == 0
        tier.close()


@pytest.mark.parametrize("url", ["localhost:6379", "http://localhost", "", "redis:/host", "redis://:secret@host:port"])
def test_what_is_no_url_is_refused_without_showing_a_password(url):
    with pytest.raises(RequestError, match=r"must be redis://\[\[user\]:password@\]host\[:port\]") as caught:
        SharedTier(url, ROOM)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("parts", [0, -1, 1.5, True])
def test_a_number_of_parts_that_is_none_is_refused(parts):
    with pytest.raises(RequestError, match=f"parts = {parts}: it must be a whole number, 1 or more"):
        SharedTier("redis://localhost", ROOM, parts=parts)


def nodes_of(names: Counter[int]) -> list[int]:
    return sorted(node for node, count in names.items() if count)


def test_a_cluster_is_found_by_one_of_its_nodes_and_used_as_a_whole(cluster):
    with connected(cluster[0]) as one, connected(cluster[2]) as other:
        fill(one)
        fill(one, "b")
        assert (found(other), found(other, "b")) == (KEYS, KEYS)
        held = Counter({number: len(values_in(node)) for number, node in enumerate(cluster)})
        assert nodes_of(held) == [0, 1, 2] and held.total() == 2 * len(KEYS)
        assert other.drop("a") and found(one) == [] and found(one, "b") == KEYS
        assert one.tally.read().failed == other.tally.read().failed == 0


def test_a_capacity_holds_in_a_cluster(cluster):
    with connected(cluster[1], Limits(16 * 148 * 2)) as tier:
        fill(tier)
        sizes = [node.client.strlen(name) for node in cluster for name in values_in(node)]
        assert 0 < sum(sizes) <= 16 * 148 * 2 and len(found(tier)) == len(sizes)


def test_when_a_node_of_a_cluster_dies_the_others_are_still_used(cluster):
    with connected(cluster[0], deadline=2.0, pause=0.0) as tier:
        fill(tier)
        lost = len(values_in(cluster[1]))
        cluster[1].kill()
        assert lost and eventually(lambda: len(found(tier)) == len(KEYS) - lost)
        fill(tier)
        assert len(found(tier)) == len(KEYS) - lost and tier.tally.read().damaged == 0
