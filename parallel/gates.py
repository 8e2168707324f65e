"""A port at which whoever knows a token is let in; those who say nothing keep nobody out."""

import logging
import socket
import threading
from collections.abc import Callable

from jaxserve.parallel.errors import TransferError
from jaxserve.parallel.frames import TICK, Frames

log = logging.getLogger("jaxserve.parallel")

UNKNOWN = 32
"""Connections at once, each with a thread, that have not shown yet that they know the token."""


class Gate:
    """Listens, and has each connection that knows the token served in a thread of its own.

    While too many are unknown, each that comes ends the one that has been unknown longest: who knows the token shows
    it within a moment, so that who only holds connections open loses them, and the others get in.
    """

    def __init__(
        self, host: str, port: int, token: bytes, patience: float, serve: Callable[[Frames], object], name: str,
        meanwhile: Callable[[], object] = lambda: None,
    ):  # fmt: skip
        """`serve` is given connections that were let in; `name` is that of threads; `meanwhile` is called each tick.

        Port 0 is any that is free. Raises OSError, or OverflowError, if it can't listen there.
        """
        self._token, self._patience, self._serve = token, patience, serve
        self._name, self._meanwhile = name, meanwhile
        self._unknown: dict[Frames, None] = {}  # the longest first
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._listener = socket.create_server((host, port))
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        self._thread = threading.Thread(target=self._listen, name=f"{name} gate", daemon=True)
        self._thread.start()

    @property
    def closed(self) -> bool:
        """Whether nobody is let in any more."""
        return self._closed.is_set()

    def close(self) -> None:
        """Lets nobody in any more; those who are in stay."""
        self._closed.set()
        self._thread.join()
        with self._lock:
            for frames in self._unknown:
                frames.close()

    def _listen(self) -> None:
        self._listener.settimeout(TICK)
        with self._listener:
            while not self._closed.is_set():
                self._meanwhile()
                try:
                    connection, _ = self._listener.accept()
                    self._receive(Frames(connection, self._patience))
                except TimeoutError:
                    continue
                except (OSError, RuntimeError):  # no file or thread is left for it, say, or it has ended already
                    self._closed.wait(TICK)

    def _receive(self, frames: Frames) -> None:
        with self._lock:
            self._unknown[frames] = None
            if len(self._unknown) > UNKNOWN:
                longest = next(iter(self._unknown))
                del self._unknown[longest]
                longest.close()
        threading.Thread(target=self._run, args=[frames], name=self._name, daemon=True).start()

    def _run(self, frames: Frames) -> None:
        try:
            frames.admit(self._token)
        except TransferError as error:
            frames.close()
            if error.kind == "refused":
                log.warning("%s: %s was not let in: %s", self._name, frames.peer, error)
            return
        finally:
            with self._lock:
                self._unknown.pop(frames, None)
        self._serve(frames)
