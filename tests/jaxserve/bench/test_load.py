import asyncio

import pytest

from jaxserve.bench.load import Job, Load, has_text, put, run
from jaxserve.client import AsyncClient
from jaxserve.parallel.errors import ServerError
from tests.jaxserve.openai_server import Fake, serving
from tests.waiting import eventually


def jobs(*prompts: str, arrivals=None, count: int = 3) -> list[Job]:
    bodies = [{"model": "fake", "prompt": prompt, "max_tokens": count} for prompt in prompts]
    times = arrivals or [None] * len(prompts)
    return [Job("/v1/completions", body, time) for body, time in zip(bodies, times, strict=True)]


def load(fake: Fake, wanted: list[Job], concurrency: int | None = None, warmups: list[Job] | None = None) -> Load:
    with serving(fake.app()) as url:
        return asyncio.run(run(AsyncClient(url), warmups or [], wanted, concurrency, lambda *_: None))


def test_what_came_is_noted_with_the_server_s_own_counts():
    (record,) = load(Fake(delay=0.02), jobs("abcd")).records
    assert (record.prompt_tokens, record.cached_tokens, record.output_tokens, record.failure) == (4, 2, 3, None)
    assert len(record.chunks) == 3 and record.due == record.sent
    times = [chunk - record.sent for chunk in record.chunks]
    assert all(0.02 * (number + 1) <= time for number, time in enumerate(times))  # each is sent so much after another
    assert times == sorted(times) and record.chunks[2] <= record.end


def test_in_a_closed_loop_so_many_are_open_at_a_time():
    fake, told = Fake(together=3), []
    with serving(fake.app()) as url:
        asyncio.run(run(AsyncClient(url), [], jobs(*"abcdefghi"), 3, lambda *call: told.append(call)))
    assert fake.most_open == 3
    assert told == [("asking", i, 9) for i in range(1, 10)]


def test_in_an_open_loop_requests_go_when_they_are_due_whoever_else_is_open():
    fake = Fake(together=3)
    records = load(fake, jobs("a", "b", "c", arrivals=[0.0, 0.05, 0.1])).records
    assert sorted(record.due for record in records) == [0.0, 0.05, 0.1]
    assert all(record.due <= record.sent for record in records)
    assert max(record.sent for record in records) <= min(record.chunks[0] for record in records)
    assert fake.most_open == 3


def test_a_request_that_has_to_wait_for_another_counts_from_when_it_was_due():
    first, second = load(Fake(delay=0.1), jobs("a", "b", arrivals=[0.0, 0.0], count=2), concurrency=1).records
    assert second.due == 0.0
    assert second.sent >= first.end >= 0.2
    assert second.chunks[0] - second.due >= 0.3


def test_what_fails_is_noted_and_leaves_the_others_as_they_are():
    records = load(Fake(), jobs("refuse", "break", "fine"), concurrency=1).records
    assert [record.failure for record in records] == ["HTTP 400", "broken off", None]
    assert "a step failed" in (records[1].message or "") and len(records[1].chunks) == 1


def test_warm_ups_do_not_count_and_one_that_fails_ends_the_load():
    fake = Fake()
    assert len(load(fake, jobs("x"), warmups=jobs("w", "w")).records) == 1
    assert [body["prompt"] for body in fake.asked] == ["w", "w", "x"]
    with pytest.raises(ServerError, match="a request to warm up failed: .*'refuse' is refused"):
        load(fake, jobs("x"), warmups=jobs("refuse"))
    assert fake.asked[-1]["prompt"] == "refuse"


@pytest.mark.parametrize("warmups", [0, 3])
def test_cancelled_it_hangs_up_and_gives_what_there_is_unless_it_has_not_begun(warmups):
    fake = Fake(delay=0.01)
    first, then = jobs(*"www"[:warmups], count=10_000), [*jobs("a", count=1), *jobs("b", count=10_000)]

    async def cancel_when_asked_for(count: int, url: str) -> Load:
        task = asyncio.ensure_future(run(AsyncClient(url), first, then, 1, lambda *_: None))
        while len(fake.asked) < count:
            await asyncio.sleep(0.001)
        task.cancel()
        return await task

    with serving(fake.app()) as url:
        if warmups:
            with pytest.raises(asyncio.CancelledError):
                asyncio.run(cancel_when_asked_for(1, url))
        else:
            found = asyncio.run(cancel_when_asked_for(2, url))
            assert (len(found.records), found.asked) == (1, 2)
        assert eventually(lambda: not fake.open)


@pytest.mark.parametrize(
    ("chunk", "some"),
    [
        ({"choices": [{"text": "a"}]}, True),
        ({"choices": [{"text": ""}]}, False),
        ({"choices": [{"delta": {"role": "assistant", "content": ""}}]}, False),
        ({"choices": [{"delta": {"content": "a"}}]}, True),
        ({"choices": [{"delta": {"reasoning_content": "a"}}]}, True),
        ({"choices": [{"delta": {}, "finish_reason": "stop"}]}, False),
        ({"choices": [], "usage": {"completion_tokens": 3}}, False),
    ],
)
def test_only_what_can_be_read_counts_as_text(chunk, some):
    assert has_text(chunk) == some


def test_without_a_server_every_request_is_a_failure_of_the_same_kind():
    found = asyncio.run(put(AsyncClient("http://127.0.0.1:1"), jobs("a", "b"), None, lambda *_: None))
    assert {record.failure for record in found.records} == {"no connection"}
