"""Processes of a fleet."""

import os
import queue
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SOON = 60.0
"""Seconds in which what should happen has happened."""
START_UP = 300.0
"""Seconds to load, compile and be ready, on a busy machine."""
MAIN = "\nfrom jaxserve.cli.main import main\nmain()"


class Process:
    """A command; what it says on standard error is kept."""

    def __init__(self, *arguments: str, plant: str = "", **environment: str):
        self.process = subprocess.Popen(
            [sys.executable, "-c", plant + MAIN, *arguments],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"NO_COLOR": "1", "COLUMNS": "120", "JAXSERVE_FLEET_TOKEN": "of the test"} | environment,
        )
        self.lines: list[str] = []
        self._come: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self.lines.append(line.rstrip())
            self._come.put(line)
        self._come.put(None)

    def find(self, pattern: str) -> str:
        """What stands in the group of a pattern, in the next line that has it."""
        while (line := self._come.get(timeout=START_UP)) is not None:
            if found := re.search(pattern, line):
                return found[1]
        raise AssertionError("\n".join(self.lines))

    def status(self) -> int:
        """Its exit status, when it has ended."""
        status = self.process.wait(SOON)
        self._reader.join(SOON)
        return status


@contextmanager
def process(*arguments: str, plant: str = "", **environment: str) -> Iterator[Process]:
    started = Process(*arguments, plant=plant, **environment)
    try:
        yield started
    finally:
        started.process.kill()
        started.status()
        assert started.process.stderr
        started.process.stderr.close()
