"""Pages between meshes, over links that work, stall, damage what they carry, and break."""

import gc
import random
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.parallel import carriers
from jaxserve.parallel.devices import Devices
from jaxserve.parallel.errors import ShardingError, TransferError
from jaxserve.parallel.frames import HEAD, NONCE, Frames
from jaxserve.parallel.pages import PageCopier
from jaxserve.parallel.transfer import PULLS, Receiver, Sender, serving_rank
from tests.parallel.caches import KINDS, PAGES, host_cache, mesh_of, on_devices
from tests.parallel.sending_process import TOKEN
from tests.processes import freeze

WAYS = [None, "jax"]
SECONDS = 20.0
"""A deadline that is not to pass."""
GREETING = 2 * NONCE + HEAD.size + len("{}")
"""Bytes from a sender before anything is asked for."""


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    """Closes what a test opens, in the other order."""
    with ExitStack() as stack:
        yield stack


def make_sender(opened: ExitStack, limit: int = 10**8, **how: Any) -> Sender:
    return opened.enter_context(closing(Sender(TOKEN, limit, **how)))


def make_receiver(opened: ExitStack, address: tuple[str, int], name: str = "receiver", **how: Any) -> Receiver:
    return opened.enter_context(closing(Receiver(address, TOKEN, name, **how)))


def until(true: Callable[[], Any]) -> None:
    """Waits for something that is to become so soon."""
    end = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


def failure(future: Any) -> TransferError:
    with pytest.raises(TransferError) as caught:
        future.result(SECONDS)
    return caught.value


@contextmanager
def wire(address: tuple[str, int], change: Callable[[bytes], bytes | None]) -> Iterator[tuple[str, int]]:
    """A way to an address; what comes back is changed, or from a None on not handed on."""
    ends: list[socket.socket] = []

    def pump(source: socket.socket, target: socket.socket, change: Callable[[bytes], bytes | None]) -> None:
        try:
            while data := source.recv(1 << 16):
                changed = change(data)
                if changed is None:
                    return
                target.sendall(changed)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # one end has gone

    def serve() -> None:
        near, _ = listener.accept()
        far = socket.create_connection(address)
        ends.extend([near, far])
        for ways in ((near, far, lambda data: data), (far, near, change)):
            threading.Thread(target=pump, args=ways, daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()
        thread.join(SECONDS)
    for end in ends:
        end.close()


def stalling(after: int) -> Callable[[bytes], bytes | None]:
    """Hands on so many bytes, and then nothing."""
    passed = 0

    def change(data: bytes) -> bytes | None:
        nonlocal passed
        passed += len(data)
        return data if passed <= after else None

    return change


def big(nbytes: int = 8 << 20) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, nbytes, dtype=np.uint8)


