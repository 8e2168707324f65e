"""The process of an instance: an engine, and the line to its router."""

import signal
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from queue import SimpleQueue

from jaxserve.engine import Engine
from jaxserve.fleet.control import PATIENCE
from jaxserve.fleet.instance import Event, Gone, Local, Refused, Role, about
from jaxserve.fleet.wire import Abort, Add, Hello, Knock, Leave, Line, Message, Pulse, Welcome, expect, send
from jaxserve.llm import LLM
from jaxserve.parallel.errors import EngineError, RequestError, TransferError
from jaxserve.parallel.frames import TICK, Frames, dial
from jaxserve.peers import Peers

BACKOFF = 0.1, 1.0
"""Seconds before the router is dialled again: the first time, and at most."""

SHORT = 2.0
"""Seconds that a router has to answer the first time."""

OFFERED = 24 * 3600.0
"""Seconds that pages wait for an instance that has a slot for their answer; the router takes back what nobody wants."""


class Worker:
    """Takes tasks from the router while there is one; without one, it dials until there is.

    Nobody waits for what it does when the router is gone: its tasks are aborted then.
    """

    def __init__(
        self, local: Local, router: tuple[str, int], token: bytes, tell: Callable[[str], object],
        drain_timeout: float = 60.0,
    ):  # fmt: skip
        """`tell` is told of each change."""
        self._local, self._router, self._token, self._tell = local, router, token, tell
        self._drain_timeout = drain_timeout
        self._line: Line | None = None
        self._leaving, self._released, self._failed = threading.Event(), threading.Event(), threading.Event()
        local.begin(self._say)

    def run(self) -> None:
        """Works until `leave` has been called, and all is finished.

        Raises RequestError if the router doesn't want it, EngineError if its engine has failed.
        """
        wait, told, joined = BACKOFF[0], "", False
        while not self._leaving.is_set() and not self._failed.is_set():
            try:
                line = self._dial()
            except TransferError as error:
                if error.kind == "refused" and not joined:  # a router that ends may look so
                    raise RequestError(str(error)) from None
                if error.kind != told:
                    self._tell(f"waiting for the router: {error}")
                told = error.kind
                self._leaving.wait(wait)
                wait = min(2 * wait, BACKOFF[1])
                continue
            self._tell(f"{self._local.about.name} has joined the fleet of {self._router[0]}:{self._router[1]}")
            self._work(line)
            wait, told, joined = BACKOFF[0], "dead", True  # which it has told
        if self._failed.is_set():
            raise EngineError("the engine has failed; its log says why")

    def leave(self) -> None:
        """Finishes what it has been given, and takes nothing more; the second time, gives up what is left."""
        if self._leaving.is_set():
            self._hang_up()
            return
        self._leaving.set()
        threading.Thread(target=self._finish, name="fleet drain", daemon=True).start()

    def _dial(self) -> Line:
        """Joins. Raises TransferError: `dead` if nobody is there, `refused` if it isn't wanted."""
        frames = Frames(dial(self._router, PATIENCE), PATIENCE)
        try:
            frames.enter(self._token)
            send(frames, Hello(self._local.about, self._local.signs))
            answer = expect(frames, PATIENCE)
            if isinstance(answer, Refused):
                raise TransferError(answer.reason, "refused")
            if not isinstance(answer, Welcome):
                raise TransferError(f"the router answers with {type(answer).__name__}", "refused")
        except TransferError:
            frames.close()
            raise
        return Line(frames, lambda: Pulse(self._local.signs), answer.period, answer.dead_after)

    def _work(self, line: Line) -> None:
        self._line = line
        if self._leaving.is_set() or self._failed.is_set():  # said while it dialled
            line.close()
        reason = line.run(self._take)
        self._line = None
        self._local.abort_all()
        if not self._leaving.is_set():
            self._tell(f"the router is gone: {reason}; waiting for one")
        while not (self._local.idle or self._leaving.is_set() or self._failed.is_set()):
            time.sleep(TICK)  # an engine that hangs must not join again as if it were well

    def _take(self, message: Message) -> None:
        match message:
            case Add():
                self._local.add(message.request)
            case Abort():
                self._local.abort(message.task)
            case Leave():
                self._released.set()

    def _say(self, event: Event) -> None:
        if isinstance(event, Gone):
            self._failed.set()
        if line := self._line:
            line.say(event)
            if isinstance(event, Gone):
                line.close()

    def _finish(self) -> None:
        """Waits for the last task, not for ever."""
        end = time.monotonic() + self._drain_timeout
        if line := self._line:
            if count := self._local.open:
                self._tell(f"finishing {count} answer{'s' * (count > 1)}, {self._drain_timeout:g} s at most")
            line.say(Leave())
            self._released.wait(self._drain_timeout)
            while self._local.open and time.monotonic() < end:
                time.sleep(TICK)
        self._hang_up()

    def _hang_up(self) -> None:
        if line := self._line:
            line.close()


@dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """Which instance this is, and of which fleet."""

    role: Role
    name: str
    router: tuple[str, int]
    token: bytes
    max_model_len: int | None = None  # tokens of a prompt and its answer, if it has been said
    host: str = "127.0.0.1"  # where other instances reach this one
    drain_timeout: float = 60.0  # seconds, to finish what it has been given when it is to leave


def knock(router: tuple[str, int], token: bytes, max_model_len: int | None, tell: Callable[[str], object]) -> None:
    """Asks whether an instance will be let in, before it takes minutes to load; a router that isn't there may come.

    Raises RequestError if it has another token, or takes other lengths.
    """
    where = f"{router[0]}:{router[1]}"
    try:
        connection = dial(router, SHORT)
    except TransferError as error:
        tell(f"there is no router yet: {error}")
        return
    try:
        with closing(Frames(connection, SHORT)) as frames:
            frames.enter(token)
            send(frames, Knock(max_model_len))
            answer = expect(frames, SHORT)
    except TransferError as error:
        if error.kind == "refused":
            raise RequestError(f"the router at {where} has another token; give both the same --fleet-token") from None
        tell(f"{where} does not speak as a router ({error}); is that its --control-port?")
        return
    if isinstance(answer, Refused):
        raise RequestError(answer.reason)


def work(load: Callable[[Peers, bool], LLM], options: WorkerOptions, tell: Callable[[str], object]) -> None:
    """Serves as an instance until a signal ends it; the second one finishes nothing.

    `load` is given with whom pages are exchanged, and whether they are to be had here. Raises what it and `Worker.run`
    raise.
    """
    knock(options.router, options.token, options.max_model_len, tell)
    peers = Peers(options.token, options.name, host=options.host, seconds=OFFERED)
    llm = load(peers, options.role == "prefill")
    engine = llm.engine
    if not isinstance(engine, Engine):
        raise RequestError(f"an instance needs an engine of its own; got {type(engine).__name__}")
    local = Local(engine, about(engine, options.name, options.role), lambda: engine.offered, engine.withdraw)
    worker = Worker(local, options.router, options.token, tell, options.drain_timeout)
    wishes = SimpleQueue[None]()  # a signal's handler may put into it, whatever it interrupts
    threading.Thread(target=_obey, args=[wishes, worker], name="signals", daemon=True).start()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: wishes.put(None))
    worker.run()
    llm.close()


def _obey(wishes: SimpleQueue[None], worker: Worker) -> None:
    while True:
        wishes.get()
        worker.leave()
