"""An engine in a thread of its own, in an event loop of the test's."""

import asyncio
import threading

import pytest

from jaxserve import RequestError, SamplingParams
from jaxserve.async_engine import AsyncEngine
from jaxserve.parallel.errors import EngineError
from jaxserve.request import Request
from tests.jaxserve.conftest import greedy, serve, tokens


class Watcher:
    """Notes what an observer is told."""

    def __init__(self):
        self.events = []

    def began(self, request):
        self.events.append(("began", request.id))

    def said(self, outputs):
        self.events += [("said", output.request_id) for output in outputs]

    def left(self, request, served):
        self.events.append(("left", request.id))


def run(engine, use, patience=60.0):
    """What `use` returns, given the engine in its thread; at the end nothing is left of any request."""

    async def main():
        driver = AsyncEngine(engine, Watcher(), patience)
        try:
            return await use(driver)
        finally:
            await driver.stop()
            assert driver.open == 0

    return asyncio.run(main())


async def answer(driver, *requests, deadline=None):
    found = {request.id: [] for request in requests}
    async with driver.submit(requests, deadline) as outputs:
        async for output in outputs:
            found[output.request_id] += output.token_ids
    return list(found.values())


def test_requests_that_come_together_and_apart_get_what_the_engine_gives_alone(make_engine):
    prompts = [(5, 7, 11), (3,), (2, 4)]
    expected = [tokens(o) for o in serve(make_engine(), prompts, greedy(12))]
    requests = [Request(str(i), prompt, greedy(12)) for i, prompt in enumerate(prompts)]

    async def use(driver):
        return await asyncio.gather(answer(driver, *requests[:2]), answer(driver, requests[2]))

    together, apart = run(make_engine(), use)
    assert together + apart == expected


def test_of_requests_that_come_together_none_begins_if_one_can_not(make_engine):
    engine = make_engine()

    async def use(driver):
        with pytest.raises(RequestError, match="request id 'x' is taken"):
            await answer(driver, Request("x", (5,), greedy(4)), Request("x", (6,), greedy(4)))
        return await driver.ask(lambda: engine.busy)

    assert run(engine, use) is False


def test_a_request_that_is_given_up_while_it_waits_to_be_taken_is_never_answered(make_engine):
    engine, go = make_engine(), threading.Event()

    async def use(driver):
        held = asyncio.ensure_future(driver.ask(lambda: go.wait(60)))
        task = asyncio.ensure_future(answer(driver, Request("x", (5,), greedy(100))))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()
        go.set()
        await held
        await driver.ask(lambda: None)
        return await driver.ask(lambda: (engine.busy, engine.counters.generated_tokens))

    assert run(engine, use) == (False, 0)


def test_an_observer_is_told_when_requests_begin_what_is_said_and_when_nobody_waits_any_more(make_engine):
    async def use(driver):
        await answer(driver, Request("x", (5,), greedy(2)))
        return driver._observer.events

    events = run(make_engine(), use)
    assert events[0] == ("began", "x") and events[-1] == ("left", "x")
    assert {("said", "x")} == set(events[1:-1])


def test_what_is_asked_of_the_engine_may_raise(make_engine):
    async def use(driver):
        with pytest.raises(ZeroDivisionError):
            await driver.ask(lambda: 1 / 0)
        return await driver.ask(lambda: 5)

    assert run(make_engine(), use) == 5


def test_a_deadline_ends_a_request(make_engine, monkeypatch):
    engine = make_engine()
    step = engine._step
    monkeypatch.setattr(engine, "_rounds", lambda: 1)
    monkeypatch.setattr(engine, "_step", lambda: (threading.Event().wait(0.05), step())[1])

    async def use(driver):
        with pytest.raises(TimeoutError):
            deadline = asyncio.get_running_loop().time() + 0.3
            await answer(driver, Request("x", (5,), greedy(100)), deadline=deadline)
        return await driver.ask(lambda: engine.busy)

    assert run(engine, use) is False


def test_an_engine_that_hangs_when_it_is_to_stop_is_left_behind(make_engine, monkeypatch):
    engine, go = make_engine(), threading.Event()
    monkeypatch.setattr(engine, "_step", lambda: go.wait(20) and [])

    async def use(driver):
        task = asyncio.ensure_future(answer(driver, Request("x", (5,), greedy(4))))
        while driver.runner.began is None:
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        async with asyncio.timeout(10):
            await driver.stop()
        assert driver.runner.running
        go.set()

    run(engine, use, patience=1.0)


def test_an_engine_that_hangs_fails_all_who_wait_and_all_who_come(make_engine, monkeypatch):
    engine, go = make_engine(), threading.Event()
    monkeypatch.setattr(engine, "_step", lambda: go.wait(60) and [])

    async def use(driver):
        waiting = asyncio.ensure_future(answer(driver, Request("x", (5,), greedy(4))))
        while driver.runner.began is None:
            await asyncio.sleep(0.01)
        asking = asyncio.ensure_future(driver.ask(lambda: None))
        for each in (waiting, asking):
            with pytest.raises(EngineError, match="a step has taken longer than 0.2 s"):
                await each
        with pytest.raises(EngineError):
            await answer(driver, Request("y", (5,), SamplingParams()))
        assert driver.failed.is_set()

    run(engine, use, patience=0.2)
    go.set()


def test_what_is_asked_of_the_engine_may_hang_no_longer_than_a_step(make_engine):
    go = threading.Event()

    async def use(driver):
        with pytest.raises(EngineError, match="longer than 0.2 s"):
            await driver.ask(lambda: go.wait(60))

    run(make_engine(), use, patience=0.2)
    go.set()


def test_all_who_wait_for_an_engine_that_stops_are_told_and_all_who_come(make_engine, monkeypatch):
    engine, inside, go = make_engine(), threading.Event(), threading.Event()
    monkeypatch.setattr(engine, "_step", lambda: [inside.set(), go.wait(60)] and [])

    async def use(driver):
        waiting = asyncio.ensure_future(answer(driver, Request("x", (5,), greedy(4))))
        await asyncio.to_thread(inside.wait, 60)
        asking = asyncio.ensure_future(driver.ask(lambda: None))
        await asyncio.sleep(0)
        stopping = asyncio.ensure_future(driver.stop())
        await asyncio.sleep(0)
        go.set()
        await stopping
        for each in (waiting, asking, driver.ask(lambda: None)):
            with pytest.raises(EngineError, match="stopped"):
                await asyncio.wait_for(each, 60)

    run(engine, use)
