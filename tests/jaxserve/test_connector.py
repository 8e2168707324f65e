"""Pages that come from elsewhere change no token: whatever they come from, and wherever they were computed."""

import errno
import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxserve import options as sizes
from jaxserve.connector import Connector, Peers
from jaxserve.engine import Engine
from jaxserve.layers.int8 import in_int8, quantize_model
from jaxserve.layers.spread import in_order, spread
from jaxserve.layers.transformer import model_params
from jaxserve.layout import PageLayout
from jaxserve.options import EngineConfig
from jaxserve.parallel.errors import RequestError
from jaxserve.parallel.mesh import make_mesh
from jaxserve.request import Handover, Output, Request, SamplingParams, StructuredOutputs
from jaxserve.tiers import disk
from jaxserve.tiers.keys import PageKind
from jaxserve.tiers.limits import Limits
from jaxserve.tiers.store import Store, StoreConfig, open_store
from tests.jaxserve.conftest import EMBEDDED_SIZE, MESH_SHAPES, loaded, tokens, with_few_shapes
from tests.jaxserve.test_product import prompts
from tests.jaxserve.tiers.conftest import Server, eventually, free_ports, start
from tests.jaxserve.tiers.test_shared import values_in

PAGE = EMBEDDED_SIZE["page_size"]
GREEDY = SamplingParams(temperature=0, max_tokens=14, ignore_eos=True)
SEEDED = SamplingParams(temperature=0.8, top_p=0.95, top_k=50, seed=1234, max_tokens=14, ignore_eos=True)
ASKED = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
"""Of a request whose pages are wanted."""
SHAPES = MESH_SHAPES._replace(decode=(16,))
"""All of a test's answers can be on one of the ranks."""
NOTHING = Limits(1)
"""For a tier that keeps nothing."""
SECONDS = 20.0
NAMES = itertools.count()


@functools.cache
def weights(name: str, int8: bool):
    cfg, model, *_ = loaded(name)
    return quantize_model(model, in_int8(model_params(cfg))) if int8 else model


@functools.cache
def connected(name: str, drafts: int = 0, ranks: int = 1, int8: bool = False) -> Engine:
    """An engine that can exchange pages with others, and has no store."""
    cfg, _, tokenizer, *_ = loaded(name)
    options = EngineConfig(**EMBEDDED_SIZE, num_speculative_tokens=drafts)
    model, mesh = weights(name, int8), make_mesh(1, ranks) if ranks > 1 else None
    if mesh:
        model = spread(model, cfg, mesh, in_order(cfg, mesh.size))
    layout = PageLayout(sizes.cache_of(cfg, options, 1, np.float32))
    peers = Peers(b"token", f"{name} {drafts} {ranks} {int8}")
    connector = Connector(layout, PAGE, kind=PageKind(name, f"{int8}", "float32", PAGE), peers=peers, exports=True)
    return with_few_shapes(
        Engine(model, cfg, tokenizer, options, mesh=mesh, connector=connector), SHAPES if mesh else None
    )


def connector_of(engine: Engine) -> Connector:
    found = engine._porter._connector
    assert found is not None
    return found


def forget(engine: Engine) -> None:
    """The device has no page of anybody any more."""
    for scheduler in engine._schedulers:
        scheduler.pool.clear()


def run(engine: Engine, requests: list[Request], fault: Callable[[], object] | None = None) -> list[list[Output]]:
    """All outputs of each request; a fault happens as soon as something was said."""
    said: dict[str, list[Output]] = {request.id: [] for request in requests}
    for request in requests:
        engine.add(request)
    while engine.busy:
        for output in engine.step():
            said[output.request_id].append(output)
        if fault and any(said.values()):
            fault()
            fault = None
    assert fault is None
    assert sum(scheduler.pool.used for scheduler in engine._schedulers) == 0
    return list(said.values())


