"""How fast an answer came, and what memory it took."""

import resource
import sys
import time

import jax

from jaxserve.llm import LLM


class Stopwatch:
    """Counts the tokens of an answer; starts when it is made."""

    def __init__(self):
        self._start = time.perf_counter()
        self._first: float | None = None
        self._last = self._start
        self._tokens = 0

    def count(self, tokens: int) -> None:
        """Notes that tokens have come."""
        self._last = time.perf_counter()
        if self._first is None and tokens:
            self._first = self._last
        self._tokens += tokens

    def summary(self, llm: LLM) -> str:
        """Time to first token, tokens per second after it, and memory."""
        first = (self._first or self._last) - self._start
        rate = (self._tokens - 1) / (self._last - self._start - first) if self._tokens > 1 else 0.0
        return (
            f"{self._tokens} tokens | first after {first:.2f} s | then {rate:.1f} tokens/s | "
            f"{mebibytes(llm.engine.weight_bytes)} weights, {mebibytes(llm.engine.cache_bytes)} cache, "
            f"{mebibytes(peak_bytes())} in all"
        )


def peak_bytes() -> int:
    """The most memory used so far: of the device, or on CPU of the process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def mebibytes(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"
