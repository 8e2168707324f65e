"""A client of OpenAI-compatible servers: answers whole or chunk by chunk; whatever goes wrong is a ServerError."""

import json
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import httpx2

from jaxserve.parallel.errors import ServerError

Chunk = dict[str, Any]
"""What an event of a stream holds, in OpenAI's form: `{"choices": […], "usage": …}`."""

ATTEMPTS = 20  # at a server that is full and says when to come again


class Client:
    """Asks one server; threads may share it. `url` may end in the `/v1` that other clients are given."""

    def __init__(self, url: str, api_key: str | None = None, timeout: float = 600):
        """`timeout` is in seconds, without a sign of life."""
        self.url = _root(url)
        with _told(self.url):
            self._http = httpx2.Client(**_settings(self.url, api_key, timeout))

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def get(self, path: str) -> Any:
        """What the server answers."""
        with _told(self.url):
            return _content(self._http.get(path))

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """What the server answers; one that is full is asked again when it says."""
        with _told(self.url):
            response = self._http.post(path, json=body)
            for _ in range(ATTEMPTS):
                if (seconds := _pause(response)) is None:
                    break
                time.sleep(seconds)
                response = self._http.post(path, json=body)
            return _content(response)

    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[Chunk]:
        """The chunks of an answer as they come; to close the iterator is to hang up."""
        with _told(self.url), self._http.stream("POST", path, json=_streamed(body)) as response:
            if response.is_error:
                response.read()
                _content(response)
            for event in httpx2.EventSource(response):
                if event.data == "[DONE]":
                    return
                yield _chunk(event.data)
            raise _cut_off(self.url)

    def model(self) -> dict[str, Any]:
        """What the server says of its first model: its `id`, and more if it is ours."""
        try:
            return self.get("/v1/models")["data"][0]
        except (LookupError, TypeError):
            raise ServerError(f"{self.url} lists no model; name one with --model", "no model") from None

    def version(self) -> str | None:
        """The server's own, if it tells."""
        try:
            return self.get("/version").get("version")
        except (ServerError, AttributeError):
            return None


class AsyncClient:
    """Asks one server many things at a time, with no bound to their number."""

    def __init__(self, url: str, api_key: str | None = None, timeout: float = 600):
        """`timeout` is in seconds, without a sign of life."""
        self.url = _root(url)
        with _told(self.url):
            self._http = httpx2.AsyncClient(**_settings(self.url, api_key, timeout))

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def stream(self, path: str, body: Mapping[str, Any]) -> AsyncIterator[Chunk]:
        """The chunks of an answer as they come; to close the iterator is to hang up."""
        with _told(self.url):
            async with self._http.stream("POST", path, json=_streamed(body)) as response:
                if response.is_error:
                    await response.aread()
                    _content(response)
                async for event in httpx2.EventSource(response):
                    if event.data == "[DONE]":
                        return
                    yield _chunk(event.data)
                raise _cut_off(self.url)


def refusal(content: Any) -> str | None:
    """The message of an error in OpenAI's form, or in those of servers that have their own; None if it is no error."""
    if not isinstance(content, dict):
        return None
    error = content.get("error") or (content if content.get("object") == "error" else None)
    message = error.get("message") if isinstance(error, dict) else error
    if message is None and "detail" in content:
        message = content["detail"]
    return None if message is None else " ".join(str(message).split())


def _root(url: str) -> str:
    return url.rstrip("/").removesuffix("/v1")


def _settings(url: str, api_key: str | None, timeout: float) -> dict[str, Any]:
    return {
        "base_url": url,
        "headers": {"Authorization": f"Bearer {api_key}"} if api_key else {},
        "timeout": httpx2.Timeout(timeout, connect=10),
        "limits": httpx2.Limits(),  # none: requests that wait for a connection would look like a slow server
    }


@contextmanager
def _told(url: str) -> Iterator[None]:
    """Turns what HTTP raises into one line."""
    try:
        yield
    except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            way_out = "SSL_CERT_FILE=FILE in the environment trusts the certificate in a file"
            raise ServerError(f"{url}: its certificate is not trusted here; {way_out}", "no trust") from None
        way_out = "start one with `jaxserve serve`, or name another with --url"
        raise ServerError(f"no server at {url} ({error}); {way_out}", "no connection") from None
    except httpx2.TimeoutException as error:
        reason = "gave no sign of life for too long; it is stuck, or has too much to do"
        raise ServerError(f"{url} {reason}", type(error).__name__) from None
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        kind = type(error).__name__
        raise ServerError(f"{url}: {kind}: {' '.join(str(error).split())}", kind) from None


def _pause(response: httpx2.Response) -> float | None:
    """The seconds after which a full server wants to be asked again; None if it doesn't."""
    after = response.headers.get("retry-after", "")
    return float(after) if response.status_code == 429 and after.isdigit() else None


def _content(response: httpx2.Response) -> Any:
    """The JSON of an answer; ServerError if it is a refusal, or none."""
    url, status = response.request.url, response.status_code
    try:
        content = response.json()
    except ValueError:
        content = None
    if response.is_success and content is not None:
        return content
    message = refusal(content) or f"{response.reason_phrase}, and no reason in JSON"
    raise ServerError(f"{url} answers {status}: {message}", f"HTTP {status}")


def _streamed(body: Mapping[str, Any]) -> dict[str, Any]:
    return {**body, "stream": True, "stream_options": {"include_usage": True}}


def _chunk(data: str) -> Chunk:
    """The content of an event; ServerError if that is a fault."""
    try:
        chunk = json.loads(data)
    except ValueError:
        raise ServerError(f"an event of the stream is not JSON: {data[:80]!r}", "not JSON") from None
    message = refusal(chunk)
    if message is not None:
        raise ServerError(f"the server broke off its answer: {message}", "broken off")
    return chunk


def _cut_off(url: str) -> ServerError:
    return ServerError(f"{url} ended a stream without [DONE]", "cut off")
