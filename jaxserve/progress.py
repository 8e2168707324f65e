"""How far long work is, as a bar on the terminal, or in lines."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[str, int, int], None]
"""Told what goes on, how much of it is done, and how much there is.

"loading" is in bytes, "compiling" in programs, "scoring" in items, "quantizing" in layers, "warming up" and "asking" in
requests, "limits" and "measuring" in runs.
"""

_UNITS = {
    "compiling": "programs",
    "scoring": "items",
    "quantizing": "layers",
    "warming up": "requests",
    "asking": "requests",
    "limits": "runs",
    "measuring": "runs",
}


@contextmanager
def bar() -> Iterator[Progress]:
    """A bar on standard error for as long as the block runs; none if that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[amount]}"), TimeElapsedColumn())
    console = Console(stderr=True)
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as shown:
        task = shown.add_task("loading", total=None, amount="")

        def show(stage: str, done: int, total: int) -> None:
            shown.update(task, description=stage, completed=done, total=total, amount=amount(stage, done, total))

        yield show


def lines(
    tell: Callable[[str], object], seconds: float = 10.0, clock: Callable[[], float] = time.monotonic
) -> Progress:
    """A line about what has taken so many seconds, and another each time that it has taken as many more."""
    told = clock()

    def show(stage: str, done: int, total: int) -> None:
        nonlocal told
        if clock() - told >= seconds:
            told = clock()
            tell(f"{stage}: {amount(stage, done, total)}")

    return show


def amount(stage: str, done: int, total: int) -> str:
    """So much of so much, in the stage's unit."""
    if stage == "loading":
        return f"{done / 2**20:,.0f} of {total / 2**20:,.0f} MiB"
    return f"{done} of {total} {_UNITS[stage]}"
