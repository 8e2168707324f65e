"""What all endpoints share: the model that is served, its limits, and who may ask how much at once."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from jaxserve.async_engine import AsyncEngine, settle
from jaxserve.parallel.errors import RequestError
from jaxserve.request import Output, Request, SamplingParams
from jaxserve.server.errors import AGAIN, ApiError
from jaxserve.server.load import ExpertLoad
from jaxserve.server.metrics import Metrics
from jaxserve.tokenizer import Tokenizer

LONG = 1 << 16
"""Characters of a text that takes long to be made tokens of, and much memory."""

State = Literal["loading", "waiting", "ready", "draining", "failed"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a client may ask for; None: no limit but the engine's own."""

    body_bytes: int = 8 << 20
    prompt_tokens: int | None = None
    answers: int = 128  # of one request: prompts times n
    max_tokens: int | None = None  # of an answer
    concurrency: int | None = None  # requests at once with the same key
    seconds: float = 600.0  # of a request; clients may ask for less
    priority: bool = False  # whether clients may say who comes first


class Loaded(NamedTuple):
    """What there is once the model is loaded."""

    engine: AsyncEngine
    tokenizer: Tokenizer
    metrics: Metrics
    load: ExpertLoad


class Servable(NamedTuple):
    """A model that can be served: how clients call it, and what loads it, in a thread of its own."""

    names: Sequence[str]
    load: Callable[[], Any]


class Wish(NamedTuple):
    """Somebody wants another model to be served."""

    model: Servable
    answer: asyncio.Future[None]


