import io
import sys

import pytest

from jaxserve.progress import amount, bar, lines


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("screen", "shown"), [(Terminal(), True), (io.StringIO(), False)], ids=["terminal", "file"])
def test_a_terminal_sees_each_stage_and_a_file_nothing(monkeypatch, screen, shown):
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    with bar() as progress:
        progress("loading", 2**20, 3 * 2**20)
        progress("compiling", 2, 7)
    assert ("compiling" in screen.getvalue() and "2 of 7 programs" in screen.getvalue()) == shown
    assert bool(screen.getvalue()) == shown


def test_what_takes_long_is_told_in_lines_now_and_then():
    told, clock = [], [0.0]
    show = lines(told.append, 10.0, lambda: clock[0])
    for second in range(0, 31, 3):
        clock[0] = float(second)
        show("loading" if second < 15 else "compiling", second, 30)
    assert told == ["loading: 0 of 0 MiB", "compiling: 24 of 30 programs"]


def test_amounts_have_the_unit_of_their_stage():
    assert amount("loading", 1536 * 2**10, 2**32) == "2 of 4,096 MiB"
    assert amount("compiling", 0, 7) == "0 of 7 programs"
    assert amount("scoring", 3, 20) == "3 of 20 items"