def requests(name: str, params: SamplingParams, **more: Any) -> list[Request]:
    return [Request(str(next(NAMES)), prompt, params, **more) for prompt in prompts(name)]


def answers(engine: Engine, asked: list[Request], fault: Callable[[], object] | None = None) -> list[list[int]]:
    """The tokens of each request, none of which fails."""
    outputs = run(engine, asked, fault)
    assert all(each[-1].finish_reason == "length" for each in outputs)
    return [tokens(each) for each in outputs]


def exported(engine: Engine, asked: list[Request]) -> list[Handover]:
    """Where the pages of requests are, once an engine has computed them."""
    wanted = [
        replace(request, id=str(next(NAMES)), params=ASKED, export=True, answered=(), prompt_token_ids=(
            *request.prompt_token_ids, *request.answered)) for request in asked
    ]  # fmt: skip
    found = [outputs[-1].handover for outputs in run(engine, wanted)]
    return [handover for handover in found if handover is not None]


def handed_over(first: Engine, second: Engine, asked: list[Request]) -> list[list[int]]:
    """The tokens of requests whose prompts one engine computes, and that another answers."""
    forget(first)
    offered = exported(first, asked)
    forget(second)
    before = sum(scheduler.hit for scheduler in second._schedulers)
    found = answers(second, [replace(each, handover=where) for each, where in zip(asked, offered, strict=True)])
    tile = second._shapes.tile if len(second._schedulers) > 1 else 1
    least = sum((len(each.prompt_token_ids) + len(each.answered) - 1) // tile * tile for each in asked)
    assert sum(scheduler.hit for scheduler in second._schedulers) - before >= least
    return found


@functools.cache
def expected(params: SamplingParams, drafts: int, int8: bool, ranks: int = 1) -> list[list[int]]:
    """Of an engine to which nothing comes from elsewhere."""
    engine = connected("embedded", drafts, ranks, int8)
    forget(engine)
    return answers(engine, requests("embedded", params))


@functools.cache
def certain(params: SamplingParams, drafts: int, int8: bool) -> list[int]:
    """Which answers don't depend on how many ranks there are.

    Sums of floats do, in the last bit; in INT8 such a bit can change a code, and a code a token that was close.
    """
    each = [expected(params, drafts, int8, ranks) for ranks in (1, 2, 4)]
    found = [number for number, said in enumerate(zip(*each, strict=True)) if said[0] == said[1] == said[2]]
    assert len(found) >= (12 if int8 else 16)
    return found


FORMS = [
    pytest.param(drafts, int8, marks=pytest.mark.xdist_group(f"connector {drafts} {int8}"))
    for drafts in (0, 1)
    for int8 in (False, True)
]


@pytest.mark.slow
@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("decoding", [1, 2, 4])
@pytest.mark.parametrize("prefilling", [1, 2, 4])
@pytest.mark.parametrize(("drafts", "int8"), FORMS)
def test_an_engine_answers_what_another_has_read_as_if_it_had_itself(drafts, int8, prefilling, decoding, params):
    first, second = (connected("embedded", drafts, ranks, int8) for ranks in (prefilling, decoding))
    found, wanted = handed_over(first, second, requests("embedded", params)), expected(params, drafts, int8)
    for number in certain(params, drafts, int8):
        assert found[number] == wanted[number]


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    """Closes what a test opens, in the other order."""
    with ExitStack() as stack:
        yield stack


@contextmanager
def stored(engine: Engine, store: Store) -> Iterator[Store]:
    """The engine with a store behind it, which is closed at the end."""
    connector = connector_of(engine)
    connector.store = store
    with closing(store):
        yield store
        connector.store = None


def stores(state: str, folder: Path, opened: ExitStack) -> StoreConfig:
    """Where pages are found."""
    if state == "memory":
        return StoreConfig()
    if state == "shared":
        server = opened.enter_context(closing(Server(folder / "server", *free_ports(1))))
        return StoreConfig(memory=NOTHING, url=server.url)
    return StoreConfig(memory=Limits(1 << 30) if state == "restarted" else NOTHING, folder=folder / "pages")


@pytest.mark.slow
@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("state", ["memory", "disk", "shared", "restarted"])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("drafts", "int8"), FORMS)
def test_pages_that_were_kept_give_the_same_tokens(drafts, int8, ranks, state, params, tmp_path, opened):
    engine, config = connected("embedded", drafts, ranks, int8), stores(state, tmp_path, opened)
    wanted = expected(params, drafts, int8, ranks)
    forget(engine)
    with stored(engine, open_store(config)) as store:
        assert answers(engine, requests("embedded", params)) == wanted
        connector_of(engine).flush()
        assert store.flush(SECONDS)
        if state != "restarted":
            hit_again(engine, params, wanted)
            assert store.counters()[state].hits > 0
    if state == "restarted":
        with stored(engine, open_store(config)) as store:
            hit_again(engine, params, wanted)
            assert store.counters()["disk"].hits > 0