@pytest.mark.parametrize("target_ranks", [None, 1, 2, 4])
@pytest.mark.parametrize("source_ranks", [None, 1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_pages_come_from_a_mesh_to_another_as_they_are(opened, kind, source_ranks, target_ranks):
    source, target = (
        Devices(ranks and mesh_of(ranks, first)) for ranks, first in ((source_ranks, 0), (target_ranks, 4))
    )
    theirs, ours = host_cache(kind, source.count, seed=1), host_cache(kind, target.count, seed=2)
    outside, inside = PageCopier(source, 4), PageCopier(target, 4)
    cache, sender = on_devices(ours, target), make_sender(opened)
    taken = outside.gather(on_devices(theirs, source), {rank: [4, rank, 5] for rank in range(source.count)})
    wanted = [each.copy() for each in jax.tree.leaves(ours)]
    for to in range(target.count):
        rank = serving_rank(to, prefill_tp=source.count, decode_dp=target.count)
        link = make_receiver(opened, sender.address, f"rank {to}")
        assert sender.offer(f"for {to}", jax.tree.map(lambda pages: pages[:3], taken[rank]))
        like = jax.tree.map(lambda pages: jax.ShapeDtypeStruct((3, *pages.shape[1:]), pages.dtype), ours)
        pages = link.pull(f"for {to}", like, SECONDS).result(SECONDS)
        cache = inside.scatter(cache, {to: [to, 5, 4]}, {to: pages})
        for each, given in zip(wanted, jax.tree.leaves(theirs), strict=True):
            each[to * PAGES + np.array([to, 5, 4])] = given[rank * PAGES + np.array([4, rank, 5])]
        assert link.counts.nbytes == sum(3 * page.nbytes for page in (leaf[0] for leaf in jax.tree.leaves(ours)))
    for each, found in zip(wanted, jax.tree.leaves(cache), strict=True):
        assert np.asarray(found).tobytes() == each.tobytes()
    until(lambda: len(sender.offers) == 0)
    assert {name: counts.pulls for name, counts in sender.counts.items()} == {
        f"rank {to}": 1 for to in range(target.count)
    }


@pytest.mark.parametrize("way", WAYS)
def test_arrays_of_any_shape_come_as_they_are(opened, way):
    tree = {
        "big": big(), "one": np.float32(3).reshape(1), "none": np.zeros((0, 3), np.int8),
        "on a device": jnp.arange(7, dtype=jnp.bfloat16), "turned": np.arange(6, dtype=np.int32).reshape(2, 3).T,
    }  # fmt: skip
    sender = make_sender(opened, implementation=way)
    link = make_receiver(opened, sender.address, implementation=way)
    assert sender.offer("it", tree)
    found = link.pull("it", tree, SECONDS).result(SECONDS)
    jax.tree.map(np.testing.assert_array_equal, found, jax.device_get(tree))
    assert link.counts.nbytes == sum(each.nbytes for each in tree.values())


@pytest.mark.parametrize("way", WAYS)
def test_what_is_not_offered_or_is_otherwise_is_refused_and_the_link_goes_on(opened, way):
    sender = make_sender(opened, implementation=way)
    link = make_receiver(opened, sender.address, implementation=way)
    sender.offer("it", np.ones(4, np.float32))
    assert failure(link.pull("other", np.ones(4, np.float32), SECONDS)).kind == "gone"
    for wrong in (np.ones(5, np.float32), np.ones(4, np.int32)):
        assert failure(link.pull("it", wrong, SECONDS)).kind == "refused"
    assert link.pull("it", np.ones(4, np.float32), SECONDS).result(SECONDS).sum() == 4
    assert failure(link.pull("it", np.ones(4, np.float32), SECONDS)).kind == "gone"  # once only
    assert (link.counts.pulls, link.counts.refused) == (1, 4)


def test_what_was_donated_meanwhile_is_gone(opened):
    sender = make_sender(opened)
    array = jnp.ones(4, jnp.float32)
    sender.offer("it", array)
    array.delete()
    assert failure(make_receiver(opened, sender.address).pull("it", array, SECONDS)).kind == "gone"
    assert len(sender.offers) == 0


def test_a_damaged_byte_is_noticed_and_the_offer_can_be_asked_for_again(opened):
    flipped = []

    def flip(data: bytes) -> bytes:
        if len(data) < 10_000 or flipped:
            return data
        flipped.append(at := random.Random(0).randrange(5_000, len(data)))
        return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]

    sender = make_sender(opened)
    sender.offer("it", sent := big())
    link = make_receiver(opened, opened.enter_context(wire(sender.address, flip)))
    assert failure(link.pull("it", sent, SECONDS)).kind == "damaged"
    np.testing.assert_array_equal(link.pull("it", sent, SECONDS).result(SECONDS), sent)
    until(lambda: sender.counts["receiver"].pulls == 1)
    assert (len(flipped), link.counts.damaged, sender.counts["receiver"].damaged) == (1, 1, 1)


def test_a_damaged_byte_is_noticed_when_jax_has_brought_it(opened, monkeypatch):
    right, calls = carriers.checksums, Counter()

    def wrong_once(array: np.ndarray) -> np.ndarray:
        calls["all"] += 1
        return right(array) + np.uint32(calls["all"] == 1)

    monkeypatch.setattr(carriers, "checksums", wrong_once)
    sender = make_sender(opened, implementation="jax")
    link = make_receiver(opened, sender.address, implementation="jax")
    sender.offer("it", sent := big())
    assert failure(link.pull("it", sent, SECONDS)).kind == "damaged"
    np.testing.assert_array_equal(link.pull("it", sent, SECONDS).result(SECONDS), sent)


def test_a_link_that_stalls_ends_by_its_deadline_and_another_goes_on_meanwhile(opened):
    sender = make_sender(opened, patience=1.0)
    stalled = make_receiver(opened, opened.enter_context(wire(sender.address, stalling(1 << 20))), "stalled")
    other, sent = make_receiver(opened, sender.address, "other"), big()
    assert all(sender.offer(name, sent) for name in "ab")
    waits = stalled.pull("a", sent, 3.0)
    np.testing.assert_array_equal(other.pull("b", sent, SECONDS).result(SECONDS), sent)
    assert not waits.done()
    assert failure(waits).kind in ("late", "dead")
    with pytest.raises(TransferError) as caught:
        stalled.pull("a", sent, 1.0)
    assert caught.value.kind == "dead"
    until(lambda: sender.probe("stalled", 0.1) == "dead")
    until(lambda: not sender._links["stalled"]._given)
    sender.offers.claim("a")  # it was put back: whoever comes next can have it
    assert sender.probe("other", SECONDS) == "ready"


def test_a_sender_that_says_nothing_ends_the_link_by_the_deadline(opened):
    sender = make_sender(opened)
    link = make_receiver(opened, opened.enter_context(wire(sender.address, stalling(GREETING))))
    sender.offer("it", sent := big())
    both = [link.pull(name, sent, seconds) for name, seconds in {"it": 0.3, "other": SECONDS}.items()]
    assert [failure(each).kind for each in both] == ["late", "late"]


@pytest.mark.parametrize("way", WAYS)
def test_offers_that_nobody_takes_are_let_go_and_counted(opened, way):
    sender = make_sender(opened, implementation=way)
    array = jnp.ones(1000, jnp.float32)
    left = weakref.ref(array)
    sender.offer("it", array, seconds=0.1)
    del array
    until(lambda: sender.offers.expired == 1)
    gc.collect()
    assert (left(), len(sender.offers), sender.offers.nbytes) == (None, 0, 0)


def test_a_receiver_that_never_says_that_it_has_its_pages_holds_them_until_its_deadline(opened):
    sender = make_sender(opened)
    link = make_receiver(opened, sender.address)
    link._finish = lambda name: time.sleep(2)  # type: ignore[method-assign]
    sender.offer("it", np.zeros(10), seconds=0.5)  # in which it is asked for, on a busy machine too
    link.pull("it", np.zeros(10), 1.0)
    until(lambda: sender._links["receiver"].failure)
    until(lambda: len(sender.offers) == 0)
    assert (sender.offers.expired, sender.counts["receiver"].pulls) == (1, 0)


def test_offers_are_bounded_and_taking_one_makes_room(opened):
    sender = make_sender(opened, limit=100)
    link, ten = make_receiver(opened, sender.address), np.zeros(10, np.uint8)
    assert [sender.offer(str(i), ten) for i in range(12)] == [True] * 10 + [False] * 2
    link.pull("3", ten, SECONDS).result(SECONDS)
    until(lambda: sender.offers.nbytes == 90)
    assert sender.offer("11", ten) and not sender.offer("12", ten)
    sender.withdraw("5")
    assert sender.offer("12", ten)


def test_a_receiver_asks_for_so_many_at_most(opened):
    sender = make_sender(opened)
    link = make_receiver(opened, opened.enter_context(wire(sender.address, stalling(GREETING))))
    for i in range(PULLS):
        link.pull(str(i), np.zeros(1), SECONDS)
    with pytest.raises(TransferError, match=f"asked for already, or {PULLS} others are"):
        link.pull("more", np.zeros(1), SECONDS)


def test_a_probe_tells_a_full_receiver_from_one_with_room_and_from_one_that_is_gone(opened):
    sender, room = make_sender(opened), [3]
    link = make_receiver(opened, sender.address, "r", room=lambda: room[0])
    assert sender.probe("r", SECONDS) == "ready" == link.probe(SECONDS)
    room[0] = 0
    assert sender.probe("r", SECONDS) == "full"
    link.close()
    until(lambda: sender.probe("r", 0.1) == "dead")
    assert sender.probe("who", 0.1) == "dead"


def test_a_probe_of_a_link_that_carries_nothing_says_dead(opened):
    sender = make_sender(opened)
    link = make_receiver(opened, opened.enter_context(wire(sender.address, stalling(GREETING))))
    link.pull("it", np.zeros(1), SECONDS)  # the answer is lost, and so are those after it
    assert link.probe(0.2) == "dead"


def test_who_does_not_know_the_token_is_not_let_in_and_lets_nobody_in(opened):
    sender = make_sender(opened)
    with pytest.raises(TransferError, match="lets nobody in who has another token") as caught:
        Receiver(sender.address, b"another", "thief")
    assert caught.value.kind == "refused"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours, theirs = socket.create_connection(listener.getsockname()), listener.accept()[0]
    with closing(Frames(theirs, 1.0)) as liar, closing(Frames(ours, 1.0)) as receiver:
        failed: list[TransferError] = []

        def ask() -> None:
            try:
                receiver.enter(TOKEN)
            except TransferError as error:
                failed.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        liar._push(memoryview(bytes(32)))
        liar.fill(memoryview(bytearray(64)))
        liar._push(memoryview(bytes(32)))
        thread.join(SECONDS)
    assert "the sender does not know the token" in str(failed[0])
    assert sender.counts == {}


def test_both_ends_must_carry_alike_and_implementations_have_names(opened):
    sender = make_sender(opened)
    with pytest.raises(TransferError, match="implementation='sockets', the receiver 'jax': give both one"):
        Receiver(sender.address, TOKEN, "r", implementation="jax")
    with pytest.raises(NotImplementedError, match="implementation 'mail' of transfer; there are: sockets, jax"):
        carriers.carriers("mail")


def test_nobody_at_the_address_is_said(opened):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
    with pytest.raises(TransferError, match="does not answer") as caught:
        Receiver(address, TOKEN, "r")
    assert caught.value.kind == "dead"


def test_who_knocks_and_says_nothing_or_nonsense_disturbs_nobody(opened):
    sender = make_sender(opened, patience=0.5)
    silent = opened.enter_context(socket.create_connection(sender.address))
    with socket.create_connection(sender.address) as rude:
        rude.sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(200))
    link = make_receiver(opened, sender.address)
    sender.offer("it", big())
    assert link.pull("it", big(), SECONDS).result(SECONDS).nbytes == big().nbytes
    silent.settimeout(SECONDS)
    assert len(silent.recv(100)) == 32 and silent.recv(100) == b""  # its patience ends


