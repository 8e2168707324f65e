"""The application: which path is answered by whom."""

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxserve.parallel.errors import JaxserveError
from jaxserve.server import chat, completions, probes
from jaxserve.server.access import AccessLog, note, tell
from jaxserve.server.answering import respond
from jaxserve.server.auth import Auth, Names
from jaxserve.server.errors import ApiError, decode, json_response
from jaxserve.server.openapi import describe
from jaxserve.server.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    LoadRequest,
    Sampled,
    TokenizeRequest,
)
from jaxserve.server.service import Limits, Service

Body = TypeVar("Body", bound=msgspec.Struct)
STATIC = Path(str(files("jaxserve.server"))) / "static"
ERRORS = (ApiError, JaxserveError, TimeoutError, HTTPException, ClientDisconnect)
POLICY = "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"


def make_app(
    service: Service, keys: Sequence[str] = (), origins: Sequence[str] = (), hosts: Sequence[str] | None = None
) -> Starlette:
    """The application of a service; `origins` are other sites whose pages may ask it, `hosts` its own names."""
    cors = Middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
    return Starlette(
        routes=_routes(service),
        middleware=[
            Middleware(AccessLog),
            *([cors] if origins else []),
            *([Middleware(Names, hosts=hosts)] if hosts else []),
            Middleware(Auth, keys=keys),
            Middleware(SafeHeaders),
        ],
        exception_handlers={kind: tell for kind in ERRORS},
    )


def _routes(service: Service) -> list[Route | Mount]:
    async def complete(http: Request) -> Response:
        body = await read(http, CompletionRequest, limits)
        id = _new_id(http, "cmpl", body)
        return await respond(service, http, lambda: completions.make_call(service, body, id))

    async def converse(http: Request) -> Response:
        body = await read(http, ChatRequest, limits)
        id = _new_id(http, "chatcmpl", body)
        return await respond(service, http, lambda: chat.make_call(service, body, id))

    async def tokenize(http: Request) -> Response:
        return json_response(await probes.tokenize(service, await read(http, TokenizeRequest, limits)))

    async def detokenize(http: Request) -> Response:
        return json_response(await probes.detokenize(service, await read(http, DetokenizeRequest, limits)))

    async def load(http: Request) -> Response:
        return json_response(await probes.load(service, await read(http, LoadRequest, limits)))

    async def show(http: Request) -> Response:
        return json_response(await probes.stats(service))

    async def measure(http: Request) -> Response:
        return await probes.metrics(service)

    limits, description = service.limits, describe(service)
    return [
        Route("/v1/completions", complete, methods=["POST"]),
        Route("/v1/chat/completions", converse, methods=["POST"]),
        Route("/v1/models", _get(lambda http: json_response(probes.models(service)))),
        Route("/models/load", load, methods=["POST"]),
        Route("/v1/models/{name:path}", _get(lambda http: json_response(probes.model(service, _name(http))))),
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
        Route("/health", _get(lambda http: probes.health(service))),
        Route("/version", _get(lambda http: probes.version())),
        Route("/metrics", measure),
        Route("/stats", show),
        Route("/openapi.json", _get(lambda http: json_response(description))),
        Route("/", _get(lambda http: FileResponse(STATIC / "index.html"))),
        Mount("/static", StaticFiles(directory=STATIC)),
    ]


def _get(answer: Callable[[Request], Response]) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(http: Request) -> Response:
        return answer(http)

    return endpoint


def _new_id(http: Request, kind: str, body: Sampled) -> str:
    """Of an answer; a client's own id of its request may be that of others too."""
    id = f"{kind}-{uuid.uuid4().hex}"
    note(http, answer=id, user=body.user)
    return id


def _name(http: Request) -> str:
    return http.path_params["name"]


async def read(http: Request, kind: type[Body], limits: Limits) -> Body:
    """A request's body. Only JSON is taken: a form on another site's page can't send that."""
    said = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if said != "application/json":
        raise ApiError(415, f"Content-Type: {said or 'nothing'}: it must be application/json")
    try:
        async with asyncio.timeout(limits.seconds):
            return decode(await _gather(http, limits.body_bytes), kind)
    except TimeoutError:
        raise ApiError(
            408, f"the body has not come within {limits.seconds:g} s", headers={"Connection": "close"}
        ) from None


async def _gather(http: Request, most: int) -> bytes:
    body = bytearray()
    async for part in http.stream():
        body += part
        if len(body) > most:
            raise ApiError(413, f"the body has more than {most} bytes, this server's limit (--max-body-bytes)")
    return bytes(body)


class SafeHeaders:
    """Headers that keep a page from what it doesn't need."""

    HEADERS = {
        b"content-security-policy": POLICY.encode(),
        b"x-content-type-options": b"nosniff",
        b"referrer-policy": b"no-referrer",
    }

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def add(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *self.HEADERS.items()]
            await send(message)

        await self._app(scope, receive, add if scope["type"] == "http" else send)