def hit_again(engine: Engine, params: SamplingParams, wanted: list[list[int]]) -> None:
    """Asked again, when the device has forgotten all, whole pages of prompts are found."""
    forget(engine)
    before = sum(scheduler.hit for scheduler in engine._schedulers)
    asked = requests("embedded", params)
    assert answers(engine, asked) == wanted
    least = sum((len(each.prompt_token_ids) - 1) // PAGE * PAGE for each in asked)
    assert sum(scheduler.hit for scheduler in engine._schedulers) - before >= least


KINDS_OF_ANSWERS = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 0.8, "seed": 7},
    "penalized": {"temperature": 0.7, "seed": 3, "repetition_penalty": 1.3, "presence_penalty": 0.5, "min_tokens": 12},
    "biased": {"temperature": 0.0, "logit_bias": {97: 5.0, 100: -100.0}, "bad_words": ["return"]},
    "scored": {"temperature": 0.0, "logprobs": 3},
    "formed": {"temperature": 0.9, "seed": 5, "structured_outputs": StructuredOutputs(regex=r"[a-z]{3} = \d{12}")},
    "stopped": {"temperature": 0.0, "stop": ["\n\n", "self."], "include_stop_str_in_output": True},
}


@pytest.mark.parametrize("handed", [False, True], ids=["computed", "handed over"])
@pytest.mark.parametrize("kind", KINDS_OF_ANSWERS)
def test_an_answer_that_was_begun_goes_on_as_it_would_have(kind, handed):
    engine = connected("embedded")
    params = SamplingParams(max_tokens=14, **KINDS_OF_ANSWERS[kind])
    (whole,) = run(engine, [Request(str(next(NAMES)), prompts("embedded")[-1], params)])
    said, text = tokens(whole), "".join(each.text for each in whole)
    for count in range(1, len(said)):
        request = Request(str(next(NAMES)), prompts("embedded")[-1], params, answered=tuple(said[:count]))
        if handed:
            forget(engine)
            request = replace(request, handover=exported(engine, [request])[0])
        (rest,) = run(engine, [request])
        assert tokens(rest) == said[count:]
        assert text.endswith("".join(each.text for each in rest))
        assert (rest[-1].finish_reason, rest[-1].stop_reason) == (whole[-1].finish_reason, whole[-1].stop_reason)
        for found, wanted in zip(scores(rest), scores(whole)[count:], strict=True):
            assert found == pytest.approx(wanted, abs=1e-4)


def scores(outputs: list[Output]) -> list[dict[int, float]]:
    """Log-probabilities at each place of an answer."""
    places = (place for output in outputs for place in output.logprobs)
    return [{token: found.logprob for token, found in place.items()} for place in places]


