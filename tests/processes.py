"""Processes that tests start."""

import os
import queue
import random
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from tests.waiting import SOON

START_UP = 300.0
"""Seconds to load, compile and be ready, on a busy machine."""
MAIN = "\nfrom jaxserve.cli.main import main\nmain()"


def freeze(process: subprocess.Popen[Any]) -> None:
    """Stops a process until SIGCONT; it has when this returns, for the signal alone takes its time."""
    process.send_signal(signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)


def free_ports(count: int) -> list[int]:
    """Different ones at which nobody listens.

    The system gives them to nobody else before they are used: those that it gives out are above.
    """
    draw, found = random.SystemRandom(), list[int]()  # workers may have seeded the other generator alike
    with ExitStack() as taken:
        while len(found) < count:
            port = draw.randrange(10_000, 32_000)
            with suppress(OSError):
                taken.enter_context(socket.create_server(("127.0.0.1", port)))
                found.append(port)
    return found


class Process:
    """A command of jaxserve's; what it says on standard error is kept."""

    def __init__(self, *arguments: str, plant: str = "", **environment: str):
        """`plant` is run before, and may change what the command does."""
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

    def url(self) -> str:
        """Where it says that it serves."""
        return self.find(r" is served at (\S+)")

    def status(self) -> int:
        """Its exit status, when it has ended."""
        status = self.process.wait(SOON)
        self._reader.join(SOON)
        return status


@contextmanager
def process(*arguments: str, plant: str = "", **environment: str) -> Iterator[Process]:
    """A command until the end of a test."""
    started = Process(*arguments, plant=plant, **environment)
    try:
        yield started
    finally:
        started.process.kill()
        started.status()
        assert started.process.stderr
        started.process.stderr.close()
