"""Pages that were kept in a store behind the engine: they change no token, whatever becomes of the store."""

import errno
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from jaxserve.engine import Engine
from jaxserve.request import Output, Request
from jaxserve.tiers import disk
from jaxserve.tiers.store import Store, StoreConfig, open_store
from tests.jaxserve.conftest import tokens
from tests.jaxserve.connected import (
    ASKED,
    FORMS,
    GREEDY,
    NAMES,
    NOTHING,
    PAGE,
    SEEDED,
    answers,
    check_answers,
    connected,
    connector_of,
    expected,
    forget,
    handed_over,
    requests,
    run,
    stored,
    stores,
)
from tests.jaxserve.test_product import prompts
from tests.jaxserve.tiers.conftest import start
from tests.jaxserve.tiers.test_shared import values_in
from tests.processes import free_ports
from tests.waiting import eventually

SECONDS = 20.0
STATES = "memory", "disk", "shared", "restarted"


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    """Closes what a test opens, in the other order."""
    with ExitStack() as stack:
        yield stack


@contextmanager
def filled(engine: Engine, state: str, folder: Path, fill: Callable[[], object]) -> Iterator[Store]:
    """A store behind the engine that has what is computed meanwhile; if it is `restarted`, it was closed since."""
    with ExitStack() as opened:
        config, behind = stores(state, folder, opened), opened.enter_context(ExitStack())
        store = behind.enter_context(stored(engine, open_store(config)))
        fill()
        connector_of(engine).flush()
        assert store.flush(SECONDS)
        if state == "restarted":
            behind.close()
            store = behind.enter_context(stored(engine, open_store(config)))
        yield store


def tier_of(state: str) -> str:
    """Where pages are found first."""
    return "disk" if state == "restarted" else state


def hits(store: Store) -> int:
    return sum(tier.hits for tier in store.counters().values())