def test_an_end_whose_other_makes_no_sense_says_so(opened):
    sender = make_sender(opened)
    link = make_receiver(opened, sender.address)
    waits = link.pull("it", np.zeros(1), 0.5)
    link._frames.send(99, {"name": 3})
    assert failure(waits).kind in ("gone", "dead")
    until(lambda: sender.probe("receiver", 0.1) == "dead")


def test_who_comes_again_takes_the_place_of_its_old_link(opened):
    sender = make_sender(opened)
    old, new = (make_receiver(opened, sender.address, "r") for _ in range(2))
    until(lambda: old.failure)
    assert sender.probe("r", SECONDS) == "ready" == new.probe(SECONDS)


@contextmanager
def sending_process(kind: str, way: str | None) -> Iterator[tuple[subprocess.Popen[str], tuple[str, int]]]:
    command = [sys.executable, "-m", "tests.parallel.sending_process", kind, way or "sockets"]
    with subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            yield process, ("127.0.0.1", int(process.stdout.readline()))
        finally:
            process.kill()


@pytest.mark.parametrize("way", WAYS)
def test_pages_come_from_another_process_until_it_is_killed(opened, way):
    sent = host_cache("int8", 1, seed=7)
    with sending_process("int8", way) as (process, address):
        link = make_receiver(opened, address, implementation=way)
        found = link.pull("pages", sent, SECONDS).result(SECONDS)
        jax.tree.map(np.testing.assert_array_equal, found, sent)
        assert link.probe(SECONDS) == "ready"
        freeze(process)
        assert link.probe(0.2) == "dead"
        waits = link.pull("0", sent, SECONDS)
        process.kill()
        assert failure(waits).kind == "dead"
        with pytest.raises(TransferError) as caught:
            Receiver(address, TOKEN, "again", implementation=way)
        assert caught.value.kind == "dead"


