"""Pictures: of a load, how latencies lie and what ran when; of a machine's roofline, and what runs below it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxserve.bench.load import Record
from jaxserve.bench.report import NAMES, every
from jaxserve.parallel.errors import RequestError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from jaxserve.bench.limits import Limits
    from jaxserve.bench.roofline import Point

RUNNING, WAITING, GOAL = "#4c8dbf", "#f0b440", "#c8501e"  # told apart by the colour-blind too

FEW = 6
"""Points up to which each has its name beside it, and not in a list."""


def check(path: Path) -> None:
    """Raises RequestError if there could be no picture at `path`: told before the load, not after it."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise RequestError(
            "--plot needs matplotlib, which is not installed; `pip install 'jaxserve[plot]'` brings it"
        ) from None
    if path.suffix.lstrip(".") not in FigureCanvasBase.get_supported_filetypes():
        raise RequestError(f"--plot {path}: it must end in .png or .svg")


def save(path: Path, title: str, records: Sequence[Record], bounds: Mapping[str, float]) -> None:
    """Draws the distributions of three latencies over a timeline of requests."""
    from matplotlib.figure import Figure

    answered = [record for record in records if record.failure is None]
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    grid = figure.add_gridspec(2, 3, height_ratios=(1.2, 1))
    figure.suptitle(title, x=0.012, ha="left", fontsize=11, fontweight="bold")
    for place, name in enumerate(("ttft", "itl", "e2e")):
        _distribution(figure.add_subplot(grid[0, place]), name, every(answered)[name], bounds.get(name))
    _timeline(figure.add_subplot(grid[1, :]), records)
    figure.savefig(path, dpi=150)


def _distribution(axes: "Axes", name: str, seconds: Sequence[float], bound: float | None) -> None:
    """Which share of all is at most so slow."""
    _tidy(axes, NAMES[name], "ms", "share of all, %" if name == "ttft" else "")
    if not len(seconds):
        axes.text(0.5, 0.5, "none", ha="center", transform=axes.transAxes, color="0.5")
        return
    values = 1000 * np.sort(seconds)
    axes.step([0, *values], [0, *(100 * np.arange(1, len(values) + 1) / len(values))], where="post", color=RUNNING)
    for share in (50, 90, 99):
        value = float(np.percentile(values, share))
        axes.plot(value, share, "o", color=RUNNING, markersize=4)
        axes.annotate(
            f"p{share}  {value:,.1f}", (value, share), (7, -9), textcoords="offset points", fontsize=8, color="0.25"
        )
    if bound is not None:
        axes.axvline(1000 * bound, color=GOAL, linestyle="--", linewidth=1, label=f"goal, {1000 * bound:g} ms")
        axes.legend(loc="lower right", framealpha=1, edgecolor="white", fontsize=8)
    axes.set_xlim(0, 1.35 * max(values[-1] if len(values) < 100 else np.percentile(values, 99), 1000 * (bound or 0)))
    axes.set_ylim(0, 104)


def _timeline(axes: "Axes", records: Sequence[Record]) -> None:
    """How many requests were with the server, and on top of them those that were due and not sent yet."""
    _tidy(axes, "requests", "seconds after the start", "")
    layers = [("with the server", RUNNING, [(record.sent, record.end) for record in records])]
    if any(record.sent - record.due > 0.01 for record in records):
        layers.insert(0, ("due, not sent yet", WAITING, [(record.due, record.end) for record in records]))
    for label, color, spans in layers:  # what is with the server is drawn over all that is due
        axes.fill_between(*occupancy(spans), step="post", color=color, label=label, linewidth=0)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, fontsize=8, reverse=True)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)


def occupancy(spans: Sequence[tuple[float, float]]) -> tuple[list[float], list[int]]:
    """The times at which the number of open spans changes, and that number from then on."""
    edges = np.array([(begin, 1) for begin, _ in spans] + [(end, -1) for _, end in spans]).reshape(-1, 2)
    times, places = np.unique(edges[:, 0], return_inverse=True)
    changes = np.bincount(places, edges[:, 1], len(times))
    return [0.0, *times.tolist()], [0, *np.cumsum(changes).astype(int).tolist()]


def roofline(path: Path, title: str, points: "Sequence[Point]", limits: "Limits", unit: str) -> None:
    """Draws points below the machine's roofs: operations a byte against operations a second, both logarithmic.

    `unit` is what the points' names count.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    colors = colormaps["tab20"]
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    _tidy(axes, title, "operations a byte", "operations a second")
    axes.set_xscale("log")
    axes.set_yscale("log")
    ridges = [peak / limits.bandwidth for peak in limits.peaks.values()]
    found = [point.cost.intensity for point in points]
    span = np.array([min([0.3, *(0.5 * x for x in found)]), 4 * max([*ridges, *found])])
    for (kind, peak), ridge in zip(limits.peaks.items(), ridges, strict=True):
        axes.plot([ridge, span[1]], [peak, peak], color=WAITING, linewidth=1.5)
        axes.annotate(f"{kind}, {peak / 1e9:,.0f} GFLOP/s", (span[1], peak), (-2, 3), ha="right", **_SMALL)
    slope = np.array([span[0], max(ridges)])
    axes.plot(slope, slope * limits.bandwidth, color=WAITING, linewidth=1.5)
    axes.annotate(
        f"{limits.bandwidth / 1e9:,.1f} GB/s", (span[0], span[0] * limits.bandwidth), (6, 0), va="center", **_SMALL
    )
    several = len(points) > FEW
    for number, point in enumerate(points):
        speed = sum(point.cost.operations.values()) / point.median
        label = f"{point.name} {unit}".rstrip() + f": {point.share(limits):.0%}"
        color = colors(number % colors.N) if several else RUNNING
        axes.plot(point.cost.intensity, speed, "o", color=color, markersize=6, label=label)
        if not several:
            axes.annotate(label, (point.cost.intensity, speed), (7, -9), **_SMALL)
    if several:
        figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


_SMALL: Any = {"textcoords": "offset points", "fontsize": 8, "color": "0.25"}


def _tidy(axes: "Axes", title: str, below: str, beside: str) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(below, fontsize=9)
    axes.set_ylabel(beside, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
