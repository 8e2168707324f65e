"""Pages of other engines, over links that end, stall or don't come about."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from jaxserve import peers
from jaxserve.parallel.errors import TransferError
from jaxserve.parallel.transfer import Receiver, Sender
from jaxserve.peers import Peers, Pulls
from jaxserve.request import Handover
from tests.parallel.test_transfer import GREETING, stalling, wire
from tests.waiting import SOON, eventually

TOKEN = b"of the test"
PAGE = np.arange(4, dtype=np.float32)
LAYOUT: Any = SimpleNamespace(page_bytes=16, like=lambda count: jax.ShapeDtypeStruct((4 * count,), np.float32))


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    """Closes what a test opens, in the other order."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def links(monkeypatch) -> Counter[tuple[str, int]]:
    """How often a link to an address was tried."""
    tried = Counter[tuple[str, int]]()

    def dial(address: tuple[str, int], *given: Any, **how: Any) -> Receiver:
        tried[address] += 1
        return Receiver(address, *given, **how)

    monkeypatch.setattr(peers, "Receiver", dial)
    return tried


def offering(opened: ExitStack, *names: str) -> Sender:
    sender = opened.enter_context(closing(Sender(TOKEN, 1000)))
    for name in names:
        assert sender.offer(name, PAGE)
    return sender


def pulling(opened: ExitStack, patience: float = SOON) -> Pulls:
    return opened.enter_context(closing(Pulls(LAYOUT, 8, Peers(TOKEN, "r", patience=patience))))


def test_one_link_brings_all_that_another_engine_has(opened, links):
    sender, pulls = offering(opened, *"abc"), pulling(opened)
    found = [pulls.pull(Handover(*sender.address, name, 8)).result(SOON) for name in "abc"]
    assert [(each.first, each.tokens) for each in found] == [(0, 8)] * 3
    for each in found:
        np.testing.assert_array_equal(each.pages, PAGE)
    assert links == {sender.address: 1}


def test_a_link_that_does_not_answer_is_made_anew_before_pages_are_asked_for(opened, links, monkeypatch):
    sender, pulls = offering(opened, *"ab"), pulling(opened)
    pulls.pull(Handover(*sender.address, "a", 8)).result(SOON)
    old = pulls._peers[sender.address]._link
    assert old is not None
    monkeypatch.setattr(old, "probe", lambda seconds: "dead")
    np.testing.assert_array_equal(pulls.pull(Handover(*sender.address, "b", 8)).result(SOON).pages, PAGE)
    assert links == {sender.address: 2} and eventually(lambda: old.failure)


def test_where_no_link_can_be_made_nobody_who_asked_before_waits_for_another_failure(opened, links):
    sender = offering(opened, "a")
    address = opened.enter_context(wire(sender.address, stalling(GREETING)))
    pulls = pulling(opened, patience=3.0)
    waiting = [pulls.pull(Handover(*address, name, 8)) for name in "abcdef"]
    for each in waiting:
        with pytest.raises(TransferError):
            each.result(SOON)
    assert links == {address: 2}  # the first stalls when it has been greeted, and nobody answers the second
    with pytest.raises(TransferError):
        pulls.pull(Handover(*address, "later", 8)).result(SOON)
    assert links == {address: 3}


def test_who_leaves_takes_nothing_from_those_who_wait_before(opened, monkeypatch):
    sender, other, pulls = offering(opened, *"ab"), offering(opened, "d"), pulling(opened)
    greeted, dial = threading.Event(), peers.Receiver
    monkeypatch.setattr(peers, "Receiver", lambda *given, **how: greeted.wait(SOON) and dial(*given, **how))
    first, second, third = (pulls.pull(Handover(*sender.address, name, 8)) for name in "abc")
    assert third.cancel()
    elsewhere = pulls.pull(Handover(*other.address, "d", 8))
    greeted.set()
    for each in (first, second, elsewhere):
        np.testing.assert_array_equal(each.result(SOON).pages, PAGE)


def test_a_link_that_stalls_when_it_is_idle_is_noticed_by_a_probe(opened, links, monkeypatch):
    monkeypatch.setattr(peers, "PROBED", 0.2)
    sender, silent = offering(opened, *"ab"), threading.Event()
    address = opened.enter_context(wire(sender.address, lambda data: None if silent.is_set() else data))
    pulls = pulling(opened, patience=3.0)
    pulls.pull(Handover(*address, "a", 8)).result(SOON)
    silent.set()
    with pytest.raises(TransferError):  # nobody answers the second link: a pull alone would have a minute
        pulls.pull(Handover(*address, "b", 8)).result(SOON)
    assert links == {address: 2} and "b" in sender.offers


def test_no_link_is_left_that_was_made_while_all_was_closed(opened, monkeypatch):
    sender, pulls, greeted, made = offering(opened, "a"), pulling(opened), threading.Event(), list[Receiver]()
    dial = peers.Receiver
    monkeypatch.setattr(
        peers, "Receiver", lambda *given, **how: greeted.wait(SOON) and made.append(dial(*given, **how)) or made[0]
    )
    waits = pulls.pull(Handover(*sender.address, "a", 8))
    assert eventually(waits.running)
    pulls.close()
    greeted.set()
    with pytest.raises(TransferError):
        waits.result(SOON)
    assert eventually(lambda: made[0].failure)


def test_nothing_is_left_of_an_engine_that_is_gone(opened):
    first, second, pulls = offering(opened, "a"), offering(opened, "b"), pulling(opened)
    pulls.pull(Handover(*first.address, "a", 8)).result(SOON)
    gone = pulls._peers[first.address]
    first.close()
    assert eventually(lambda: gone.ended)
    pulls.pull(Handover(*second.address, "b", 8)).result(SOON)
    assert list(pulls._peers) == [second.address]
    assert eventually(lambda: not any(thread.is_alive() for thread in gone._pool._threads))


def test_what_is_asked_for_when_all_is_closed_fails_soon(opened):
    sender = offering(opened)
    address = opened.enter_context(wire(sender.address, stalling(GREETING)))
    pulls = pulling(opened)
    waits = pulls.pull(Handover(*address, "a", 8))
    assert eventually(lambda: pulls._peers[address]._link)
    begin = time.monotonic()
    pulls.close()
    with pytest.raises(TransferError):
        waits.result(SOON)
    assert time.monotonic() - begin < SOON / 2