def test_a_prompt_s_scores_come_with_its_pages_and_not_from_them():
    engine = connected("embedded")
    forget(engine)
    prompt = prompts("embedded")[-1]
    (wanted,) = run(engine, [Request(str(next(NAMES)), prompt, replace(ASKED, prompt_logprobs=1))])
    asked = Request(str(next(NAMES)), prompt, replace(ASKED, prompt_logprobs=1), export=True)
    (found,) = run(engine, [asked])
    assert found[-1].handover is not None and found[-1].handover.tokens == len(prompt)
    assert found[-1].prompt_logprobs == wanted[-1].prompt_logprobs


def test_pages_are_found_only_by_those_with_the_same_salt(tmp_path):
    engine, prompt = connected("embedded"), prompts("embedded")[-1]
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
    engine, params = connected("embedded"), replace(SEEDED, n=3)
    forget(engine)
    request = Request(str(next(NAMES)), prompts("embedded")[-1], params)
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
    engine = connected("embedded")
    forget(engine)
    config = StoreConfig(memory=NOTHING, folder=tmp_path / "pages")
    with stored(engine, open_store(config)) as store:
        assert answers(engine, requests("embedded", GREEDY)) == expected(GREEDY, 0, False)
        connector_of(engine).flush()
        assert store.flush(SECONDS)
        pages = [path for path in (tmp_path / "pages").rglob("*") if path.is_file() and path.stat().st_size > 1 << 14]
        for path in pages:
            content = path.read_bytes()
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        forget(engine)
        assert answers(engine, requests("embedded", GREEDY)) == expected(GREEDY, 0, False)
        assert store.counters()["disk"].damaged > 0


@pytest.fixture
def ask() -> Callable[..., None]:
    """Asks an engine that has forgotten all; its answers are right, whatever happens meanwhile."""
    engine, wanted = connected("embedded"), expected(GREEDY, 0, False)

    def ask(store: Store, fault: Callable[[], object] | None = None) -> None:
        forget(engine)
        assert answers(engine, requests("embedded", GREEDY), fault) == wanted
        connector_of(engine).flush()
        assert store.flush(SECONDS)

    return ask


@pytest.mark.slow
@pytest.mark.xdist_group("connector 0 False")
def test_a_shared_store_that_dies_and_comes_back_changes_no_answer(ask, tmp_path, opened):
    server = start(opened, tmp_path / "server", *free_ports(1))
    with stored(connected("embedded"), open_store(StoreConfig(memory=NOTHING, url=server.url))) as store:
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
    with stored(connected("embedded"), open_store(config)) as store:
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
    with stored(connected("embedded"), open_store(StoreConfig(memory=NOTHING, url=server.url))) as store:
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


def test_pages_that_are_gone_end_the_answer_and_nothing_else():
    engine = connected("embedded")
    asked = requests("embedded", GREEDY)[-3:]
    forget(engine)
    offered = exported(engine, asked)
    sender = connector_of(engine)._sender
    assert sender is not None
    sender.withdraw(offered[1].name)
    outputs = run(engine, [replace(each, handover=where) for each, where in zip(asked, offered, strict=True)])
    assert [(each[-1].finish_reason, each[-1].lost) for each in outputs] == [
        ("length", False), ("error", True), ("length", False)
    ]  # fmt: skip
    assert "is not offered" in (outputs[1][-1].error or "")
    (alone,) = run(engine, [asked[1]])
    assert alone[-1].finish_reason == "length"


def test_an_engine_that_is_not_there_any_more_is_noticed():
    engine = connected("embedded")
    (request,) = requests("embedded", GREEDY)[-1:]
    (port,) = free_ports(1)
    (outputs,) = run(engine, [replace(request, handover=Handover("127.0.0.1", port, "it", 80))])
    assert outputs[-1].lost and "does not answer" in (outputs[-1].error or "")


