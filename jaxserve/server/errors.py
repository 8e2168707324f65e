"""Errors as OpenAI's clients know them: a status, and `{"error": {"message", "type", "param", "code"}}`."""

import logging
import re
from collections.abc import Mapping
from typing import TypeVar

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from jaxserve.parallel.errors import EngineError, JaxserveError, QueueFullError, RequestError, ShutDownError
from jaxserve.server.protocol import Error, ErrorBody

T = TypeVar("T")

log = logging.getLogger("jaxserve.server")

AGAIN = {"Retry-After": "5"}
"""For clients of a server that can't answer now."""

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """What a client is told instead of an answer."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):  # fmt: skip
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        self.error = Error(message, TYPES.get(status, "invalid_request_error"), param, code)

    def response(self) -> Response:
        return json_response(ErrorBody(self.error), self.status, self.headers)


def json_response(content: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Content as JSON; also non-finite numbers, as null."""
    return Response(msgspec.json.encode(content), status, headers, "application/json")


def as_api_error(error: Exception) -> ApiError:
    """What a client is told of an error; unknown ones are bugs, whose details go to the log alone."""
    match error:
        case ApiError():
            return error
        case QueueFullError():
            return ApiError(429, str(error), code="queue_full", headers={"Retry-After": "1"})
        case RequestError():
            return ApiError(400, str(error), param=_param(str(error)))
        case ShutDownError():
            return ApiError(503, str(error), code="shut_down", headers=AGAIN)
        case EngineError():
            return ApiError(503, str(error), code="engine_failed")
        case TimeoutError():
            message = "the answer was not complete within its time, and was given up; ask for less, or allow more time"
            return ApiError(504, message, code="deadline_exceeded", headers={"x-should-retry": "false"})
        case ClientDisconnect():
            return ApiError(499, "the client went away")  # nginx's status, for the log alone
        case HTTPException():
            return ApiError(error.status_code, _told(error), headers=error.headers)
        case JaxserveError():
            return ApiError(500, str(error))
    log.error("a bug of the server", exc_info=error)
    return ApiError(500, f"the server has a bug ({type(error).__name__}); its log says more")


def decode(body: bytes, kind: type[T]) -> T:
    """A request's body. Raises ApiError that names the field."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at ")
        unknown = re.fullmatch(r"Object contains unknown field `(.*)`", message)
        named = unknown or re.fullmatch(r"Object missing required field `(.*)`", message)
        param = ".".join(filter(None, [path.strip("`").removeprefix("$").removeprefix("."), named and named[1]]))
        said = f"{param or 'body'}: {'this field is not supported; leave it out' if unknown else message}"
        raise ApiError(400, said, param=param or None, code="unknown_field" if unknown else None) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None


def _param(message: str) -> str | None:
    """The field that a RequestError begins with."""
    found = re.match(r"([a-z_]+)(?:\.\w+)?(?: = | has | must | can't |: )", message)
    return {"prompt_token_ids": "prompt"}.get(found[1], found[1]) if found else None


def _told(error: HTTPException) -> str:
    return {
        404: "there is no such path; /openapi.json lists those there are",
        405: "this path has other methods; /openapi.json lists them",
    }.get(error.status_code, error.detail)
