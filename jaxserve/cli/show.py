"""What commands write: notes on standard error, progress, tables."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

notes = Console(stderr=True, markup=False, emoji=False, highlight=False)


def progress() -> Any:
    """Bars for what takes long, as a context; where there is no terminal, a line now and then."""
    from jaxserve.progress import bar, lines

    return bar() if notes.is_terminal else nullcontext(lines(lambda line: notes.print(line, soft_wrap=True)))


def print_table(
    title: str, rows: Sequence[tuple[str, ...]], justify: Literal["left", "right"], head: tuple[str, ...] = ("", "")
) -> None:
    """Names and values; what is too wide for the terminal goes on in the next line."""
    console = Console(markup=False, emoji=False, highlight=False)
    table = Table(show_header=any(head), box=None, padding=(0, 0, 0, 2), header_style="dim")
    table.add_column(head[0], overflow="fold")
    for name in head[1:]:
        table.add_column(name, justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(title, style="bold", soft_wrap=True)
    console.print(table, "")
