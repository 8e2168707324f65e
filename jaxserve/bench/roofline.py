"""What was measured beside what the machine could do: shares of the roofline, as rows and as JSON."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxserve.bench.costs import Cost, bound, ideal_seconds
from jaxserve.bench.limits import Limits


class Point(NamedTuple):
    """Something that was run several times, and the least that it costs."""

    name: str
    seconds: Sequence[float]
    cost: Cost

    @property
    def median(self) -> float:
        """Seconds."""
        return float(np.median(self.seconds))

    def share(self, limits: Limits) -> float:
        """Of the roofline: 1 is as fast as the machine allows."""
        return ideal_seconds(self.cost, limits) / self.median


def percentiles(seconds: Sequence[float]) -> tuple[float, float, float]:
    """The median, and what a tenth is below and above."""
    low, middle, high = np.percentile(seconds, [10, 50, 90]).tolist()
    return middle, low, high


def milliseconds(seconds: Sequence[float]) -> tuple[str, str]:
    """The median, and the spread."""
    middle, low, high = (short(1000 * value) for value in percentiles(seconds))
    return middle, f"{low}-{high}"


def short(value: float) -> str:
    """A number in few digits, so that rows of many fit into a narrow terminal."""
    return f"{value:,.{0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2}f}"


def head(name: str, *columns: str) -> tuple[str, ...]:
    """The head of a table whose rows are those of `row`."""
    return name, "ms", "p10-p90", *columns, "MB", "GFLOP", "roofline", "limit"


def row(point: Point, limits: Limits, *columns: str) -> tuple[str, ...]:
    """A point's time, what it costs at least, its share of the roofline, and what that is made of."""
    cost = short(point.cost.bytes / 1e6), short(sum(point.cost.operations.values()) / 1e9)
    share = f"{point.share(limits):.1%}", bound(point.cost, limits)
    return point.name, *milliseconds(point.seconds), *columns, *cost, *share


def limit_line(limits: Limits) -> str:
    """The machine's limits, in a line."""
    peaks = ", ".join(f"{kind} {value / 1e9:,.0f}" for kind, value in limits.peaks.items())
    return f"this machine reads {limits.bandwidth / 1e9:,.1f} GB/s; GFLOP/s: {peaks}"


def as_json(point: Point, limits: Limits) -> dict[str, Any]:
    """All numbers: seconds, bytes, operations."""
    middle, low, high = percentiles(point.seconds)
    return {
        "name": point.name,
        "seconds": list(point.seconds),
        "median": middle,
        "p10": low,
        "p90": high,
        "bytes": point.cost.bytes,
        "operations": dict(point.cost.operations),
        "ideal_seconds": ideal_seconds(point.cost, limits),
        "limit": bound(point.cost, limits),
        "share": point.share(limits),
    }
