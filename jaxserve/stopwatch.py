"""How fast an answer came, and what memory it took."""

import resource
import sys
import time
from collections.abc import Callable

import jax

from jaxserve.serving import Memory


class Stopwatch:
    """Counts the tokens of an answer; starts when it is made."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        """`clock` tells the time in seconds."""
        self.tokens = 0
        self._clock = clock
        self._start = self._first = self._last = clock()
        self._at_first = 0  # tokens that came first, together

    def count(self, tokens: int) -> None:
        """Notes that tokens have come; text may come without."""
        if not tokens:
            return
        self._last = self._clock()
        if not self.tokens:
            self._first, self._at_first = self._last, tokens
        self.tokens += tokens

    def speed(self) -> str:
        """Tokens, time to the first, tokens per second after it; each only if there is such a thing."""
        facts = [f"{self.tokens} tokens"]
        if self.tokens:
            facts.append(f"first after {self._first - self._start:.2f} s")
        if self._last > self._first:
            facts.append(f"then {(self.tokens - self._at_first) / (self._last - self._first):.1f} tokens/s")
        return " | ".join(facts)

    def summary(self, memory: Memory) -> str:
        """Speed and memory."""
        took = f"{mebibytes(memory.weights)} weights, {mebibytes(memory.cache)} cache, {mebibytes(peak_bytes())} in all"
        return f"{self.speed()} | {took}"


def peak_bytes() -> int:
    """The most memory used so far: of the device, or on CPU of the process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def mebibytes(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"
