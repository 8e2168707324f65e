"""Streams on their way to clients that don't take them."""

import asyncio
from collections.abc import AsyncIterator

from jaxserve.server.answering import EventStream

SCOPE = {"type": "http"}


async def events() -> AsyncIterator[bytes]:
    while True:
        yield b"data: more\n\n"
        await asyncio.sleep(0)


async def send_to(send, receive, seconds: float) -> int:
    """How often what a stream holds was let go, when it has ended."""
    let_go: list[str] = []
    stream = EventStream(events(), asyncio.get_running_loop().time() + seconds)
    stream.resources.callback(let_go.append, "resources")
    await asyncio.wait_for(stream(SCOPE, receive, send), 60)
    return len(let_go)


async def never(*_) -> dict:
    await asyncio.Event().wait()
    raise AssertionError


async def at_once(*_) -> dict:
    return {"type": "http.disconnect"}


async def broken(*_) -> None:
    raise OSError("the connection is lost")


async def taken(message) -> None: ...


def test_a_client_that_does_not_read_holds_a_stream_no_longer_than_its_time():
    assert asyncio.run(send_to(never, never, 0.1)) == 1


def test_a_client_that_reads_for_ever_is_sent_no_more_than_its_time():
    assert asyncio.run(send_to(taken, never, 0.1)) == 1


def test_a_client_that_goes_away_ends_its_stream():
    assert asyncio.run(send_to(taken, at_once, 60)) == 1
    assert asyncio.run(send_to(broken, never, 60)) == 1
