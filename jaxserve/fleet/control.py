"""Where instances of other processes join a fleet."""

import logging
import time

import msgspec

from jaxserve.fleet.fleet import Fleet
from jaxserve.fleet.instance import Event, Gone, Hear, Refused, Signs
from jaxserve.fleet.wire import Abort, Add, Alive, Hello, Knock, Leave, Line, Message, Pulse, Welcome, expect, send
from jaxserve.parallel.errors import RequestError, TransferError
from jaxserve.parallel.frames import Frames
from jaxserve.parallel.gates import Gate
from jaxserve.request import Request

log = logging.getLogger("jaxserve.fleet")

PATIENCE = 10.0
"""Seconds in which something must move on a connection that is in the middle of something."""


class Remote:
    """An instance of another process."""

    def __init__(self, hello: Hello, frames: Frames, welcome: Welcome):
        self.about, self.signs, self.draining = hello.about, _now(hello.signs), False
        self._line, self._welcome = Line(frames, Alive, welcome.period), welcome
        self._hear: Hear = lambda event: None

    def begin(self, hear: Hear) -> None:
        self._hear = hear
        self._line.say(self._welcome)

    def add(self, request: Request) -> None:
        try:
            self._line.say(Add(request))
        except RequestError as error:
            self._hear(Refused(request.id, str(error)))

    def abort(self, task: str) -> None:
        self._line.say(Abort(task))

    def close(self) -> None:
        self._line.cut()

    def run(self) -> None:
        """Hears it until the connection ends."""
        reason = self._line.run(self._take)
        self._hear(Gone(str(reason)))

    def _take(self, message: Message) -> None:
        match message:
            case Pulse():
                self.signs = _now(message.signs)
            case Leave():
                log.info("%s finishes what it has, and leaves", self.about.name)
                self.draining = True
                self._line.say(Leave())
            case _ if isinstance(message, Event):
                self._hear(message)


class Control:
    """Listens for instances that know the token."""

    def __init__(self, fleet: Fleet, token: bytes, *, host: str = "127.0.0.1", port: int = 0, period: float = 0.5):
        """Port 0 is any that is free; both ends give signs once in a `period`, in seconds.

        Raises RequestError if it can't listen there, or instances would be lost between two signs.
        """
        dead_after = fleet.options.patience.dead_after
        if not 0 < period < dead_after:
            raise RequestError(f"period = {period:g}: it must be above 0, and below dead_after, {dead_after:g}")
        self._fleet, self._period = fleet, period
        try:
            self._gate = Gate(host, port, token, PATIENCE, self._serve, "fleet instance", fleet.look_after)
        except (OSError, OverflowError) as error:
            raise RequestError(f"can't listen at {host}, port {port}: {error}; choose another --control-port") from None
        self.address = self._gate.address

    def close(self) -> None:
        """Lets nobody in any more; those that have joined stay."""
        self._gate.close()

    def _serve(self, frames: Frames) -> None:
        try:
            first = expect(frames, PATIENCE)
            if isinstance(first, Knock):
                send(frames, self._answer(first))
                frames.close()
                return
            remote = self._welcome(first, frames)
            if self._gate.closed:  # since then; whoever closes the fleet may have missed it
                remote.close()
            remote.run()
        except (RequestError, TransferError) as error:
            log.warning("an instance was not let in: %s", error)
            frames.close()

    def _answer(self, knock: Knock) -> Alive | Refused:
        reason = self._fleet.members.unlike(knock.max_model_len) if knock.max_model_len else None
        return Refused("", reason) if reason else Alive()

    def _welcome(self, hello: Message, frames: Frames) -> Remote:
        if not isinstance(hello, Hello):
            raise TransferError(f"it begins with {type(hello).__name__}, not with Hello", "refused")
        remote = Remote(hello, frames, Welcome(self._period, self._fleet.options.patience.dead_after))
        try:
            self._fleet.join(remote)
        except RequestError as error:
            send(frames, Refused("", str(error)))
            raise
        return remote


def _now(signs: Signs) -> Signs:
    return msgspec.structs.replace(signs, at=time.monotonic())
