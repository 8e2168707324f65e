"""A server of OpenAI's protocol that has no model: it says `w0 w1 w2 …`, and keeps what it was asked."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.waiting import SOON


class Fake:
    """What a server does, by the prompt it is given.

    A prompt that begins with `refuse` is answered with 400, with `break` by a fault after a word, with `cut` by a
    stream that ends after a word, with `html` by a page, with `think` by two words of thoughts first; `full` is
    answered with 429 once. A word takes `delay`; the first one comes when so many answers have been open `together`.
    """

    def __init__(self, delay: float = 0.0, chat: bool = True, tokenizes: bool = True, together: int = 0):
        self.delay, self.chat, self.tokenizes, self.together = delay, chat, tokenizes, together
        self.asked: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.open = self.most_open = 0

    def app(self) -> Starlette:
        posts = {
            "/v1/completions": self.completions,
            "/v1/chat/completions": self.completions,
            "/tokenize": self.tokenize,
            "/detokenize": self.detokenize,
        }
        routes = [Route(path, answer, methods=["POST"]) for path, answer in posts.items()]
        return Starlette(routes=[*routes, Route("/v1/models", self.models), Route("/version", self.version)])

    async def version(self, request: Request) -> Response:
        return JSONResponse({"version": "1.2.3"})

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "fake", "object": "model", "chat": self.chat}]})

    async def tokenize(self, request: Request) -> Response:
        text = (await request.json())["prompt"]
        return JSONResponse({"tokens": [7 + len(word) for word in text.split()]} if self.tokenizes else {})

    async def detokenize(self, request: Request) -> Response:
        return JSONResponse({"prompt": " ".join(f"<{token}>" for token in (await request.json())["tokens"])})

    async def completions(self, request: Request) -> Response:
        body = await request.json()
        self.asked.append(body)
        self.keys.add(request.headers.get("authorization"))
        prompt = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        said = prompt if isinstance(prompt, str) else ""
        if said.startswith("refuse"):
            return error(400, f"{said!r} is refused")
        if said.startswith("html"):
            return Response("<html>", 502, media_type="text/html")
        if said.startswith("full") and len(self.asked) == 1:
            return error(429, "the queue is full", {"Retry-After": "0"})
        if not body.get("stream"):
            return JSONResponse({"choices": [{"text": "w0 ", "message": {"content": "w0 "}}]})
        return StreamingResponse(self.stream(body, said, len(prompt)), media_type="text/event-stream")

    async def stream(self, body: dict[str, Any], said: str, size: int) -> AsyncIterator[str]:
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            async for event in self.events(body, said, size):
                yield f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n"
        finally:
            self.open -= 1

    async def events(self, body: dict[str, Any], said: str, size: int) -> AsyncIterator[Any]:
        """A role first, in a chat, as others do; then words, then the reason of the end, then the counts."""
        if "messages" in body:
            yield {"choices": [{"delta": {"role": "assistant", "content": ""}}]}
        end = time.monotonic() + SOON
        while self.most_open < self.together and time.monotonic() < end:
            await asyncio.sleep(0.001)
        for i in range(body["max_tokens"]):
            await asyncio.sleep(self.delay)
            word = f"w{i} "
            part = "reasoning_content" if said.startswith("think") and i < 2 else "content"
            yield {"choices": [{"delta": {part: word}} if "messages" in body else {"text": word}]}
            if said.startswith("break"):
                yield {"error": {"message": "a step failed", "type": "server_error", "param": None, "code": None}}
                break
            if said.startswith("cut"):
                return
        yield {"choices": [{"text": "", "delta": {}, "finish_reason": "length"}]}
        usage = {"prompt_tokens": size, "completion_tokens": body["max_tokens"]}
        yield {"choices": [], "usage": usage | {"prompt_tokens_details": {"cached_tokens": size // 2}}}
        yield "[DONE]"


def error(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    content = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}
    return JSONResponse(content, status, headers)


@contextmanager
def serving(app: Starlette) -> Iterator[str]:
    """Serves on a free port for as long as the block runs; gives the URL."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
