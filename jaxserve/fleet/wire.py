"""What the router and an instance say to each other, and how that travels."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from numbers import Integral, Real
from queue import Empty, SimpleQueue
from typing import Any

import msgspec

from jaxserve.fleet.instance import About, Gone, Refused, Said, Signs
from jaxserve.parallel.errors import RequestError, TransferError
from jaxserve.parallel.frames import Frames
from jaxserve.request import Request

MOST = 1 << 28
"""Bytes of a message."""


class Hello(msgspec.Struct, tag=True, frozen=True):
    """The instance's first word."""

    about: About
    signs: Signs


class Knock(msgspec.Struct, tag=True, frozen=True):
    """Of an instance that isn't there yet, and wants to know whether it will be let in: Alive, or Refused."""

    max_model_len: int | None  # None: the model's own


class Welcome(msgspec.Struct, tag=True, frozen=True):
    """The router's answer: the instance has joined; both give signs so often, and are lost without any for so long."""

    period: float  # seconds
    dead_after: float  # seconds


class Add(msgspec.Struct, tag=True, frozen=True):
    """A task."""

    request: Request


class Abort(msgspec.Struct, tag=True, frozen=True):
    """Nobody wants to know of a task any more; of one that is done, nobody will fetch the pages."""

    task: str


class Pulse(msgspec.Struct, tag=True, frozen=True):
    """The instance's heartbeat."""

    signs: Signs


class Alive(msgspec.Struct, tag=True, frozen=True):
    """The router's heartbeat."""


class Leave(msgspec.Struct, tag=True, frozen=True):
    """The instance will finish what it has; and the router's answer: nothing more comes."""


Message = Hello | Knock | Welcome | Add | Abort | Pulse | Alive | Leave | Said | Refused | Gone


def encode(message: Message) -> bytes:
    """MessagePack, not JSON: log-probabilities may be NaN. Raises RequestError for what has no place in it."""
    try:
        return _encoder.encode(message)
    except UnicodeEncodeError as error:
        raise RequestError(f"the request has text that can't be written as UTF-8: {error}") from None
    except (OverflowError, TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"the request can't be sent to an instance: {error}") from None


def decode(data: bytes | bytearray) -> Message:
    """Raises TransferError, `dead`, if it is none."""
    try:
        return _decoder.decode(data)
    except msgspec.DecodeError as error:
        raise TransferError(f"the other end makes no sense: {error}", "dead") from None


def _plain(value: Any) -> Any:
    """NumPy's numbers, and lists and dicts of other kinds."""
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence):
        return list(value)
    raise RequestError(f"a request has {value!r}, which can't be sent to an instance; give plain numbers and lists")


_encoder, _decoder = msgspec.msgpack.Encoder(enc_hook=_plain), msgspec.msgpack.Decoder(Message)


def send(frames: Frames, message: Message) -> None:
    """Waits until it is on its way. Raises RequestError if it can't be sent, TransferError if the line has ended."""
    _send(frames, encode(message))


def _send(frames: Frames, data: bytes) -> None:
    frames.send(0, {"size": len(data)}, [memoryview(data)])


def receive(frames: Frames) -> Message | None:
    """The next message; None if none begins for a moment."""
    frame = frames.receive()
    if frame is None:
        return None
    size = frame.words.get("size") if isinstance(frame.words, dict) else None
    if not isinstance(size, int) or not 0 <= size <= MOST:
        raise TransferError(f"a message has {size!r} bytes; it may have {MOST}", "dead")
    data = bytearray(size)
    frames.fill(memoryview(data))
    return decode(data)


def expect(frames: Frames, patience: float) -> Message:
    """The next message. Raises TransferError, `dead`, if none comes for so many seconds."""
    end = time.monotonic() + patience
    while (message := receive(frames)) is None:
        if time.monotonic() > end:
            raise TransferError(f"the other end has said nothing for {patience:g} s", "dead")
    return message


class Line:
    """A connection on which both ends say something; neither waits for the other.

    What is to be said is sent by a thread of its own; that also says what `pulse` gives, once in each period.
    """

    def __init__(self, frames: Frames, pulse: Callable[[], Message], period: float, dead_after: float = float("inf")):
        """Times are in seconds; the line ends if nothing is heard for `dead_after`, be it amid a message."""
        self._frames, self._pulse, self._period, self._dead_after = frames, pulse, period, dead_after
        frames.patience = dead_after
        self._outbox: SimpleQueue[bytes | None] = SimpleQueue()

    def say(self, message: Message) -> None:
        """Any thread may; after the end nobody hears it. Raises RequestError if it can't be sent."""
        self._outbox.put(encode(message))

    def run(self, hear: Callable[[Message], object]) -> TransferError:
        """Hears the other end until one of the two ends the line; gives the reason."""
        threading.Thread(target=self._write, name="fleet line", daemon=True).start()
        heard = time.monotonic()
        try:
            while True:
                message = receive(self._frames)
                if message is not None:
                    hear(message)
                    heard = time.monotonic()
                elif time.monotonic() - heard > self._dead_after:
                    return self._silent
        except TransferError as error:
            return self._silent if time.monotonic() - heard > self._dead_after else error
        finally:
            self.cut()

    @property
    def _silent(self) -> TransferError:
        return TransferError(f"nothing was heard of it for {self._dead_after:g} s", "dead")

    def close(self) -> None:
        """Ends it when what was said before is sent."""
        self._outbox.put(None)

    def cut(self) -> None:
        """Ends it now."""
        self._outbox.put(None)
        self._frames.close()

    def _write(self) -> None:
        due = time.monotonic() + self._period
        try:
            while True:
                with suppress(Empty):
                    data = self._outbox.get(timeout=max(0.0, due - time.monotonic()))
                    if data is None:
                        return
                    _send(self._frames, data)
                if time.monotonic() >= due:
                    due = time.monotonic() + self._period
                    send(self._frames, self._pulse())
        except TransferError:
            pass  # whoever hears will notice
        finally:
            self._frames.close()
