"""Who is let in, while others hold connections open and say nothing."""

import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing

import pytest

from jaxserve.parallel.errors import TransferError
from jaxserve.parallel.frames import Frames, dial
from jaxserve.parallel.gates import UNKNOWN, Gate
from tests.waiting import eventually

TOKEN = b"known to all"
SECONDS = 30.0
"""Of a deadline that is not to pass."""


class House:
    """A gate, and those that it has let in."""

    def __init__(self, patience: float):
        self.inside: list[Frames] = []
        self.come = threading.Event()
        self.gate = Gate("127.0.0.1", 0, TOKEN, patience, self._serve, "house")

    def _serve(self, frames: Frames) -> None:
        self.inside.append(frames)
        self.come.set()

    def close(self) -> None:
        self.gate.close()
        for frames in self.inside:
            frames.close()


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def threads() -> int:
    return sum(thread.name == "house" for thread in threading.enumerate())


def knock(opened: ExitStack, house: House, token: bytes = TOKEN) -> Frames:
    frames = opened.enter_context(closing(Frames(dial(house.gate.address, SECONDS), SECONDS)))
    frames.enter(token)
    return frames


def silent(opened: ExitStack, house: House) -> socket.socket:
    return opened.enter_context(socket.create_connection(house.gate.address, timeout=SECONDS))


def ended(connection: socket.socket) -> bool:
    """Waits for the end of a connection."""
    try:
        while connection.recv(1 << 10):
            pass
    except ConnectionResetError:
        pass
    return True


def test_a_storm_of_silent_connections_keeps_nobody_out(opened):
    house = opened.enter_context(closing(House(patience=1000.0)))  # none of them ends by itself
    storm = [silent(opened, house) for _ in range(3 * UNKNOWN)]
    knock(opened, house)
    assert house.come.wait(SECONDS)
    assert all(ended(connection) for connection in storm[:UNKNOWN])
    end = time.monotonic() + SECONDS
    while threads() > UNKNOWN:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_who_is_in_does_not_count_and_stays_whatever_comes(opened):
    house = opened.enter_context(closing(House(patience=SECONDS)))
    guests = [knock(opened, house) for _ in range(UNKNOWN + 3)]
    for _ in range(2 * UNKNOWN):
        silent(opened, house)
    guests.append(knock(opened, house))
    for number, guest in enumerate(guests):
        guest.send(number, {})
    assert sorted(frames.expect().kind for frames in house.inside) == list(range(UNKNOWN + 4))


def test_those_that_say_nothing_are_sent_away_in_time_and_when_it_closes(opened):
    house = opened.enter_context(closing(House(patience=0.1)))
    assert ended(silent(opened, house))
    other = opened.enter_context(closing(House(patience=1000.0)))
    waiting = silent(opened, other)
    while not other.gate._unknown:
        time.sleep(0.01)
    other.gate.close()
    assert other.gate.closed and ended(waiting)
    with pytest.raises(TransferError, match="does not answer"):
        knock(opened, other)


def test_who_has_another_token_is_not_let_in_and_that_is_logged(opened, caplog):
    house = opened.enter_context(closing(House(patience=SECONDS)))
    with caplog.at_level(logging.WARNING), pytest.raises(TransferError, match="has another token"):
        knock(opened, house, b"another")
    wanted = " was not let in: the other end does not know the token"
    assert eventually(lambda: wanted in caplog.text)  # who knocks knows before that
    assert not house.inside
