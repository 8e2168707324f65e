"""A server with the page's routes that says what it is told to, and holds its breath when it is told to."""

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

STATIC = Path(__file__).parents[3] / "jaxserve" / "server" / "static"
POLICY = {"Content-Security-Policy": "default-src 'self'; form-action 'none'"}
TOKENS = ["def", " add", "(", "a", ",", " b", "):", "\n", "   ", " return", " a", " +", " b", "\n"]


class Fake:
    """What the server says, and what it was asked."""

    def __init__(self) -> None:
        self.chat = True
        self.key = ""
        self.thoughts: list[str] = []
        self.tokens = TOKENS
        self.loading = False
        self.hold: int | None = None  # the number of tokens after which no more come
        self.refusal: JSONResponse | None = None  # of requests for answers
        self.fault = ""  # amid a stream
        self.asked: list[dict[str, Any]] = []
        self.aborted = 0

    def app(self) -> Starlette:
        routes = [
            Route("/", lambda _: FileResponse(STATIC / "index.html", headers=POLICY)),
            Mount("/static", StaticFiles(directory=STATIC)),
            Route("/v1/models", self.models),
            Route("/v1/completions", self.answer, methods=["POST"]),
            Route("/v1/chat/completions", self.answer, methods=["POST"]),
            Route("/stats", self.stats),
        ]
        return Starlette(routes=routes)

    def refused(self, request: Request) -> Response | None:
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return error("the key is wrong", 401)
        return error("the model is being loaded; try again", 503) if self.loading else None

    async def models(self, request: Request) -> Response:
        if refused := self.refused(request):
            return refused
        return JSONResponse({"object": "list", "data": [{"id": "fake", "object": "model", "chat": self.chat}]})

    async def answer(self, request: Request) -> Response:
        if refused := self.refused(request):
            return refused
        body = await request.json()
        self.asked.append(body)
        if self.refusal:
            return self.refusal
        return StreamingResponse(self.stream(body), media_type="text/event-stream")

    async def stream(self, body: dict[str, Any]) -> AsyncIterator[str]:
        choice = chat_choice if "messages" in body else text_choice
        for thought in self.thoughts:
            yield event({"choices": [chat_choice(thought, None, "reasoning_content")]})
        try:
            for i, token in enumerate(self.tokens):
                while i == self.hold:
                    await asyncio.sleep(0.01)
                last = i == len(self.tokens) - 1
                yield event({"choices": [choice(token, "length" if last and not self.fault else None)]})
        except asyncio.CancelledError:
            self.aborted += 1
            raise
        if self.fault:
            yield event({"error": {"message": self.fault}})
        else:
            usage = {"prompt_tokens": 7, "completion_tokens": len(self.tokens), "total_tokens": 7 + len(self.tokens)}
            yield event({"choices": [], "usage": usage | {"prompt_tokens_details": {"cached_tokens": 4}}})
        yield "data: [DONE]\n\n"

    async def stats(self, request: Request) -> Response:
        if refused := self.refused(request):
            return refused
        now = time.monotonic()
        seconds = {"p50": 0.021, "p90": 0.034, "p99": 1.21}
        return JSONResponse({
            "model": "fake", "state": "ready", "uptime": now,
            "requests": {"running": 3, "waiting": 1, "slots": 8, "finished": 17},
            "cache": {"used": 160, "pages": 640, "page_size": 64},
            "tokens": {"prompt": 1234, "cached": 617, "generated": int(50 * now)},
            "latency": {"time_to_first_token": seconds, "inter_token": seconds, "end_to_end": None},
            "drafts": {"rows": 100, "accepted": [61, 40]},
            "experts": {"layers": [0, 1, 2], "tokens": [[0] * 16, [10, 20, 30, 40] * 4, [0, 0, 20, 80] * 4]},
            "steps": 99, "preemptions": 0, "compilations": {"warmup": 12, "late": 0},
        })  # fmt: skip


def error(message: str, status: int, **headers: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, status, headers)


def event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


def alternatives(token: str) -> list[tuple[str, float]]:
    """The token has three quarters of the probability, another one a fifth."""
    return [(token, math.log(0.75)), (" yield", math.log(0.2))]


def text_choice(token: str, finish: str | None) -> dict[str, Any]:
    top = alternatives(token)
    logprobs = {"tokens": [token], "token_logprobs": [top[0][1]], "top_logprobs": [dict(top)], "text_offset": [0]}
    return {"index": 0, "text": token, "logprobs": logprobs, "finish_reason": finish}


def chat_choice(token: str, finish: str | None, part: str = "content") -> dict[str, Any]:
    top = [{"token": text, "logprob": logprob, "bytes": list(text.encode())} for text, logprob in alternatives(token)]
    return {
        "index": 0,
        "delta": {part: token},
        "logprobs": {"content": [top[0] | {"top_logprobs": top}]},
        "finish_reason": finish,
    }
