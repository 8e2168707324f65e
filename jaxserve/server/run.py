"""A server's life: it listens, loads the model, serves, and ends as its supervisor expects."""

import asyncio
import gc
import logging
import socket
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, TypeVar

import uvicorn
from prometheus_client.registry import Collector

from jaxserve.async_engine import AsyncEngine, post, settle
from jaxserve.counters import Counters
from jaxserve.describe import human
from jaxserve.llm import LLM
from jaxserve.parallel.errors import JaxserveError, RequestError, ShutDownError
from jaxserve.server.app import make_app
from jaxserve.server.errors import AGAIN, ApiError
from jaxserve.server.load import ExpertLoad
from jaxserve.server.metrics import Metrics
from jaxserve.server.service import Limits, Loaded, Servable, Service
from jaxserve.server.wire import Protocol

T = TypeVar("T")

log = logging.getLogger("jaxserve.server")

Find = Callable[[str], Callable[[], LLM]]
"""What loads the model of a name."""
Collect = Callable[[LLM], Sequence[Collector]]
"""What shows more of a model that is served than its engine counts."""

DRAINED, FAILED = 0, 1
"""Exit statuses: all that was accepted is answered; the engine has failed, or the time to end was not enough."""

GRACE = 5
"""Seconds for responses that are on their way when all is over."""


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """How to serve; `Limits` says what clients may ask for."""

    names: Sequence[str]
    host: str = "127.0.0.1"
    port: int = 8000
    keys: Sequence[str] = ()
    origins: Sequence[str] = ()
    hosts: Sequence[str] | None = None  # names that it may be called by; None: any
    limits: Limits = field(default_factory=Limits)
    step_timeout: float = 60.0  # seconds; a step that takes longer hangs
    drain_timeout: float = 60.0  # seconds, to finish what was accepted when the server is to end
    tls: dict[str, Any] = field(default_factory=dict)  # uvicorn's options ssl_…


class Server(uvicorn.Server):
    """Uvicorn's, but what a signal does is another's to decide."""

    def __init__(self, config: uvicorn.Config, on_signal: Callable[[], object]):
        super().__init__(config)
        self._on_signal = on_signal

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._on_signal()


def no_other(name: str) -> Callable[[], LLM]:
    """For servers that have one model."""
    raise RequestError(f"model = {name!r}: this server has no other model than its own")


def serve(
    load: Callable[[], LLM], options: ServerOptions, tell: Callable[[str], None] = lambda line: None,
    find: Find = no_other, collect: Collect = lambda llm: (),
) -> int:  # fmt: skip
    """Serves a model until a signal ends it; gives the exit status.

    SIGTERM, or Ctrl-C: what was accepted is finished, what comes is refused; the second time, nothing is finished.
    `tell` is told where it serves, and what it waits for when it is to end. `find` gives what loads another model that
    clients may have served instead, and raises RequestError for those that they may not. What `collect` gives is among
    the metrics. Raises RequestError if it can't listen, or not with these certificates, and what `load` raises.
    """
    with listen(options.host, options.port) as sock:
        return asyncio.run(Life(load, options, tell, find, collect).live(sock))


