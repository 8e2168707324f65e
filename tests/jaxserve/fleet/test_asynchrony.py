"""No step of decode waits for a prompt, however long that takes; in one engine that does both, they do."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from jaxserve.engine import Engine
from jaxserve.request import Request, SamplingParams
from tests.jaxserve.fleet.conftest import end, listen, make_fleet

pytestmark = pytest.mark.xdist_group("embedded")

SHORT = Request("short", (5, 7, 9), SamplingParams(temperature=0, max_tokens=100, ignore_eos=True))
LONG = Request("long", tuple(range(2, 102)), SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
SECONDS = 60.0


@contextmanager
def held_up(engine: Engine) -> Iterator[tuple[threading.Event, threading.Event]]:
    """An engine whose next steps with prompts wait; whether one does, and that they may go on."""
    waits, go_on, prefill = threading.Event(), threading.Event(), engine._prefill

    def wait(*given):
        waits.set()
        assert go_on.wait(SECONDS)
        return prefill(*given)

    engine._prefill = wait  # type: ignore[method-assign]
    try:
        yield waits, go_on
    finally:
        go_on.set()
        del engine._prefill


def begun(heard) -> bool:
    return any(key[0] == "short" and len(each.tokens) > 4 for key, each in heard.items())


def complete(id: str) -> Callable[[dict], bool]:
    return lambda heard: any(key[0] == id and each.last.finish_reason for key, each in heard.items())


def test_answers_are_generated_to_the_end_while_a_prompt_takes_for_ever(engines):
    alone = engines["alone"]
    for request in (SHORT, LONG):
        alone.add(request)
    wanted = {key: each.tokens for key, each in listen(alone).items()}
    fleet, locals = make_fleet(engines, "P1", "D1")
    fleet.add(SHORT)
    heard = listen(fleet, until=begun)
    with held_up(engines["P1"]) as (waits, go_on):
        fleet.add(LONG)
        heard = listen(fleet, until=complete("short"), heard=heard)
        assert waits.wait(SECONDS) and not go_on.is_set() and ("long", 0) not in heard
    heard = listen(fleet, heard=heard)
    assert {key: each.tokens for key, each in heard.items()} == wanted
    end(engines, locals)


def test_in_one_engine_they_wait_for_it(engines):
    alone = engines["alone"]
    alone.add(SHORT)
    heard = listen(alone, until=begun)
    with held_up(alone) as (waits, go_on):
        alone.add(LONG)
        stepping = threading.Thread(target=lambda: listen(alone, heard=heard))
        stepping.start()
        assert waits.wait(SECONDS)
        count = len(heard["short", 0].tokens)
        stepping.join(0.5)
        assert stepping.is_alive() and len(heard["short", 0].tokens) == count < 100
        go_on.set()
        stepping.join(SECONDS)
    assert len(heard["short", 0].tokens) == 100 and len(heard["long", 0].tokens) == 4
