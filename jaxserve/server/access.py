"""A line of JSON for each request, when it is over."""

import json
import logging
import re
import time
import uuid
from datetime import UTC, datetime
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxserve.server.errors import as_api_error

log = logging.getLogger("jaxserve.server")
QUIET = ("/health", "/metrics", "/stats")
"""Asked every few seconds by whoever watches: logged only if they fail."""
LONGEST = 500
"""Characters of a client's text in a line."""


class JsonLines(logging.Formatter):
    """Each record as an object in a line: the time, the level, the message, and what `extra` gives as `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=msgspec.to_builtins)


def note(http: Request, **fields: Any) -> None:
    """Adds to the line of a request what is not None; of a long text, its beginning."""
    said = {name: value[:LONGEST] if isinstance(value, str) else value for name, value in fields.items()}
    http.scope["state"]["note"].update({name: value for name, value in said.items() if value is not None})


async def tell(http: Request, error: Exception) -> Response:
    """The response to a request that raised; its line says so too."""
    told = as_api_error(error)
    note(http, error=told.error.message)
    return told.response()


class AccessLog:
    """Gives each request an id, its client's own (`X-Request-Id`) if it has one, and logs it at its end."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        id = given if re.fullmatch(r"[\w.:-]{1,128}", given, re.ASCII) else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state["id"], state["note"] = id, {}
        began, status, first = time.perf_counter(), 0, None

        async def watch(message: Message) -> None:
            nonlocal status, first
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", id.encode())]
            elif first is None:
                first = time.perf_counter() - began
            await send(message)

        try:
            await self._app(scope, receive, watch)
        except Exception as error:
            if status:  # too late to tell
                raise
            response = await tell(Request(scope), error)
            await response(scope, receive, watch)
        finally:
            seconds = time.perf_counter() - began
            if scope["path"] not in QUIET or status == 500:
                fields = _fields(scope, status, first, seconds)
                log.info("%s %s", scope["method"], scope["path"], extra={"fields": fields})


def _fields(scope: Scope, status: int, first: float | None, seconds: float) -> dict[str, Any]:
    client = scope.get("client")
    return {
        "id": scope["state"]["id"],
        "status": status or None,  # None: it was cancelled, for the server ends
        "client": client and client[0],
        "first_byte_ms": first and round(first * 1e3, 1),
        "duration_ms": round(seconds * 1e3, 1),
        **scope["state"]["note"],
    }
