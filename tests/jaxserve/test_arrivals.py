"""Pages that arrive hold up no answer that runs: few are filled in before a step, and no token changes by that."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from jaxserve.engine import Engine
from jaxserve.layout import PageLayout
from jaxserve.request import Request, SamplingParams
from jaxserve.scheduler import Fill
from jaxserve.tiers.store import StoreConfig, open_store
from tests.jaxserve.conftest import tokens
from tests.jaxserve.connected import ASKED, NAMES, PAGE, SEEDED, connected, connector_of, forget, run, stored
from tests.jaxserve.test_product import prompts

LONG = prompts("embedded")[-1]
PAGES = (len(LONG) - 1) // PAGE
ON_RANKS = [
    pytest.param(ranks, marks=pytest.mark.xdist_group("connector 0 False"), id=f"{ranks} ranks") for ranks in (1, 2, 4)
]


class Stage:
    """An engine that has a prompt in its store, fills in a page a step, and has answers running."""

    def __init__(self, engine: Engine, patch: pytest.MonkeyPatch):
        self.engine, self.filled, self.said = engine, list[int](), dict[str, list[Any]]()
        fill = engine._porter.fill

        def spy(cache: Any, fills: Iterator[Fill]) -> Any:
            fills = list(fills)
            self.filled.append(sum(len(each.pages) for each in fills))
            return fill(cache, fills)

        patch.setattr(engine._porter, "fill", spy)
        for scheduler in engine._schedulers:
            patch.setattr(scheduler, "limits", scheduler.limits._replace(filled=1))

    def ask(self, prompt: tuple[int, ...], params: SamplingParams) -> str:
        name = str(next(NAMES))
        self.said[name] = []
        self.engine.add(Request(name, prompt, params))
        return name

    def step(self) -> set[str]:
        """Who has said something."""
        outputs = self.engine.step()
        for output in outputs:
            self.said[output.request_id].append(output)
        return {output.request_id for output in outputs}

    def until(self, condition: Callable[[], object]) -> None:
        for _ in range(2000):
            if condition():
                return
            self.step()
        raise AssertionError

    def end(self) -> None:
        self.until(lambda: not self.engine.busy)
        assert sum(scheduler.pool.used for scheduler in self.engine._schedulers) == 0

    def filling(self) -> list[Any]:
        return [s for scheduler in self.engine._schedulers for s in scheduler.running if s.brought]


@pytest.fixture
def stage(request, monkeypatch) -> Iterator[Stage]:
    engine = connected("embedded", 0, request.param)
    forget(engine)
    with ExitStack() as opened:
        opened.enter_context(stored(engine, open_store(StoreConfig())))
        run(engine, [Request(str(next(NAMES)), LONG, ASKED)])
        connector_of(engine).flush()
        forget(engine)
        yield Stage(engine, monkeypatch)


def test_pages_are_unpacked_to_where_xla_takes_them_as_they_lie():
    layout = PageLayout({"c": np.zeros((1, PAGE, 64), np.float32), "r": np.zeros((1, PAGE, 3), np.int8)})
    given = {"c": np.random.default_rng(0).random((2, PAGE, 64), np.float32), "r": np.ones((2, PAGE, 3), np.int8)}
    found = layout.unpack([layout.pack(given, index) for index in range(2)])
    for name, array in given.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].ctypes.data % 64 == 0


def alone(ranks: int, prompt: tuple[int, ...], params: SamplingParams) -> list[int]:
    engine = connected("embedded", 0, ranks)
    forget(engine)
    (outputs,) = run(engine, [Request(str(next(NAMES)), prompt, params)])
    return tokens(outputs)


ENDLESS = replace(SEEDED, max_tokens=60)


@pytest.mark.parametrize("stage", ON_RANKS, indirect=True)
def test_answers_that_run_get_a_token_in_each_step_while_pages_arrive(stage):
    running = stage.ask((5, 6, 7), ENDLESS)
    stage.until(lambda: len(stage.said[running]) > 1)
    coming = stage.ask(LONG, SEEDED)
    stage.until(lambda: any(stage.filled))
    before = len(stage.filled)
    while not stage.said[coming]:
        assert running in stage.step()
    assert max(stage.filled) == 1 and sum(stage.filled) >= PAGES - 1
    assert sum(stage.filled[before - 1 : before + PAGES - 2]) == PAGES - 1  # in as many steps, one after another
    stage.end()
    ranks = len(stage.engine._schedulers)
    found = tokens(stage.said[coming]), tokens(stage.said[running])
    assert found == (alone(ranks, LONG, SEEDED), alone(ranks, (5, 6, 7), ENDLESS))


def give_up(stage: Stage, name: str) -> None:
    stage.engine.abort(name)


def preempt(stage: Stage, name: str) -> None:
    (s,) = stage.filling()
    stage.engine._schedulers[s.rank].preempt(s)


@pytest.mark.parametrize("fate", [give_up, preempt])
@pytest.mark.parametrize("stage", ON_RANKS, indirect=True)
def test_what_becomes_of_one_whose_pages_are_filled_in_changes_no_token(stage, fate):
    running = stage.ask((5, 6, 7), ENDLESS)
    coming = stage.ask(LONG, SEEDED)
    stage.until(stage.filling)
    fate(stage, coming)
    after = stage.ask(LONG, SEEDED)
    stage.end()
    ranks = len(stage.engine._schedulers)
    wanted = alone(ranks, LONG, SEEDED)
    assert tokens(stage.said[after]) == wanted
    assert tokens(stage.said[coming]) == ([] if fate is give_up else wanted)
    assert tokens(stage.said[running]) == alone(ranks, (5, 6, 7), ENDLESS)


@pytest.mark.parametrize("stage", ON_RANKS[:2], indirect=True)
def test_several_answers_have_pages_filled_in_once_for_each_rank(stage):
    ranks = len(stage.engine._schedulers)
    name = stage.ask(LONG, replace(SEEDED, n=3))
    stage.end()
    assert sum(stage.filled) <= ranks * PAGES
    first = [output for output in stage.said[name] if output.index == 0]
    assert tokens(first) == alone(ranks, LONG, SEEDED)
