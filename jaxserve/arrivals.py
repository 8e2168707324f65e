"""Pages that a sequence waits for, because they come from elsewhere. Plain Python: the pages are anything."""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple


class Brought(NamedTuple):
    """Pages of a sequence that have come, one after another; the last may be partly filled."""

    first: int  # pages of the sequence before them
    tokens: int  # of the sequence that are in these pages and all before them
    pages: Any  # a tree of arrays `[k, b, …]` on the host


class Arrival:
    """Pages on their way, or not asked for yet; several sequences may wait for the same."""

    def __init__(self, ask: Callable[[], "Future[Brought | None] | None"]):
        """`ask` sends for them, and doesn't wait; it gives None if that can't be done yet."""
        self._ask = ask
        self._future: Future[Brought | None] | None = None

    def start(self) -> bool:
        """Asks for them, if that was not done yet; whether it is done now."""
        self._future = self._future or self._ask()
        return self._future is not None

    @property
    def done(self) -> bool:
        """Whether they have come, or will not."""
        return self._future is not None and self._future.done()

    def result(self) -> Brought | None:
        """What has come, None if nothing has; raises TransferError if the sequence can't begin without it."""
        assert self._future is not None
        return self._future.result()

    def cancel(self) -> None:
        """Nobody waits for them any more."""
        if self._future is not None:
            self._future.cancel()
