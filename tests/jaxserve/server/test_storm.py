"""Hundreds of clients at once, many of whom go away: the others get what they would have got alone."""

import asyncio
import gc
import json
import os
import random
import re
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.request import Request
from tests.jaxserve.server.conftest import Running, running
from tests.waiting import SOON, eventually

pytestmark = pytest.mark.xdist_group("server")

CLIENTS = 500
ROUNDS = 3
BUFFERS = 32 << 10
"""Bytes a request, of a round's, that memory may grow by: it varies by half of that."""

TEMPLATE = "{% for message in messages %}# {{ message['content'] }}\n{% endfor %}"
TEXTS = (
    "def ",
    "class A:\n    def __init__(self",
    "import ",
    "for i in range(",
    "return [",
    "# ä😀\n",
    "x = {'a': 1, ",
)


class Ask(NamedTuple):
    """What a client asks, and the texts that it must get."""

    path: str
    body: dict[str, Any]
    expected: list[str]


def make_asks(llm: LLM, count: int = 60) -> list[Ask]:
    """Mixed ones; what each is to get, `LLM` says."""
    rng, bodies = random.Random(0), []
    for i in range(count):
        body = {"max_tokens": rng.randrange(1, 16), "temperature": rng.choice([0, 0.8]), "seed": i}
        more = {"n": 2} if i % 5 == 0 else {"stop": ["(", "e"]} if i % 7 == 0 else {}
        bodies.append(("".join(rng.choices(TEXTS, k=rng.randrange(1, 5))), body | more))
    chats, plain = bodies[: count // 4], bodies[count // 4 :]
    asks = []
    for text, body in chats:
        messages = [{"role": "user", "content": text}]
        (result,) = llm.chat(messages, SamplingParams(**body))
        asks.append(Ask("/v1/chat/completions", body | {"messages": messages}, [o.text for o in result.outputs]))
    results = llm.generate([text for text, _ in plain], [SamplingParams(**body) for _, body in plain])
    for (text, body), result in zip(plain, results, strict=True):
        asks.append(Ask("/v1/completions", body | {"prompt": text}, [o.text for o in result.outputs]))
    return asks


async def stream(port: int, ask: Ask, leaves_after: int | None) -> str | None:
    """What is wrong with what comes, if anything is; of a client that leaves, after so many bytes, nothing can be."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = json.dumps(ask.body | {"stream": True}).encode()
    head = f"POST {ask.path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json"
    writer.write(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    if leaves_after is not None:
        await reader.read(leaves_after)
        writer.transport.abort()
        return None
    said = await asyncio.wait_for(reader.read(), 2 * SOON)
    writer.close()
    return None if texts(said) == ask.expected else f"{ask} got {said.decode()}"


def texts(said: bytes) -> list[str]:
    """Of each answer in a stream, from its chunks; nothing if it has not come to its end."""
    lines = re.findall("^data: (.*)$", said.decode(), re.MULTILINE)  # a chunk of the transfer is an event
    if lines[-1:] != ["[DONE]"]:
        return []
    found: dict[int, str] = {}
    for choice in (choice for line in lines[:-1] for choice in json.loads(line)["choices"]):
        piece = choice["text"] if "text" in choice else choice["delta"].get("content") or ""
        found[choice["index"]] = found.get(choice["index"], "") + piece
    return [found[index] for index in sorted(found)]


async def storm(port: int, asks: list[Ask], seed: int) -> list[str]:
    """All at once; a third leave at some moment, from before they have sent all to shortly before the end."""
    rng = random.Random(seed)
    leaves = [rng.choice([0, 1, 300, 2000, 6000]) if i % 3 == 0 else None for i in range(CLIENTS)]
    wrong = await asyncio.gather(*(stream(port, rng.choice(asks), each) for each in leaves))
    return [each for each in wrong if each]


class Pulse:
    """Asks for /health every 50 ms, in a thread, until it is told to end."""

    def __init__(self, server: Running):
        self.seconds: list[float] = []
        self.wrong: list[str] = []
        self._server, self._over = server, threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Pulse":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        with self._server.client() as http:
            while not self._over.wait(0.05):
                began = time.perf_counter()
                answer = http.get("/health")
                self.seconds.append(time.perf_counter() - began)
                if answer.status_code != 200:
                    self.wrong.append(answer.text)


class Kept(NamedTuple):
    """What this process has after a round. A request that is over but not forgotten is some objects more."""

    requests: int
    objects: int
    bytes: int

    @classmethod
    def now(cls) -> "Kept":
        gc.collect()
        objects = gc.get_objects()
        statm = Path("/proc/self/statm")
        pages = int(statm.read_text().split()[1]) if statm.exists() else 0
        return cls(sum(type(each) is Request for each in objects), len(objects), pages * os.sysconf("SC_PAGE_SIZE"))


def test_those_who_stay_get_their_texts_and_those_who_leave_leave_nothing(embedded):
    embedded.tokenizer.chat_templates = {"default": TEMPLATE}
    asks, before, kept = make_asks(embedded), Kept.now(), []
    counters = embedded.engine.counters
    with running(embedded) as server, Pulse(server) as pulse:
        for seed in range(ROUNDS):
            assert asyncio.run(storm(int(server.url.rpartition(":")[2]), asks, seed)) == []
            assert eventually(lambda: not embedded.engine.busy)
            assert counters.pages_used == counters.running == counters.waiting == 0
            assert eventually(lambda: Kept.now().requests == before.requests)
            kept.append(Kept.now())
    print(f"/health: worst of {len(pulse.seconds)} {max(pulse.seconds) * 1e3:.0f} ms; {kept}")
    assert not pulse.wrong and len(pulse.seconds) > ROUNDS
    _, second, third = kept  # the first warms up
    assert third.objects - second.objects < CLIENTS
    assert third.bytes - second.bytes < CLIENTS * BUFFERS
