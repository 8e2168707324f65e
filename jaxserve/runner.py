"""An engine that a thread of its own steps."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from jaxserve.request import Output
from jaxserve.serving import Serving

log = logging.getLogger("jaxserve.engine")

FAILURES = 3
"""Steps that may fail one after another; then the engine is given up."""


class Runner:
    """Steps an engine while it is busy; what others ask of it is done between two steps.

    If a step raises, the engine recovers: answers that ran end with an error. If it can't, or several steps fail one
    after another, it has failed for good, and the thread ends.
    """

    def __init__(
        self, engine: Serving, said: Callable[[Sequence[Output], bool], object],
        failed: Callable[[BaseException], object],
    ):  # fmt: skip
        """Starts the thread. It tells what a step says, and whether it was a good one; or what it fails by."""
        self.engine = engine
        self.beat = 0  # turns of its loop so far
        self.began: float | None = None  # the turn that it makes now: a step, with what is asked before it
        self._said, self._failed = said, failed
        self._todo: deque[Callable[[], object]] = deque()
        self._wake = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether the loop should turn now."""
        return self.began is not None or bool(self._todo) or self.engine.busy

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def tell(self, call: Callable[[], object]) -> None:
        """Has the thread make a call between two steps; one that raises ends it."""
        with self._wake:
            self._todo.append(call)
            self._wake.notify()

    def stop(self) -> None:
        """Ends the thread after the turn that it makes; nobody waits for that."""
        with self._wake:
            self._stopped = True
            self._wake.notify()

    def join(self, timeout: float) -> None:
        """Waits until the thread has ended, if it does in so many seconds."""
        self._thread.join(timeout)

    def _run(self) -> None:
        failures = 0
        try:
            while self._wait():
                self.began = time.monotonic()
                while self._todo:
                    self._todo.popleft()()
                if self.engine.busy:
                    failures = 0 if self._step() else failures + 1
                    if failures == FAILURES:
                        raise RuntimeError(f"{FAILURES} steps have failed one after another")
                self.began = None
                self.beat += 1
        except BaseException as error:
            log.exception("the engine has failed")
            self._failed(error)

    def _wait(self) -> bool:
        """Whether there is something to do; waits until there is, or it is stopped."""
        with self._wake:
            self._wake.wait_for(lambda: self._stopped or self._todo or self.engine.busy)
            return not self._stopped

    def _step(self) -> bool:
        """Makes a step, or what is left of it if it fails; whether it was a good one."""
        try:
            outputs, good = self.engine.step(), True
        except Exception:
            log.exception("a step failed; answers that ran are lost")
            outputs, good = self.engine.recover(), False
        if outputs:
            self._said(outputs, good)
        return good
