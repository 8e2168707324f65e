"""The processes of a fleet on one machine: a router and its instances, started and ended together."""

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence

Tell = Callable[[str, str], object]
"""Is told a child's name, and a line: its own, or what has become of it."""

JOIN = re.compile(r"instances join at (\S+)$")
LOOK = 0.1
"""Seconds between two looks at the children."""


class Child:
    """A process, whose lines are passed on."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], tell: Tell):
        self.name, self._tell = name, tell
        self.process = subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            stdin=subprocess.PIPE,  # nothing is written; it ends with this process, see `watch_stdin`
            env=os.environ | dict(environment),
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C is this process's alone: it ends them in order
        )
        self.address: str | None = None
        self.told = threading.Event()  # the address, or that there will be none
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def ended(self) -> str | None:
        """How it has ended, if it has."""
        status = self.process.poll()
        if status is None:
            return None
        return f"killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"

    def signal(self, number: int) -> None:
        """Nothing happens if it has ended."""
        self.process.send_signal(number)

    def wait(self) -> int:
        """Its status, when it has ended and all its lines are passed on."""
        status = self.process.wait()
        self._reader.join()
        if self.process.stdin:
            self.process.stdin.close()
        return status

    def _read(self) -> None:
        assert self.process.stderr
        with self.process.stderr as lines:
            for line in lines:
                if found := JOIN.search(line.rstrip()):
                    self.address = found[1]
                    self.told.set()
                if line.strip():
                    self._tell(self.name, line.rstrip())
        self.told.set()


def watch_stdin() -> None:
    """Ends this process when its standard input ends: at once, for nobody looks after it any more."""
    threading.Thread(target=_outlive_nobody, name="standard input", daemon=True).start()


def _outlive_nobody() -> None:
    try:
        while os.read(0, 1 << 10):  # not `sys.stdin`, whose lock a thread must not hold when the interpreter ends
            pass
    except OSError:
        pass  # there is none
    os._exit(1)


class Children:
    """A router, and instances that join it. None is started again; without the router, or any instance, all end."""

    def __init__(self, environment: Mapping[str, str], tell: Tell):
        self._environment, self._tell = environment, tell
        self._asked = 0  # to end: no lock, which the thread that a signal interrupts may hold
        self._router: Child | None = None
        self._instances: list[Child] = []

    def run(self, router: Sequence[str], instances: Mapping[str, Sequence[str]]) -> int:
        """Starts commands, the router's first, and waits until `end` is called or they have ended; gives the status.

        That is the router's; if it has ended by itself, or all instances have, it isn't 0. An instance's command goes
        on with `--router` and the address that the router has told.
        """
        self._router = first = Child("router", router, self._environment, self._tell)
        while not first.told.wait(LOOK) and not self._asked:
            pass
        if first.address is not None and not self._asked:
            for name, command in instances.items():
                given = [*command, "--router", first.address]
                self._instances.append(Child(name, given, self._environment, self._tell))
        failed = self._watch(first)
        status = self._stop(first)
        return max(1, status) if failed else status

    def end(self) -> None:
        """All finish what they have, and end; the second time, they finish nothing. Any thread may, and signals."""
        self._asked += 1

    def _watch(self, router: Child) -> bool:
        """Waits for the end, and tells what ends before; whether that was the router, or all instances."""
        alive = list(self._instances)
        while not self._asked:
            for child in [child for child in alive if child.ended]:
                child.wait()
                self._tell(child.name, f"is gone: {child.ended}; it is not started again")
                alive.remove(child)
            if router.ended or not alive:
                self._tell("router", f"is gone: {router.ended}" if router.ended else "has no instance left")
                return True
            time.sleep(LOOK)
        return False

    def _stop(self, router: Child) -> int:
        """Ends the router, which finishes what it has accepted, and then the instances; gives the router's status."""
        router.signal(signal.SIGTERM)
        self._await([router], signal.SIGTERM)
        for child in self._instances:
            child.signal(signal.SIGTERM)
        self._await(self._instances, signal.SIGKILL)
        for child in self._instances:
            child.wait()
        return router.wait()

    def _await(self, children: Sequence[Child], hurry: int) -> None:
        """Waits until they have ended; sends them a signal when they are to finish nothing."""
        hurried = False
        while any(not child.ended for child in children):
            if self._asked > 1 and not hurried:
                hurried = True
                for child in children:
                    child.signal(hurry)
            time.sleep(LOOK)