@pytest.mark.parametrize("way", WAYS)
def test_what_a_receiver_that_dies_has_asked_for_can_go_to_another_and_is_let_go(opened, way):
    sender = make_sender(opened, implementation=way, patience=0.5)
    first, array = make_receiver(opened, sender.address, "first", implementation=way), jnp.ones(1 << 24, jnp.int8)
    first._carrier.take = lambda *_: time.sleep(1.5)  # type: ignore[method-assign]
    left = weakref.ref(array)
    sender.offer("it", array, seconds=SECONDS)
    first.pull("it", array, SECONDS)
    until(lambda: sender._links["first"]._given)
    first.close()
    until(lambda: sender._links["first"].failure and not sender._links["first"]._given)
    second = make_receiver(opened, sender.address, "second", implementation=way)
    assert second.pull("it", array, SECONDS).result(SECONDS).sum(dtype=np.int64) == 1 << 24
    del array
    until(lambda: gc.collect() >= 0 and left() is None)


def published(dp_rank: int, tp_rank: int, prefill_tp: int, decode_dp: int, decode_tp: int) -> int:
    """As arXiv:2506.12708 has it, section 4.3.3."""
    ratio = prefill_tp / decode_tp
    group_size = decode_dp / ratio
    group_id = int(dp_rank / group_size)
    return group_id * decode_tp + tp_rank


