"""Who may ask: clients with one of the keys, if there are any; without keys, those who know the server by its name."""

import hmac
import re
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from jaxserve.server.errors import ApiError

GUARDED = ("/v1/", "/models/", "/tokenize", "/detokenize", "/stats")
"""Paths that need a key; health, version and metrics are for machines that have none, and the page asks for it."""


class Auth:
    """Refuses requests without a key; notes which key it was, by its number."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]):
        self._app, self._keys = app, [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._keys and scope["path"].startswith(GUARDED):
            scheme, _, said = Headers(scope=scope).get("authorization", "").partition(" ")
            number = self._number(said.strip().encode()) if scheme.lower() == "bearer" else None
            if number is None:
                message = "no key, or a wrong one; send a key of this server as 'Authorization: Bearer KEY'"
                headers = {"WWW-Authenticate": "Bearer"}
                error = ApiError(401, message, code="invalid_api_key", headers=headers)
                return await error.response()(scope, receive, send)
            scope["state"]["key"] = scope["state"]["note"]["key"] = number
        await self._app(scope, receive, send)

    def _number(self, said: bytes) -> int | None:
        """Compares with all keys, whichever it is: how long it takes tells nothing."""
        same = [hmac.compare_digest(said, key) for key in self._keys]
        return same.index(True) if any(same) else None


class Names:
    """Refuses requests to a name that isn't the server's.

    A page of another site can have its own name point here; to the browser it then is this site. It can't send another
    name than that.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str]):
        self._app, self._hosts = app, frozenset(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            said = Headers(scope=scope).get("host", "")
            name = re.sub(r":\d+$", "", said).strip("[]").lower()
            if name not in self._hosts:
                message = f"this server isn't known as {name[:100]!r}; --allowed-host lets it be, or --api-key any name"
                return await ApiError(421, message, code="unknown_host").response()(scope, receive, send)
        await self._app(scope, receive, send)