def listen(host: str, port: int) -> socket.socket:
    """A socket at an address; port 0 is any that is free. Raises RequestError if there can't be one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RequestError(f"can't listen at {host}, port {port}: {reason}; choose another --host or --port") from None


class Life:
    """From listening to the end."""

    def __init__(
        self, load: Callable[[], LLM], options: ServerOptions, tell: Callable[[str], None], find: Find = no_other,
        collect: Collect = lambda llm: (),
    ):  # fmt: skip
        """`find` gives other models that clients may have served."""
        self._options, self._tell, self._find, self._collect = options, tell, find, collect
        self._first_model = self._model = Servable(options.names, load)
        self._engine: AsyncEngine | None = None  # None: nothing is loaded
        self._llm: LLM | None = None
        self.service = Service(options.names, options.limits, self._servable)

    def _servable(self, name: str) -> Servable:
        """A model that may be served, by its name."""
        return self._first_model if name in self._first_model.names else Servable([name], self._find(name))

    async def live(self, sock: socket.socket) -> int:
        """Answers from the first moment on, until the model is loaded with 503."""
        o, self._loop = self._options, asyncio.get_running_loop()
        self._end, self._hurry = asyncio.Event(), asyncio.Event()
        app = make_app(self.service, o.keys, o.origins, o.hosts)
        config = uvicorn.Config(
            app, http=Protocol, log_config=None, access_log=False, lifespan="off", server_header=False,
            timeout_graceful_shutdown=GRACE, **o.tls,
        )  # fmt: skip
        try:
            config.load()
        except OSError as error:  # ssl.SSLError is one
            reason = "check that --ssl-certfile, --ssl-keyfile and --ssl-ca-certs are PEM files that belong together"
            raise RequestError(f"https can't be served: {error}; {reason}") from None
        server = Server(config, self.end)
        serving = asyncio.create_task(server.serve([sock]))
        try:
            return await self._run(_url(sock, bool(o.tls)))
        finally:
            server.should_exit, server.force_exit = True, self._hurry.is_set()
            await serving

    async def _run(self, url: str) -> int:
        if said := await self._open(self._first_model):
            self._tell(f"{self.service.names[0]} is served at {url}\n{said}")
        while self._engine and await self._is_wished(self._engine):
            await self._switch()
        ended = ApiError(503, "the server is shutting down; ask another one", code="draining", headers=AGAIN)
        self.service.end_wish(ended)
        if self._engine:
            return await self._close(self._engine)
        return DRAINED if self._end.is_set() else FAILED

    async def _open(self, model: Servable) -> str:
        """Loads a model and has it served; says what it is, or nothing if the server is to end meanwhile."""
        began = time.monotonic()
        llm = await self._first(_in_thread(model.load), self._end.wait())
        if not isinstance(llm, LLM):
            return ""
        self._llm, self._model = llm, model
        metrics = Metrics(self._counters, model.names[0])
        self._engine = AsyncEngine(llm.engine, metrics, self._options.step_timeout)
        experts = ExpertLoad(self._engine)
        metrics.watch_load(experts)
        for collector in self._collect(llm):
            metrics.watch(collector)
        self.service.ready(Loaded(self._engine, llm.tokenizer, metrics, experts), model.names)
        return self._circumstances(llm, time.monotonic() - began)

    async def _is_wished(self, engine: AsyncEngine) -> bool:
        """Waits until another model is wished for, or the server is to end."""
        await self._first(self._end.wait(), engine.failed.wait(), self.service.wished.wait())
        return not self._end.is_set() and not engine.failure

    async def _switch(self) -> None:
        """Serves the model that is wished for; the one before, if that can't be loaded; none, if the server is to end.

        The weights of two may not fit into memory, so that of the old ones is given back first.
        """
        assert self._engine and self.service.wish
        wished, before = self.service.wish.model, self._model
        self._tell(f"{wished.names[0]} is to be served; {self.service.open} requests are finished before")
        await self._finish(self._engine)
        if self._engine.failure or self._end.is_set():
            return
        ended, self._engine = await self._engine.release(), None
        self.service.unload()
        await self._let_go()
        gc.collect()
        if not ended:  # a step hangs, and keeps the weights
            return
        if fault := await self._try(wished):
            gc.collect()  # what had been loaded of it
            another = await self._try(before)
            now = f"nor could {before.names[0]} again: {another}" if another else f"{before.names[0]} is served again"
            fault = f"{wished.names[0]} could not be loaded: {fault}; {now}"
        if self._engine or fault:
            self.service.end_wish(ApiError(500, fault, param="model", code="not_loaded") if fault else None)

    async def _try(self, model: Servable) -> str:
        """Loads a model and says why it can't be, if so."""
        try:
            if said := await self._open(model):
                self._tell(f"{model.names[0]} is served\n{said}")
            return ""
        except Exception as error:  # of whatever kind: the server is to go on
            log.exception("%s could not be loaded", model.names[0])
            traceback.clear_frames(error.__traceback__)  # which hold weights
            return str(error) if isinstance(error, JaxserveError) else f"{type(error).__name__}: {error}"

    async def _finish(self, engine: AsyncEngine) -> None:
        """Lets an engine answer what was accepted, while there is time."""
        enough = asyncio.sleep(self._options.drain_timeout)
        await self._first(self.service.idle.wait(), engine.failed.wait(), self._hurry.wait(), enough)
        if not self.service.idle.is_set():
            engine.give_up(ShutDownError("another model is loaded, and there was no time for the answer; ask again"))
            await self._first(self.service.idle.wait(), asyncio.sleep(GRACE))  # everybody is being told

    async def _close(self, engine: AsyncEngine) -> int:
        """Finishes what was accepted, or gives it up when there is no more time for it; gives the exit status."""
        if self.service.open and not engine.failure:
            count, most = self.service.open, f"{self._options.drain_timeout:g} s at most"
            self._tell(f"finishing {count} open request{'s' * (count > 1)}, {most}; Ctrl-C again gives up")
        enough = asyncio.sleep(self._options.drain_timeout)
        await self._first(self.service.drain(), engine.failed.wait(), self._hurry.wait(), enough)
        if not self.service.idle.is_set():
            engine.fail(ShutDownError("the server was shut down before the answer was complete; ask another one"))
            await self._first(self.service.drain(), asyncio.sleep(GRACE))  # everybody is being told
        await engine.stop()
        await self._let_go()
        return FAILED if engine.failure else DRAINED

    async def _let_go(self) -> None:
        """Closes the model, and forgets it."""
        if self._llm:
            await self._first(_in_thread(self._llm.close), asyncio.sleep(GRACE))
        self._llm = None

    def _counters(self) -> Counters:
        return self._llm.engine.counters if self._llm else Counters()

    def _circumstances(self, llm: LLM, seconds: float) -> str:
        if not llm.engine.ready:
            return "waiting for an instance that generates answers; until there is one, requests wait"
        c, memory = llm.engine.counters, llm.engine.memory
        room = f"cache of {c.pages * c.page_size:,} tokens ({human(memory.cache)})"
        longest = f"{c.slots} answers at once, of {llm.engine.max_model_len:,} tokens with their prompts"
        return f"{human(memory.weights)} weights, {room}, {longest}; ready after {seconds:.1f} s"

    async def _first(self, *waits: Awaitable[Any]) -> Any:
        """What the first of several gives that is done; the others are given up."""
        tasks = [asyncio.ensure_future(wait) for wait in waits]
        done, others = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in others:
            task.cancel()
        return next(task for task in tasks if task in done).result()

    def end(self) -> None:
        """What a signal does; may be called in any thread."""
        post(self._loop, lambda: (self._hurry if self._end.is_set() else self._end).set())


def _in_thread(call: Callable[[], T]) -> asyncio.Future[T]:
    """What `call` gives, in a thread that may be left behind: the program can end while it works."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[T] = loop.create_future()

    def run() -> None:
        try:
            result, error = call(), None
        except BaseException as raised:
            result, error = None, raised
        post(loop, settle, answer, result, error)

    threading.Thread(target=run, daemon=True).start()
    return answer


def _url(sock: socket.socket, tls: bool) -> str:
    host, port = sock.getsockname()[:2]
    return f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"
