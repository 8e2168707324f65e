"""Frames over a socket: a kind, a few words as JSON, and bytes. Whoever waits looks at the time while it does.

Both ends know a token, and show it without sending it; what is sent after that is not encrypted.
"""

import hmac
import json
import secrets
import socket
import struct
import threading
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

from jaxserve.parallel.errors import TransferError

TICK = 0.05
"""Seconds after which one that waits looks at the time."""

WORDS = 1 << 20
"""Bytes of JSON in a frame, at most."""

NONCE = 32
HEAD = struct.Struct("!BI")  # the kind, bytes of JSON


class Frame(NamedTuple):
    """What was said; the bytes that belong to it have not been read yet."""

    kind: int
    words: dict[str, Any]


class Frames:
    """An end of a connection. One thread reads; any may write.

    Raises TransferError: `dead` if the other end is gone, or nothing moves for `patience` seconds in the middle of a
    frame, `late` after a deadline that was given, in seconds of `time.monotonic`.
    """

    def __init__(self, connection: socket.socket, patience: float):
        connection.settimeout(TICK)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # who hears nothing for hours may be alone
        self._socket, self.patience = connection, patience
        self.peer = _peer(connection)
        self._writing = threading.Lock()
        self._closed = False
        self.moved = 0  # bytes, both ways

    def send(
        self, kind: int, words: dict[str, Any], body: Iterable[memoryview] = (), wait: float | None = None
    ) -> None:
        """A frame, and the buffers that belong to it; other writers are waited for, `patience` or so many seconds."""
        told = json.dumps(words).encode()
        if len(told) > WORDS:
            raise TransferError(f"{len(told)} bytes of words; a frame may have {WORDS}: send fewer arrays", "refused")
        wait = self.patience if wait is None else wait
        if not self._writing.acquire(timeout=min(wait, threading.TIMEOUT_MAX)):
            raise TransferError("something else has been sent for all this time", "dead")
        try:
            self._push(memoryview(HEAD.pack(kind, len(told)) + told))
            for each in body:
                self._push(each)
        finally:
            self._writing.release()

    def receive(self) -> Frame | None:
        """The next frame; None if none begins within a tick."""
        head = bytearray(HEAD.size)
        try:
            count = self._read(memoryview(head))
        except TimeoutError:
            return None
        self.fill(memoryview(head)[count:])
        kind, size = HEAD.unpack(head)
        if size > WORDS:
            raise TransferError(f"a frame has {size} bytes of words; it may have {WORDS}", "dead")
        told = bytearray(size)
        self.fill(memoryview(told))
        try:
            return Frame(kind, json.loads(told))
        except ValueError:
            raise TransferError("a frame's words are no JSON", "dead") from None

    def expect(self) -> Frame:
        """The next frame."""
        since = time.monotonic()
        while (frame := self.receive()) is None:
            self._check(since)
        return frame

    def fill(self, view: memoryview, deadline: float = float("inf")) -> None:
        """Reads as many bytes as the view has."""
        since = time.monotonic()
        while view:
            try:
                view = view[self._read(view) :]
                since = time.monotonic()
            except TimeoutError:
                self._check(since)
            if view and time.monotonic() > deadline:
                raise TransferError("the rest of what was asked for did not come in time", "late")

    def close(self) -> None:
        """Ends the connection; whoever reads or writes is told."""
        self._closed = True
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the other end has gone
        self._socket.close()

    def _read(self, view: memoryview) -> int:
        try:
            count = self._socket.recv_into(view)
        except TimeoutError:
            raise
        except OSError as error:
            raise self._broken(error) from error
        if not count:
            raise self._broken("the other end has closed it")
        self.moved += count
        return count

    def _push(self, view: memoryview) -> None:
        since = time.monotonic()
        while view:
            try:
                count = self._socket.send(view)
            except TimeoutError:
                self._check(since)
                continue
            except OSError as error:
                raise self._broken(error) from error
            view, since = view[count:], time.monotonic()
            self.moved += count

    def _broken(self, why: object) -> TransferError:
        return TransferError(f"the link has ended: {'this end has closed it' if self._closed else why}", "dead")

    def _check(self, since: float) -> None:
        if time.monotonic() - since > self.patience:
            raise TransferError(f"nothing has moved for {self.patience} s", "dead")

    # Each end proves that it knows the token, by a code of what the other has just drawn.

    def admit(self, token: bytes) -> None:
        """Lets the other end in. Raises TransferError, `refused`, if it doesn't know the token."""
        mine, theirs, proof = secrets.token_bytes(NONCE), bytearray(NONCE), bytearray(NONCE)
        self._push(memoryview(mine))
        self.fill(memoryview(theirs))
        self.fill(memoryview(proof))
        if not hmac.compare_digest(proof, _proof(token, b"receiver", mine, theirs)):
            raise TransferError("the other end does not know the token", "refused")
        self._push(memoryview(_proof(token, b"sender", mine, theirs)))

    def enter(self, token: bytes) -> None:
        """Asks to be let in. Raises TransferError, `refused`, if the two don't know the same token."""
        mine, theirs, proof = secrets.token_bytes(NONCE), bytearray(NONCE), bytearray(NONCE)
        self.fill(memoryview(theirs))
        self._push(memoryview(mine + _proof(token, b"receiver", theirs, mine)))
        try:
            self.fill(memoryview(proof))
        except TransferError as error:
            raise TransferError(f"the sender lets nobody in who has another token: {error}", "refused") from error
        if not hmac.compare_digest(proof, _proof(token, b"sender", theirs, mine)):
            raise TransferError("the sender does not know the token", "refused")


def _peer(connection: socket.socket) -> str:
    try:
        return ":".join(map(str, connection.getpeername()[:2]))
    except OSError:  # it has gone already
        return "somebody"


def dial(address: tuple[str, int], patience: float) -> socket.socket:
    """A connection. Raises TransferError, `dead`, if nobody answers there."""
    try:
        return socket.create_connection(address, timeout=patience)
    except OSError as error:
        raise TransferError(f"{address[0]}:{address[1]} does not answer: {error}", "dead") from error


def _proof(token: bytes, role: bytes, first: bytes | bytearray, second: bytes | bytearray) -> bytes:
    return hmac.digest(token, role + first + second, "sha256")
