"""A server's life: it listens, loads the model, serves, and ends as its supervisor expects."""

import asyncio
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, TypeVar

import uvicorn

from jaxserve.async_engine import AsyncEngine, post, settle
from jaxserve.describe import human
from jaxserve.llm import LLM
from jaxserve.parallel.errors import RequestError, ShutDownError
from jaxserve.server.app import make_app
from jaxserve.server.load import ExpertLoad
from jaxserve.server.metrics import Metrics
from jaxserve.server.service import Limits, Loaded, Service
from jaxserve.server.wire import Protocol

T = TypeVar("T")

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


def serve(load: Callable[[], LLM], options: ServerOptions, tell: Callable[[str], None] = lambda line: None) -> int:
    """Serves a model until a signal ends it; gives the exit status.

    SIGTERM, or Ctrl-C: what was accepted is finished, what comes is refused; the second time, nothing is finished.
    `tell` is told where it serves, and what it waits for when it is to end. Raises RequestError if it can't listen, or
    not with these certificates, and what `load` raises.
    """
    with listen(options.host, options.port) as sock:
        return asyncio.run(Life(load, options, tell).live(sock))


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

    def __init__(self, load: Callable[[], LLM], options: ServerOptions, tell: Callable[[str], None]):
        self._load, self._options, self._tell, self._began = load, options, tell, time.monotonic()
        self.service = Service(options.names, options.limits)

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
        llm = await self._first(_in_thread(self._load), self._end.wait())
        if not isinstance(llm, LLM):
            return DRAINED
        metrics = Metrics(lambda: llm.engine.counters, self._options.names[0])
        engine = AsyncEngine(llm.engine, metrics, self._options.step_timeout)
        load = ExpertLoad(engine)
        metrics.watch_load(load)
        self.service.ready(Loaded(engine, llm.tokenizer, metrics, load))
        self._tell(f"{self._options.names[0]} is served at {url}\n{self._circumstances(llm)}")
        await self._first(self._end.wait(), engine.failed.wait())
        if self.service.open and not engine.failure:
            count, most = self.service.open, f"{self._options.drain_timeout:g} s at most"
            self._tell(f"finishing {count} open request{'s' * (count > 1)}, {most}; Ctrl-C again gives up")
        enough = asyncio.sleep(self._options.drain_timeout)
        await self._first(self.service.drain(), engine.failed.wait(), self._hurry.wait(), enough)
        if not self.service.idle.is_set():
            engine.fail(ShutDownError("the server was shut down before the answer was complete; ask another one"))
            await self._first(self.service.drain(), asyncio.sleep(GRACE))  # everybody is being told
        await engine.stop()
        await self._first(_in_thread(llm.close), asyncio.sleep(GRACE))
        return FAILED if engine.failure else DRAINED

    def _circumstances(self, llm: LLM) -> str:
        c, memory, seconds = llm.engine.counters, llm.engine.memory, time.monotonic() - self._began
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