@pytest.mark.slow
@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(("drafts", "int8"), FORMS)
def test_pages_that_were_kept_give_the_same_tokens(drafts, int8, ranks, state, params, tmp_path):
    engine, wanted = connected("short", drafts, ranks, int8), expected(params, drafts, int8, ranks)

    def compute() -> None:
        forget(engine)
        assert answers(engine, requests("short", params)) == wanted

    with filled(engine, state, tmp_path, compute) as store:
        forget(engine)
        before = sum(scheduler.hit for scheduler in engine._schedulers)
        asked = requests("short", params)
        assert answers(engine, asked) == wanted
        least = sum((len(each.prompt_token_ids) - 1) // PAGE * PAGE for each in asked)
        assert sum(scheduler.hit for scheduler in engine._schedulers) - before >= least
        assert store.counters()[tier_of(state)].hits > 0


@pytest.mark.slow
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("decoding", [1, 2, 4])
@pytest.mark.parametrize("prefilling", [1, 2, 4])
@pytest.mark.parametrize(("drafts", "int8"), FORMS)
def test_what_was_kept_of_a_prompt_is_handed_over_with_what_is_computed(
    drafts, int8, prefilling, decoding, state, tmp_path
):
    first, second = (connected("short", drafts, ranks, int8) for ranks in (prefilling, decoding))
    over = partial(handed_over, first, second)
    with filled(first, state, tmp_path, lambda: over(requests("short", GREEDY))) as store:
        for params in (GREEDY, SEEDED):
            before = hits(store)
            found = over(requests("short", params))
            assert hits(store) > before
            check_answers(found, params, drafts, int8, prefilling, decoding)
        assert store.counters()[tier_of(state)].hits > 0


def test_pages_are_found_only_by_those_with_the_same_salt(tmp_path):
    engine, prompt = connected("short"), prompts("short")[-1]
    forget(engine)
    with stored(engine, open_store(StoreConfig())) as store:
        for salt, least in [("a", 0), ("b", 0), ("a", 64), ("b", 64), ("", 0)]:
            (outputs,) = run(engine, [Request(str(next(NAMES)), prompt, ASKED, cache_salt=salt)])
            assert outputs[0].num_cached_tokens == least
            connector_of(engine).flush()
        forget(engine)
        for salt, least in [("a", 64), ("c", 0)]:
            (outputs,) = run(engine, [Request(str(next(NAMES)), prompt, ASKED, cache_salt=salt)])
            assert outputs[0].num_cached_tokens == least
        store.drop("a")
        forget(engine)
        (outputs,) = run(engine, [Request(str(next(NAMES)), prompt, ASKED, cache_salt="a")])
        assert outputs[0].num_cached_tokens == 0


def test_several_answers_to_a_prompt_have_its_pages_from_the_store_once():
    engine, params = connected("short"), replace(SEEDED, n=3)
    forget(engine)
    request = Request(str(next(NAMES)), prompts("short")[-1], params)
    (wanted,) = run(engine, [request])
    with stored(engine, open_store(StoreConfig())) as store:
        forget(engine)
        run(engine, [replace(request, params=ASKED)])
        connector_of(engine).flush()
        forget(engine)
        before = store.counters()["memory"].hits
        (found,) = run(engine, [request])
        assert store.counters()["memory"].hits - before == 4
    for index in range(3):
        assert of_answer(found, index) == of_answer(wanted, index)


def of_answer(outputs: list[Output], index: int) -> list[int]:
    return tokens([output for output in outputs if output.index == index])


def test_what_is_damaged_on_disk_is_computed_again(tmp_path):
    engine = connected("short")
    forget(engine)
    config = StoreConfig(memory=NOTHING, folder=tmp_path / "pages")
    with stored(engine, open_store(config)) as store:
        assert answers(engine, requests("short", GREEDY)) == expected(GREEDY, 0, False)
        connector_of(engine).flush()
        assert store.flush(SECONDS)
        files, size = (tmp_path / "pages").rglob("*"), connector_of(engine).layout.page_bytes
        pages = [path for path in files if path.is_file() and path.stat().st_size >= size]
        assert pages
        for path in pages:
            content = path.read_bytes()
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        forget(engine)
        assert answers(engine, requests("short", GREEDY)) == expected(GREEDY, 0, False)
        assert store.counters()["disk"].damaged > 0


@pytest.fixture
def ask() -> Callable[..., None]:
    """Asks an engine that has forgotten all; its answers are right, whatever happens meanwhile."""
    engine, wanted = connected("short"), expected(GREEDY, 0, False)

    def ask(store: Store, fault: Callable[[], object] | None = None) -> None:
        forget(engine)
        assert answers(engine, requests("short", GREEDY), fault) == wanted
        connector_of(engine).flush()
        assert store.flush(SECONDS)

    return ask


@pytest.mark.slow
@pytest.mark.xdist_group("connector 0 False")
def test_a_shared_store_that_dies_and_comes_back_changes_no_answer(ask, tmp_path, opened):
    server = start(opened, tmp_path / "server", *free_ports(1))
    with stored(connected("short"), open_store(StoreConfig(memory=NOTHING, url=server.url))) as store:
        for fault in (None, server.kill, None, server.start):
            ask(store, fault)
        counters = store.counters()["shared"]
        assert counters.hits > 0 and counters.failed > 0
        assert eventually(lambda: (ask(store), store.counters()["shared"].hits > counters.hits)[1])


@pytest.mark.xdist_group("connector 0 False")
def test_a_disk_that_is_full_changes_no_answer(ask, tmp_path, monkeypatch):
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    config = StoreConfig(memory=NOTHING, folder=tmp_path / "pages")
    with stored(connected("short"), open_store(config)) as store:
        with monkeypatch.context() as patch:
            ask(store, lambda: patch.setattr(disk.tempfile, "mkstemp", full))
            ask(store)
            assert store.counters()["disk"].failed > 0
        ask(store)
        before = store.counters()["disk"]
        ask(store)
        after = store.counters()["disk"]
        assert after.hits > before.hits and after.failed == before.failed


@pytest.mark.xdist_group("connector 0 False")
def test_what_is_damaged_in_the_shared_store_is_computed_again(ask, tmp_path, opened):
    server = start(opened, tmp_path / "server", *free_ports(1))
    with stored(connected("short"), open_store(StoreConfig(memory=NOTHING, url=server.url))) as store:
        ask(store)
        for name in values_in(server):
            value = server.client.get(name)
            assert isinstance(value, bytes)
            server.client.set(name, value[:-1] + bytes([value[-1] ^ 1]))
        ask(store)
        before = store.counters()["shared"]
        assert before.damaged > 0
        ask(store)
        after = store.counters()["shared"]
        assert after.hits > before.hits and after.failed == 0


def test_few_who_wait_have_pages_in_memory():
    engine, prompt = connected("short"), prompts("short")[-1]
    forget(engine)
    with stored(engine, open_store(StoreConfig())):
        run(engine, [Request(str(next(NAMES)), prompt, ASKED)])
        connector_of(engine).flush()
        forget(engine)
        params = replace(GREEDY, max_tokens=40)
        waiting = [Request(str(next(NAMES)), (*prompt[:70], number), params) for number in range(60)]
        for request in waiting:
            engine.add(request)
        most = 0
        while engine.busy:
            engine.step()
            asked = [s for s in engine._schedulers.expecting() if s.coming and s.coming._future]
            most = max(most, len(asked) + engine._schedulers.num_brought)
        assert 0 < most <= engine.options.max_num_seqs + 4
        assert engine._schedulers[0].hit >= 60 * 64
