"""Engines that exchange pages with others, and what they are asked."""

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
from jaxserve.connector import Connector
from jaxserve.engine import Engine
from jaxserve.layers.int8 import in_int8, quantize_model
from jaxserve.layers.spread import in_order, spread
from jaxserve.layers.transformer import model_params
from jaxserve.layout import PageLayout
from jaxserve.options import EngineConfig
from jaxserve.parallel.mesh import make_mesh
from jaxserve.peers import Peers
from jaxserve.request import Handover, Output, Request, SamplingParams
from jaxserve.tiers.keys import PageKind
from jaxserve.tiers.limits import Limits
from jaxserve.tiers.store import Store, StoreConfig
from tests.jaxserve.conftest import EMBEDDED_SIZE, MESH_SHAPES, loaded, tokens, with_few_shapes
from tests.jaxserve.test_product import prompts
from tests.jaxserve.tiers.conftest import start
from tests.processes import free_ports

PAGE = EMBEDDED_SIZE["page_size"]
GREEDY = SamplingParams(temperature=0, max_tokens=14, ignore_eos=True)
SEEDED = SamplingParams(temperature=0.8, top_p=0.95, top_k=50, seed=1234, max_tokens=14, ignore_eos=True)
ASKED = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
"""Of a request whose pages are wanted."""
SHAPES = MESH_SHAPES._replace(decode=(16,))
"""All of a test's answers can be on one of the ranks."""
NOTHING = Limits(1)
"""For a tier that keeps nothing."""
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
    engine = connected("short", drafts, ranks, int8)
    forget(engine)
    return answers(engine, requests("short", params))


@functools.cache
def certain(params: SamplingParams, drafts: int, int8: bool) -> list[int]:
    """Which answers don't depend on how many ranks there are.

    Sums of floats do, in the last bit; in INT8 such a bit can change a code, and a code a token that was close.
    """
    each = [expected(params, drafts, int8, ranks) for ranks in (1, 2, 4)]
    found = [number for number, said in enumerate(zip(*each, strict=True)) if said[0] == said[1] == said[2]]
    assert len(found) >= (12 if int8 else 16)
    return found


def check_answers(
    found: list[list[int]], params: SamplingParams, drafts: int, int8: bool, prefilling: int, decoding: int
) -> None:
    """Engines on so many ranks have the tokens of one: all of them if both are alike, else those that are certain."""
    wanted = expected(params, drafts, int8)
    for number in certain(params, drafts, int8):
        assert found[number] == wanted[number]
    if prefilling == decoding:
        assert found == expected(params, drafts, int8, decoding)


def of_form(drafts: int, int8: bool, *others: Any) -> Any:
    """A case, for the process that has the engines of its form."""
    return pytest.param(drafts, int8, *others, marks=pytest.mark.xdist_group(f"connector {drafts} {int8}"))


FORMS = [of_form(*form) for form in itertools.product((0, 1), (False, True))]


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
        return StoreConfig(memory=NOTHING, url=start(opened, folder / "server", *free_ports(1)).url)
    return StoreConfig(memory=Limits(1 << 30) if state == "restarted" else NOTHING, folder=folder / "pages")
