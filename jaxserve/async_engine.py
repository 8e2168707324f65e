"""An engine that a thread of its own steps, for many callers in an event loop."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, Protocol, TypeVar

from jaxserve.parallel.errors import EngineError, RequestError
from jaxserve.request import Output, Request
from jaxserve.runner import Runner
from jaxserve.serving import Serving

T = TypeVar("T")

FAILED = "the engine has failed, and the server ends:"
STOPPED = "the engine has been stopped"
LOOK = 0.1
"""Seconds between two looks at whether the engine hangs."""


class Observer(Protocol):
    """Whoever wants to know what happens to requests, in the event loop."""

    def began(self, request: Request) -> None: ...
    def said(self, outputs: Sequence[Output]) -> None: ...
    def left(self, request: Request, served: bool) -> None:
        """Nobody waits for it any more, whether it was answered or not; if not `served`, the engine didn't take it."""
        ...


class AsyncEngine:
    """Requests go to the engine's thread between two steps; what a step says comes back to the event loop at once.

    If the `Runner` gives the engine up, or a step takes longer than `patience`, the engine has failed for good:
    `failure` says why, all who wait get an EngineError, and whoever comes.
    """

    def __init__(self, engine: Serving, observer: Observer, patience: float = 60.0):
        """Starts the thread. Belongs to the event loop that runs now."""
        self.engine = engine
        self.failure: EngineError | None = None
        self.failed = asyncio.Event()
        self._observer, self._patience = observer, patience
        self._loop = asyncio.get_running_loop()
        self._inboxes: dict[str, asyncio.Queue[Output | EngineError]] = {}
        self._asked: set[asyncio.Future[Any]] = set()
        self._stopped = False
        say, fail = partial(post, self._loop, self._hand_out), partial(post, self._loop, self._broken)
        self.runner = Runner(engine, lambda outputs, good: say(outputs), fail)
        self._watch = self._loop.create_task(self._look_after())

    # For callers, in the event loop.

    @asynccontextmanager
    async def submit(
        self, requests: Sequence[Request], deadline: float | None = None
    ) -> AsyncIterator[AsyncIterator[Output]]:
        """What comes of some requests, which all begin or none; at the end, those that are not answered are aborted.

        Raises RequestError if they can't be served, EngineError if the engine has failed, then or later, TimeoutError
        when the event loop's clock says that the `deadline` is over.
        """
        inbox: asyncio.Queue[Output | EngineError] = asyncio.Queue()
        ids = [request.id for request in requests]
        if taken := self._inboxes.keys() & ids or [id for id, count in Counter(ids).items() if count > 1]:
            raise RequestError(f"request id {min(taken)!r} is taken by a request that is not answered yet")
        self._inboxes |= dict.fromkeys(ids, inbox)
        for request in requests:
            self._observer.began(request)
        served = False
        try:
            async with asyncio.timeout_at(deadline):
                await self.ask(lambda: self._add(requests))
            served = True
            yield self._take(inbox, sum(request.params.n for request in requests), deadline)
        finally:
            for request in requests:
                del self._inboxes[request.id]
                self._observer.left(request, served)
            self.runner.tell(lambda: self._abort(requests))

    async def ask(self, call: Callable[[], T]) -> T:
        """What `call` returns, which the engine's thread makes between two steps."""
        if self.failure or self._stopped:
            raise self.failure or EngineError(STOPPED)
        answer: asyncio.Future[T] = self._loop.create_future()
        self._asked.add(answer)
        answer.add_done_callback(self._asked.discard)

        def run() -> None:
            try:
                result, error = call(), None
            except Exception as raised:
                result, error = None, raised
            post(self._loop, settle, answer, result, error)

        self.runner.tell(run)
        return await answer

    @property
    def open(self) -> int:
        """Requests that somebody waits for."""
        return len(self._inboxes)

    async def stop(self) -> bool:
        """Ends the thread after the step that it makes; all who still wait are told.

        One that hangs is left behind, and keeps the engine's memory. Whether it has ended.
        """
        self._watch.cancel()
        self._stopped = True
        self.runner.stop()
        if not self.failure:
            await asyncio.to_thread(self.runner.join, self._patience)
        self.give_up(EngineError(STOPPED))
        return not self.runner.running

    async def release(self) -> bool:
        """Stops, and forgets the engine, so that slow clients, who still hold this one, don't hold its weights.

        Whether it could: a thread that hangs keeps them.
        """
        if ended := await self.stop():
            del self.engine, self.runner.engine
        return ended

    async def _take(
        self, inbox: asyncio.Queue[Output | EngineError], answers: int, deadline: float | None
    ) -> AsyncIterator[Output]:
        while answers:
            async with asyncio.timeout_at(deadline):
                output = await inbox.get()
            if isinstance(output, EngineError):
                raise output
            answers -= output.finish_reason is not None
            yield output

    def _hand_out(self, outputs: Sequence[Output]) -> None:
        self._observer.said(outputs)
        for output in outputs:
            if inbox := self._inboxes.get(output.request_id):
                inbox.put_nowait(output)

    async def _look_after(self) -> None:
        while not self.failure:
            began = self.runner.began
            if began is not None and time.monotonic() - began > self._patience:
                self.fail(EngineError(f"{FAILED} a step has taken longer than {self._patience:g} s"))
            await asyncio.sleep(LOOK)

    def _broken(self, error: BaseException) -> None:
        self.fail(EngineError(f"{FAILED} {error!r}"))

    def fail(self, why: EngineError) -> None:
        """Tells everybody that there will be no answer."""
        if self.failure or self._stopped:
            return
        self.failure = why
        self.give_up(why)
        self.failed.set()

    def give_up(self, error: EngineError) -> None:
        """Tells all who wait now that there will be no answer; others may come."""
        for inbox in self._inboxes.values():
            inbox.put_nowait(error)
        for answer in list(self._asked):
            settle(answer, None, error)

    # In the engine's thread.

    def _add(self, requests: Sequence[Request]) -> None:
        try:
            for request in requests:
                self.engine.add(request)
        except BaseException:
            self._abort(requests)
            raise

    def _abort(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self.engine.abort(request.id)


def post(loop: asyncio.AbstractEventLoop, call: Callable[..., object], *args: Any) -> None:
    """Has an event loop make a call, from another thread; if it has ended, nobody wants to know."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(call, *args)


def settle(answer: "asyncio.Future[Any]", result: Any, error: BaseException | None) -> None:
    """Gives a future its result, or an error, unless nobody waits for it any more."""
    if answer.done():
        return
    if error is None:
        answer.set_result(result)
    else:
        answer.set_exception(error)