def test_prompts_wait_until_there_is_room_for_their_pages():
    """And go on in their order."""
    engine = connected("embedded")
    connector, asked = connector_of(engine), requests("embedded", GREEDY)[-4:]
    forget(engine)
    most, peers = 6 * connector.layout.page_bytes, connector._peers
    assert peers is not None and connector._sender is not None
    connector._sender.offers.clear()
    connector._peers, connector._sender.offers.limit = peers._replace(limit=most), most
    try:
        wanted = [replace(each, params=ASKED, export=True) for each in asked]
        for request in wanted:
            engine.add(request)
        found: dict[str, Handover] = {}
        for _ in range(200):
            said = [output for output in engine.step() if output.handover]
            found |= {output.request_id: output.handover for output in said if output.handover}
        assert list(found) == [wanted[0].id]
        assert connector._sender.offers.nbytes <= most
        for count in range(1, 4):
            engine.add(replace(asked[count - 1], handover=found[wanted[count - 1].id]))
            while len(found) <= count:
                said = [output for output in engine.step() if output.handover]
                found |= {output.request_id: output.handover for output in said if output.handover}
        assert list(found) == [each.id for each in wanted]
    finally:
        connector._peers, connector._sender.offers.limit = peers, peers.limit
        while engine.busy:
            engine.step()
    assert connector.offered == 1


class AtOnce:
    """A queue whose entries are taken while they are put into it."""

    def __init__(self, connector: Connector):
        self._connector = connector

    def put(self, leaving: Any) -> None:
        self._connector._take(leaving)


def test_pages_that_leave_at_once_are_said_once(monkeypatch):
    engine = connected("embedded")
    connector = connector_of(engine)
    monkeypatch.setattr(connector, "_leaving", AtOnce(connector))
    (outputs,) = run(engine, [replace(requests("embedded", ASKED)[-1], export=True)])
    assert len(outputs) == 1 and outputs[0].handover is not None


def test_few_who_wait_have_pages_in_memory():
    engine, prompt = connected("embedded"), prompts("embedded")[-1]
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


def test_who_goes_away_while_pages_come_or_leave_leaves_nothing_behind():
    engine = connected("embedded")
    connector, (request,) = connector_of(engine), requests("embedded", GREEDY)[-1:]
    before = connector.offered
    for steps in range(6):
        leaving = replace(request, id=f"leaving {steps}", params=ASKED, export=True)
        engine.add(leaving)
        for _ in range(steps):
            engine.step()
        engine.abort(leaving.id)
        (where,) = exported(engine, [request])
        coming = replace(request, id=f"coming {steps}", handover=where)
        engine.add(coming)
        for _ in range(steps):
            engine.step()
        engine.abort(coming.id)
        engine.abort(where.name.rpartition("/")[0])  # whose pages these are, in case they were not fetched
        while engine.busy:
            engine.step()
    assert not connector._exports and not connector._promised and not engine._schedulers.expecting()
    assert connector.offered == before


REFUSED = {
    "cache_salt = 5: it must be a text": {"cache_salt": 5},
    "cache_salt = '.udc80': it must be a text": {"cache_salt": "\udc80"},
    "export: .*n or max_tokens is not 1": {"export": True},
    "handover: .*or prompt_logprobs are asked for": {
        "handover": Handover("127.0.0.1", 1, "it", 3), "params": replace(GREEDY, prompt_logprobs=1)
    },
    "answered: it goes with n = 1": {"answered": (3,), "params": replace(SEEDED, n=2)},
    "answered has 900; the model's tokens are": {"answered": (900,)},
    "prompt and answered have 140 tokens; 127 are accepted": {"answered": (3,) * 60},
    "answered has 14 tokens after which the answer is complete": {"answered": (3,) * 14},
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_what_engines_may_not_ask_of_each_other_is_refused(message):
    engine = connected("deepseek_v3")
    request = Request("it", tuple(range(2, 82)), GREEDY)
    with pytest.raises(RequestError, match=message):
        engine.add(replace(request, **REFUSED[message]))
    assert not engine.busy
