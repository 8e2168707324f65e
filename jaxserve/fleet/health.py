"""Whether an instance is well, by what is heard of it: one that is hung still speaks, one that is slow gets on."""

from typing import Literal, NamedTuple

Health = Literal["healthy", "slow", "hung", "dead"]

QUIET = 0.5
"""Share of `dead_after`; who is silent for so long may be lost."""


class Patience(NamedTuple):
    """Seconds after which an instance is thought to be in trouble."""

    slow_after: float = 2.0  # at work, and its loop hasn't turned: it is slow, and gets on with what it has
    hung_after: float = 60.0  # likewise: it won't turn again
    dead_after: float = 5.0  # nothing was heard of it


class Vital:
    """What was heard of one instance, and when. Times are of any clock that doesn't go back."""

    def __init__(self, now: float):
        self.heard_at = self.turned_at = now
        self._beat = 0

    def hear(self, now: float, beat: int, busy: bool) -> None:
        """It has said how often its loop has turned, and whether it is at work: one that is idle need not turn."""
        self.heard_at = now
        if beat != self._beat or not busy:
            self._beat, self.turned_at = beat, now

    def doubtful(self, now: float, patience: Patience) -> bool:
        """Whether what is given to it may wait: it is slow at least, or silent."""
        return self.health(now, patience) != "healthy" or now - self.heard_at > QUIET * patience.dead_after

    def health(self, now: float, patience: Patience) -> Health:
        """How it is. While nothing is heard of it, it isn't known whether its loop turns."""
        if now - self.heard_at > patience.dead_after:
            return "dead"
        still = self.heard_at - self.turned_at
        return "hung" if still > patience.hung_after else "slow" if still > patience.slow_after else "healthy"
