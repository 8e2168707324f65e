"""How a request is answered, whole or as a stream, whatever its kind."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, Protocol, TypeVar

import msgspec
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jaxserve.answers import FAULTS
from jaxserve.request import Output, Request
from jaxserve.server.access import note
from jaxserve.server.errors import ApiError, as_api_error, json_response
from jaxserve.server.protocol import ErrorBody, Usage
from jaxserve.server.service import Service
from jaxserve.slots import NONE_ALLOWED

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
STALLED = 5.0
"""Seconds that a client has to read the last of a stream, when the time of its request is over."""


class Call(Protocol):
    """A request of some kind: what it asks the engine, and what it makes of the engine's outputs."""

    requests: list[Request]
    stream: bool
    include_usage: bool  # at the end of a stream
    only_echo: bool  # what is generated is nobody's

    def open(self) -> Sequence[Any]:
        """What a stream begins with: choices of chunks."""
        ...

    def grow(self, number: int, output: Output) -> Sequence[Any]:
        """What an output to one of its requests adds to a choice."""
        ...

    def chunk(self, choices: Sequence[Any], usage: Usage | None = None) -> msgspec.Struct: ...

    def whole(self, usage: Usage) -> msgspec.Struct:
        """The answer, of all that it has grown by."""
        ...


async def respond(service: Service, http: HttpRequest, make: Callable[[], Awaitable[Call]]) -> Response:
    """Answers the request that `make` makes. If its client goes away, or its time is over, nothing more is done."""
    stack = contextlib.AsyncExitStack()
    async with stack:
        await stack.enter_async_context(service.accepted(http.scope["state"].get("key")))
        response = await unless_gone(http.receive, _begin(service, http, make, stack))
        if isinstance(response, EventStream):
            response.resources = stack.pop_all()  # it goes on
    return response


async def _begin(
    service: Service, http: HttpRequest, make: Callable[[], Awaitable[Call]], stack: contextlib.AsyncExitStack
) -> Response:
    deadline, usage = service.deadline(_seconds(http)), Usage()
    async with asyncio.timeout_at(deadline):
        call = await make()
        await service.check(call.requests)
    outputs = await stack.enter_async_context(service.outputs(call.requests, deadline))
    counted = _count(outputs, call, usage, http)
    if call.stream:
        return EventStream(_events(counted, call, usage, http), deadline + STALLED)
    async for number, output in counted:
        call.grow(number, output)
    return json_response(call.whole(usage))


async def _count(
    outputs: AsyncIterator[tuple[int, Output]], call: Call, usage: Usage, http: HttpRequest
) -> AsyncIterator[tuple[int, Output]]:
    """The outputs, while what they use is added up. Raises ApiError at the first that is an error."""
    usage.prompt_tokens = usage.total_tokens = sum(len(request.prompt_token_ids) for request in call.requests)
    note(http, usage=usage)
    async for number, output in outputs:
        count = 0 if call.only_echo else len(output.token_ids)
        usage.completion_tokens += count
        usage.total_tokens += count
        if output.index == 0:
            usage.prompt_tokens_details.cached_tokens += output.num_cached_tokens
        if output.finish_reason == "error":
            message = output.error or "the answer failed"
            raise ApiError(400 if message == FAULTS[NONE_ALLOWED] else 500, message)
        yield number, output


async def _events(
    outputs: AsyncIterator[tuple[int, Output]], call: Call, usage: Usage, http: HttpRequest
) -> AsyncIterator[bytes]:
    """Server-sent events; an error is one too, for the status is said already."""
    try:
        if first := call.open():
            yield _event(call.chunk(first))
        async for number, output in outputs:
            if choices := call.grow(number, output):
                yield _event(call.chunk(choices))
        if call.include_usage:
            yield _event(call.chunk([], usage))
    except Exception as error:
        told = as_api_error(error).error
        note(http, error=told.message)
        yield _event(ErrorBody(told))
    yield DONE


def _event(content: msgspec.Struct) -> bytes:
    return b"data: " + msgspec.json.encode(content) + b"\n\n"


class EventStream(Response):
    """Server-sent events as they come, and no longer than the client is there."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], deadline: float):
        """The `deadline` is for clients that are there, but don't read; of the event loop's clock."""
        self.status_code, self.background, self._events, self._deadline = 200, None, events, deadline
        self.resources = contextlib.AsyncExitStack()  # let go at the end
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self.resources:
            with contextlib.suppress(ClientDisconnect, OSError):  # a TimeoutError is one
                async with asyncio.timeout_at(self._deadline):
                    await unless_gone(receive, self._send(send))

    def init_headers(self, headers: Any = None) -> None:
        super().init_headers(headers)
        self.raw_headers = [pair for pair in self.raw_headers if pair[0] != b"content-length"]

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for event in self._events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives. It is cancelled if the client goes away first; then raises ClientDisconnect."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for each in (gone, task):
            each.cancel()
        await asyncio.gather(gone, task, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _seconds(http: HttpRequest) -> float | None:
    """The time that the client gives it, in the header X-Request-Timeout."""
    said = http.headers.get("x-request-timeout")
    if said is None:
        return None
    try:
        seconds = float(said)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise ApiError(400, f"X-Request-Timeout: {said!r}: it must be seconds, more than 0", param="X-Request-Timeout")
    return seconds
