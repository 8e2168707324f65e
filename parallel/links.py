"""A link between two ranks: a connection and a thread at each end, shared with no other pair."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

from jaxserve.parallel.errors import TransferError
from jaxserve.parallel.frames import Frame, Frames

Health = Literal["ready", "full", "busy", "dead"]
"""What a probe finds: the other end has room; answers, and has none; is sent to or sends; does none of it."""


class Kind(IntEnum):
    """Of frames."""

    HELLO = 0  # the receiver: its name, and how bytes are to travel
    PING = 1
    PONG = 2  # how much room there is
    PULL = 3  # the name of an offer, shapes and dtypes, in how many seconds it must have come
    PAGES = 4  # bytes follow
    REFUSED = 5  # why, and of which kind
    TAKEN = 6
    DAMAGED = 7


@dataclass
class Counts:
    """What one end of a link has moved."""

    pulls: int = 0  # that were complete and unharmed
    nbytes: int = 0  # in these
    damaged: int = 0
    refused: int = 0


class End:
    """One end of a link. What its kind of end does with frames is in `_hear`; what it holds for others, in `_end`."""

    def __init__(self, frames: Frames, peer: str, room: Callable[[], int]):
        """`room` says how much more this end can take now, in any unit; 0: it is full."""
        self.peer, self.counts, self.failure = peer, Counts(), None
        self._frames, self._room = frames, room
        self._probing, self._answered, self._their_room = threading.Lock(), threading.Event(), 0

    def run(self) -> None:
        """Hears the other end until one of the two closes the link."""
        try:
            while True:
                frame = self._frames.receive()
                if frame is None:
                    self._tick()
                elif frame.kind == Kind.PING:
                    self._frames.send(Kind.PONG, {"room": self._room()})
                elif frame.kind == Kind.PONG:
                    self._their_room = frame.words["room"]
                    self._answered.set()
                else:
                    self._hear(frame)
        except Exception as error:  # whoever waits for this end must be told, whatever it was
            self.failure = _without_frames(error)
            self._frames.close()
            self._end(self.failure)

    def probe(self, timeout: float) -> Health:
        """How the other end is; says so within about `timeout` seconds."""
        with self._probing:
            moved = self._frames.moved
            self._answered.clear()
            try:
                self._frames.send(Kind.PING, {}, wait=timeout)
                moved = self._frames.moved
                answered = self._answered.wait(timeout)
            except TransferError:
                answered = False
        if answered:
            return "ready" if self._their_room > 0 else "full"
        return "busy" if self.failure is None and self._frames.moved > moved else "dead"

    def close(self) -> None:
        """Ends the link; what was asked for will not come."""
        self._frames.close()

    def _tick(self) -> None:
        """Looks at the time, when the other end has nothing to say; raises TransferError if it should have had."""
        raise NotImplementedError

    def _hear(self, frame: Frame) -> None:
        """Does what the other end asks for."""
        raise NotImplementedError

    def _end(self, error: TransferError) -> None:
        """Tells whoever waits for this end, and lets go of what it holds for the other."""
        raise NotImplementedError


def _without_frames(error: Exception) -> TransferError:
    """What went wrong, without the calls that it went through: what they were sending would be kept with them."""
    if isinstance(error, TransferError):
        return TransferError(str(error), error.kind)
    return TransferError(f"the other end of the link makes no sense: {error!r}", "dead")
