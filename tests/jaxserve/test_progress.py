import io
import sys

import pytest

from jaxserve.progress import amount, bar


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


def test_amounts_have_the_unit_of_their_stage():
    assert amount("loading", 1536 * 2**10, 2**32) == "2 of 4,096 MiB"
    assert amount("compiling", 0, 7) == "0 of 7 programs"
    assert amount("scoring", 3, 20) == "3 of 20 items"
