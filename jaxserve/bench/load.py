"""Puts a load on a server and notes when what came.

In an open loop a request's latency counts from when it was *due*, not from when it was sent. A generator that lags, or
waits until few enough are open, makes a queue; counted from when they were sent, requests would hide it (coordinated
omission).
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

from jaxserve.client import AsyncClient, Chunk
from jaxserve.parallel.errors import ServerError
from jaxserve.progress import Progress


class Job(NamedTuple):
    """A request to send."""

    path: str
    body: dict[str, Any]
    arrival: float | None  # seconds after the start at which it is due; None: as soon as there is room


class Record(NamedTuple):
    """What became of a request. Times are seconds after the start."""

    due: float
    sent: float
    chunks: tuple[float, ...]  # when text came
    end: float
    prompt_tokens: int  # 0 if the server doesn't say
    cached_tokens: int
    output_tokens: int
    failure: str | None = None  # its kind
    message: str | None = None


class Load(NamedTuple):
    """What came of a load."""

    records: list[Record]  # of requests that ended, in the order in which they did
    asked: int  # more, if it was ended early
    seconds: float


async def run(
    client: AsyncClient, warmups: Sequence[Job], jobs: Sequence[Job], concurrency: int | None, progress: Progress
) -> Load:
    """Sends `warmups`, which don't count, then all jobs, `concurrency` at a time at most; closes the client.

    Ctrl-C ends the load early. Raises ServerError if a warm-up fails: then all would.
    """
    async with client:
        warm = await put(client, warmups, concurrency, partial(progress, "warming up"))
        for record in warm.records:
            if record.failure:
                raise ServerError(f"a request to warm up failed: {record.message}", record.failure)
        if len(warm.records) < len(warmups):
            raise asyncio.CancelledError
        return await put(client, jobs, concurrency, partial(progress, "asking"))


async def put(
    client: AsyncClient, jobs: Sequence[Job], concurrency: int | None, show: Callable[[int, int], None]
) -> Load:
    """Sends all jobs. Cancelled, it hangs up and returns what there is."""
    start, records = time.perf_counter(), []
    room = asyncio.Semaphore(concurrency) if concurrency else nullcontext()

    async def send(job: Job) -> None:
        if job.arrival is not None:
            await asyncio.sleep(start + job.arrival - time.perf_counter())
        async with room:
            records.append(await _measure(client, job, start))
        show(len(records), len(jobs))

    tasks = [asyncio.create_task(send(job)) for job in jobs]
    try:
        await asyncio.gather(*tasks)
    except asyncio.CancelledError:
        await asyncio.gather(*tasks, return_exceptions=True)
    return Load(records, len(jobs), time.perf_counter() - start)


async def _measure(client: AsyncClient, job: Job, start: float) -> Record:
    sent, chunks, usage, fault = time.perf_counter() - start, [], {}, (None, None)
    try:
        async for chunk in client.stream(job.path, job.body):
            if has_text(chunk):
                chunks.append(time.perf_counter() - start)
            usage = chunk.get("usage") or usage
    except ServerError as error:
        fault = error.kind, str(error)
    end = time.perf_counter() - start
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    output = usage.get("completion_tokens", len(chunks))  # a server that doesn't count sends a chunk a token
    due = sent if job.arrival is None else job.arrival
    return Record(due, sent, tuple(chunks), end, usage.get("prompt_tokens", 0), cached, output, *fault)


def has_text(chunk: Chunk) -> bool:
    """Whether something to read came: not in a chunk that only names the role, ends an answer, or counts."""
    said = [choice.get("delta", choice) for choice in chunk.get("choices") or ()]
    return any(part.get(name) for part in said for name in ("text", "content", "reasoning_content", "reasoning"))
