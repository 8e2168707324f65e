"""Values that are on their way, in the order in which they will be used."""

import threading

from jaxserve.tiers.tier import Value


class Prefetch:
    """The values of a sequence's first pages, up to the first that is not there. Threads bring them in any order."""

    def __init__(self, count: int):
        self._values: list[Value | None] = [None] * count
        self._come = 0  # values from the first on without a gap
        self._end = count  # the first that is known to be missing
        self._taken = 0  # places that threads have begun with
        self._changed = threading.Condition()

    @property
    def done(self) -> bool:
        """Whether no more will come."""
        return self._come >= self._end

    def values(self) -> list[Value]:
        """Those that have come, from the first on; never waits."""
        with self._changed:
            return [value for value in self._values[: self._come] if value is not None]

    def wait(self, timeout: float | None = None) -> list[Value]:
        """All, or what has come within so many seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self.done, timeout)
        return self.values()

    def cancel(self) -> None:
        """What has not come is not brought any more."""
        with self._changed:
            self._stop(self._come)

    def take(self) -> int | None:
        """The next place to bring a value for; None when no more can be of use."""
        with self._changed:
            if self._taken >= self._end:
                return None
            self._taken += 1
            return self._taken - 1

    def settle(self, index: int, value: Value | None) -> None:
        """The value at a place that was taken, None if there is none."""
        with self._changed:
            if value is None:
                return self._stop(index)
            if index >= self._end:
                return
            self._values[index] = value
            while self._come < self._end and self._values[self._come] is not None:
                self._come += 1
            self._changed.notify_all()

    def _stop(self, index: int) -> None:
        self._end = min(self._end, index)
        del self._values[self._end :]
        self._changed.notify_all()
