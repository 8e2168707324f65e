"""Servers over TCP, in a thread of the tests' process, so that tests can look behind them."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import httpx2
import pytest

from jaxserve import LLM
from jaxserve.server.run import Life, ServerOptions, listen
from jaxserve.server.service import Limits
from tests.jaxserve.conftest import EMBEDDED_SHAPES, EMBEDDED_SIZE, with_few_shapes
from tests.waiting import SOON, eventually


class Running(NamedTuple):
    """A server that answers."""

    url: str
    llm: Any  # once it is loaded
    life: Life
    statuses: list[int]  # its exit status, once it has ended

    def client(self, **options: Any) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=SOON, **options)


@contextmanager
def running(llm: LLM, limits: Limits | None = None, **options: Any) -> Iterator[Running]:
    """A server of a model that is loaded; it ends as after SIGTERM."""
    with starting(lambda: llm, limits, **options) as server:
        assert eventually(lambda: server.life.service.state == "ready")
        yield server._replace(llm=llm)


@contextmanager
def starting(load: Callable[[], Any], limits: Limits | None = None, **options: Any) -> Iterator[Running]:
    """A server that may still be loading."""
    settings = ServerOptions(names=["tiny", "alias"], limits=limits or Limits(), **{"step_timeout": 600.0} | options)
    life, statuses = Life(load, settings, lambda url: None), []
    with listen("127.0.0.1", 0) as sock:
        thread = threading.Thread(target=lambda: statuses.append(asyncio.run(life.live(sock))))
        thread.start()
        try:
            yield Running(f"http://127.0.0.1:{sock.getsockname()[1]}", None, life, statuses)
        finally:
            if not statuses:
                life.end()
            thread.join(SOON)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def embedded() -> LLM:
    """The embedded model, with few programs."""
    llm = LLM(dtype="float32", **EMBEDDED_SIZE)
    with_few_shapes(llm.engine, EMBEDDED_SHAPES)
    return llm


@pytest.fixture(scope="module")
def server(embedded: LLM) -> Iterator[Running]:
    with running(embedded) as server:
        yield server
