"""An engine as the fleet sees it: what it is, what it is told, what it says."""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import msgspec

from jaxserve.counters import Counters
from jaxserve.engine import Engine
from jaxserve.identity import Identity
from jaxserve.parallel.errors import RequestError
from jaxserve.request import Output, Request
from jaxserve.runner import Runner
from jaxserve.serving import Memory, Serving

log = logging.getLogger("jaxserve.fleet")

Role = Literal["prefill", "decode"]


class About(msgspec.Struct, frozen=True):
    """What an instance is."""

    name: str
    role: Role
    identity: Identity
    max_model_len: int
    capacity: int  # of its cache, in tokens
    slots: int  # answers that it generates at once
    ranks: int = 1  # devices that share its steps


class Signs(msgspec.Struct, frozen=True):
    """How an instance is, by its own word."""

    beat: int  # turns of its loop so far
    busy: bool
    counters: Counters
    memory: Memory
    at: float  # when they came, by `time.monotonic` of whoever got them


class Said(msgspec.Struct, tag=True, frozen=True):
    """What a step has said. If it was not a good one, answers that end with an error are lost by no fault of theirs."""

    outputs: Sequence[Output]
    good: bool = True


class Refused(msgspec.Struct, tag=True, frozen=True):
    """It will not do a task."""

    task: str
    reason: str


class Gone(msgspec.Struct, tag=True, frozen=True):
    """It is not there any more, with all that it had been given."""

    reason: str


Event = Said | Refused | Gone
Hear = Callable[[Event], object]


class Instance(Protocol):
    """One engine of a fleet. Nothing in it waits for the engine; threads may share it."""

    @property
    def about(self) -> About: ...

    @property
    def signs(self) -> Signs:
        """The last that came."""
        ...

    @property
    def draining(self) -> bool:
        """Whether it only finishes what it has."""
        ...

    def begin(self, hear: Hear) -> None:
        """From now on `hear` is told what happens, in any thread; after Gone, nothing does."""
        ...

    def add(self, request: Request) -> None:
        """Gives it a task; its outputs have the request's id."""
        ...

    def abort(self, task: str) -> None:
        """Nobody wants to know of a task any more; of one that is done, nobody will fetch the pages."""
        ...

    def close(self) -> None:
        """Has no more to do with it."""
        ...


class Local:
    """An engine of this process, stepped by a thread of its own."""

    def __init__(
        self, engine: Serving, about: About, offered: Callable[[], int] = lambda: 0,
        withdraw: Callable[[], object] = lambda: None,
    ):  # fmt: skip
        """`offered` says how many tasks are done, but others still have to take their pages; `withdraw` ends that."""
        self.about, self.engine, self.draining = about, engine, False
        self._offered, self._withdraw = offered, withdraw
        self._memory = engine.memory  # asked for later, it might be in the middle of a step
        self._open: set[str] = set()  # tasks that are not done
        self._hear: Hear = lambda event: None
        self._runner: Runner | None = None

    @property
    def signs(self) -> Signs:
        runner = self._runner
        beat, busy = (runner.beat, runner.busy) if runner else (0, False)
        return Signs(beat, busy, self.engine.counters, self._memory, time.monotonic())

    @property
    def idle(self) -> bool:
        """Whether it has no task."""
        return not self._open

    @property
    def open(self) -> int:
        """How many tasks are not done, or have left something here."""
        return len(self._open) + self._offered()

    def begin(self, hear: Hear) -> None:
        self._hear = hear
        self._runner = self._runner or Runner(self.engine, self._said, self._failed)

    def add(self, request: Request) -> None:
        self._open.add(request.id)
        self._tell(lambda: self._add(request))

    def abort(self, task: str) -> None:
        self._tell(lambda: self._abort(task))

    def abort_all(self) -> None:
        """Nobody wants to know of any task any more, nor will anybody fetch pages."""
        self._tell(self._abort_all)

    def close(self) -> None:
        if self._runner:
            self._runner.stop()

    def _tell(self, call: Callable[[], object]) -> None:
        if self._runner is None:
            raise RuntimeError(f"{self.about.name} has not begun")
        self._runner.tell(call)

    # In its thread.

    def _add(self, request: Request) -> None:
        try:
            self.engine.add(request)
        except Exception as error:  # of whatever kind: it is this request's, and the next instance would end by it too
            if not isinstance(error, RequestError):
                log.exception("%s could not be added", request.id)
            self._hear(Refused(request.id, str(error) or repr(error)))
            self._open.discard(request.id)

    def _abort(self, task: str) -> None:
        self._open.discard(task)
        self.engine.abort(task)

    def _abort_all(self) -> None:
        for task in list(self._open):
            self._abort(task)
        self._withdraw()

    def _said(self, outputs: Sequence[Output], good: bool) -> None:
        self._hear(Said(outputs, good))  # before it counts as done, or the line might be closed in between
        self._open.difference_update(output.request_id for output in outputs if output.finish_reason)

    def _failed(self, error: BaseException) -> None:
        self._hear(Gone(f"its engine has failed: {error!r}"))


def about(engine: Engine, name: str, role: Role) -> About:
    """What an engine is to a fleet."""
    c = engine.counters
    return About(
        name=name,
        role=role,
        identity=engine.identity,
        max_model_len=engine.max_model_len,
        capacity=c.pages * c.page_size,
        slots=c.slots,
        ranks=c.slots // engine.options.max_num_seqs,
    )