class Service:
    """The model that is served.

    `state` is "loading" until it has what `ready` is given, and while it gets another; "waiting" while nobody is there
    who generates answers.
    """

    def __init__(self, names: Sequence[str], limits: Limits, find: Callable[[str], Servable]):
        """`names` are those that clients may call the model by; the first is its own. `find` gives other models.

        It raises RequestError for what is none that clients may have served.
        """
        self._find = find
        self.names, self.limits, self.created = list(names), limits, int(time.time())
        self._loaded: Loaded | None = None
        self._draining = False
        self.wish: Wish | None = None  # for another model, until that is served, or can't be
        self.wished = asyncio.Event()
        self._busy: Counter[str | None] = Counter()  # requests by key
        # What may take long has a thread of its own, so that others always find one.
        self._long, self._forms = ThreadPoolExecutor(1, "long texts"), ThreadPoolExecutor(1, "forms")
        self.idle = asyncio.Event()  # no request is being answered
        self.idle.set()

    def ready(self, loaded: Loaded, names: Sequence[str]) -> None:
        """A model is loaded and warm, which clients call by these names."""
        self._loaded, self.names = loaded, list(names)

    def unload(self) -> None:
        """Forgets the model: there is none until the next is ready."""
        self._loaded = None

    async def switch(self, name: str) -> None:
        """Has another model served; returns when it is. Raises ApiError if it can't be, or not now."""
        if name in self.names and self.state == "ready":
            return
        try:
            model = await asyncio.to_thread(self._find, name)
        except RequestError as error:
            raise ApiError(404, str(error), param="model", code="model_not_found") from None
        if self._draining:
            raise _draining()
        if self._loaded is None or self.wish:
            raise _loading()
        self.wish = Wish(model, asyncio.get_running_loop().create_future())
        self.wished.set()
        await self.wish.answer

    def end_wish(self, error: Exception | None = None) -> None:
        """Tells whoever wished for another model that it is there, or what went wrong."""
        if self.wish:
            settle(self.wish.answer, None, error)
        self.wish = None
        self.wished.clear()

    @property
    def state(self) -> State:
        if self._loaded is None:
            return "loading"
        if self._loaded.engine.failure:
            return "failed"
        if self.wish:
            return "loading"
        if self._draining:
            return "draining"
        return "ready" if self._loaded.engine.engine.ready else "waiting"

    @property
    def loaded(self) -> Loaded:
        """Raises ApiError while there is nothing yet."""
        if self._loaded is None:
            raise _loading()
        return self._loaded

    @property
    def max_model_len(self) -> int:
        return self.loaded.engine.engine.max_model_len

    async def drain(self) -> None:
        """Refuses what comes; returns when all that was accepted is answered."""
        self._draining = True
        await self.idle.wait()

    @asynccontextmanager
    async def accepted(self, key: str | None) -> AsyncIterator[None]:
        """A request of the owner of a key, while it is answered. Raises ApiError if it can't be now."""
        if self._draining:
            raise _draining()
        if self.wish:
            raise _loading()
        most = self.limits.concurrency
        if most is not None and self._busy[key] >= most:
            message = f"{most} requests of yours are being answered, as many as may be at once; wait for one of them"
            raise ApiError(429, message, code="too_many_requests", headers={"Retry-After": "1"})
        self._busy[key] += 1
        self.idle.clear()
        try:
            yield
        finally:
            self._busy[key] -= 1
            self._busy += Counter()  # forgets keys without any
            if not self._busy:
                self.idle.set()

    def most_tokens(self, asked: int | None, default: int | None = None) -> int | None:
        """Tokens of an answer: so many as a client asks for, else the `default`, within the limit; None: no limit."""
        if asked is not None:
            return asked
        return min((most for most in (default, self.limits.max_tokens) if most is not None), default=None)

    @property
    def open(self) -> int:
        """Requests that are being answered."""
        return self._busy.total()

    def check_model(self, name: str | None) -> None:
        if name is not None and name not in self.names:
            message = f"model {name!r} is not served here; there is {', '.join(map(repr, self.names))}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Tokens of a text; long ones take time, which others must not wait for."""
        encode = self.loaded.tokenizer.encode
        if len(text) < LONG:
            return await asyncio.to_thread(encode, text, add_special_tokens)
        return await asyncio.get_running_loop().run_in_executor(self._long, encode, text, add_special_tokens)

    async def check(self, requests: Sequence[Request]) -> None:
        """Raises RequestError if one can't be served. Forms are compiled here, not in the engine's thread."""
        self.check_count(sum(request.params.n for request in requests))
        for request in requests:
            if request.priority and not self.limits.priority:
                raise RequestError(
                    "priority: clients don't choose it here; leave it out, or serve with --allow-priority"
                )
            self._check_lengths(request.prompt_token_ids, request.params)
            pool = self._forms if request.params.structured_outputs else None
            await asyncio.get_running_loop().run_in_executor(pool, self.loaded.engine.engine.check, request)

    def check_count(self, answers: int) -> None:
        """Raises RequestError if a request asks for more answers than one may."""
        if answers > (most := self.limits.answers):
            raise RequestError(
                f"n = {answers} answers, of all prompts together: at most {most} can be asked for at once"
            )

    def _check_lengths(self, tokens: Sequence[int], params: SamplingParams) -> None:
        longest, most = self.limits.prompt_tokens, self.limits.max_tokens
        if longest is not None and len(tokens) > longest:
            raise RequestError(f"prompt has {len(tokens)} tokens; this server takes {longest}; shorten it")
        if most is not None and (params.max_tokens or 0) > most:
            raise RequestError(f"max_tokens = {params.max_tokens}: this server gives {most} at most")

    def deadline(self, seconds: float | None) -> float:
        """When a request is over that its client gives so much time, by the event loop's clock."""
        allowed = self.limits.seconds if seconds is None else min(seconds, self.limits.seconds)
        return asyncio.get_running_loop().time() + allowed

    @asynccontextmanager
    async def outputs(
        self, requests: Sequence[Request], deadline: float
    ) -> AsyncIterator[AsyncIterator[tuple[int, Output]]]:
        """What comes of some requests, with the number of each; see `AsyncEngine.submit`."""
        numbers = {request.id: number for number, request in enumerate(requests)}
        async with self.loaded.engine.submit(requests, deadline) as outputs:
            yield ((numbers[output.request_id], output) async for output in outputs)


def _loading() -> ApiError:
    return ApiError(503, "the model is being loaded; try again", code="loading", headers=AGAIN)


def _draining() -> ApiError:
    message = "the server is shutting down, and finishes only what it has begun; ask another one"
    return ApiError(503, message, code="draining", headers=AGAIN | {"Connection": "close"})