@pytest.mark.parametrize(
    ("prefill_tp", "decode_tp", "decode_dp"), [(32, 1, 320), (4, 1, 8), (8, 2, 8), (4, 4, 3), (1, 1, 5), (16, 4, 8)]
)
def test_connections_are_those_of_the_paper_and_each_prefill_rank_has_as_many(prefill_tp, decode_tp, decode_dp):
    size = {"prefill_tp": prefill_tp, "decode_tp": decode_tp, "decode_dp": decode_dp}
    ranks = [(dp, tp) for dp in range(decode_dp) for tp in range(decode_tp)]
    found = {rank: serving_rank(*rank, **size) for rank in ranks}
    assert found == {rank: published(*rank, **size) for rank in ranks}
    assert Counter(Counter(found.values()).values()) == {decode_dp * decode_tp // prefill_tp: prefill_tp}


@pytest.mark.parametrize(("prefill_tp", "decode_dp"), [(4, 6), (3, 7), (4, 1), (4, 2), (8, 5)])
def test_where_ranks_do_not_divide_loads_differ_by_one_at_most(prefill_tp, decode_dp):
    found = [serving_rank(rank, prefill_tp=prefill_tp, decode_dp=decode_dp) for rank in range(decode_dp)]
    loads = [found.count(rank) for rank in range(prefill_tp)]
    assert max(loads) - min(loads) <= 1 and found == sorted(found)


def test_ranks_that_are_not_there_have_no_connection():
    with pytest.raises(ShardingError, match="prefill_tp 3 is not a multiple of decode_tp 2"):
        serving_rank(0, prefill_tp=3, decode_dp=1, decode_tp=2)
    with pytest.raises(ShardingError, match=r"4 x 1 has no rank \(4, 0\)"):
        serving_rank(4, prefill_tp=2, decode_dp=4)
