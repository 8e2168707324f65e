"""Engines of the embedded model that are a fleet in one process, and what is heard of it."""

from collections.abc import Iterator

import numpy as np
import pytest

from jaxserve import options as sizes
from jaxserve.connector import Connector
from jaxserve.engine import Engine
from jaxserve.fleet.fleet import Fleet
from jaxserve.fleet.instance import Local, about
from jaxserve.layout import PageLayout
from jaxserve.options import EngineConfig
from jaxserve.peers import Peers
from jaxserve.request import Output
from tests.jaxserve.conftest import EMBEDDED_SHAPES, EMBEDDED_SIZE, loaded, with_few_shapes
from tests.waiting import eventually


def make_engine(name: str) -> Engine:
    cfg, model, tokenizer, *_ = loaded("embedded")
    options = EngineConfig(**EMBEDDED_SIZE, num_speculative_tokens=0)
    layout = PageLayout(sizes.cache_of(cfg, options, 1, np.float32))
    connector = Connector(layout, options.page_size, peers=Peers(b"token", name), exports=name[0] == "P")
    return with_few_shapes(Engine(model, cfg, tokenizer, options, connector=connector), EMBEDDED_SHAPES)


@pytest.fixture(scope="session")
def engines() -> Iterator[dict[str, Engine]]:
    found = {name: make_engine(name) for name in ("P1", "P2", "D1", "D2", "alone")}
    yield found
    for engine in found.values():
        assert engine._porter._connector
        engine._porter._connector.close()


class Heard:
    """All that was said of one answer."""

    def __init__(self):
        self.tokens, self.text, self.logprobs, self.known, self.last = [], "", [], None, None

    def add(self, output: Output) -> None:
        assert self.last is None or self.last.finish_reason is None
        self.known = output.prompt_logprobs if self.last is None else self.known
        self.tokens += output.token_ids
        self.text += output.text
        self.logprobs += output.logprobs
        self.last = output

    def result(self):
        return self.tokens, self.text, self.logprobs, self.known, self.last.finish_reason, self.last.stop_reason


def listen(serving, until=lambda heard: False, heard=None):
    heard = {} if heard is None else heard
    while serving.busy and not until(heard):
        for output in serving.step():
            heard.setdefault((output.request_id, output.index), Heard()).add(output)
    return heard


def make_fleet(engines, *names):
    cfg, _, tokenizer, *_ = loaded("embedded")
    fleet, locals = Fleet(cfg, tokenizer, engines["alone"].max_model_len), {}
    for name in names:
        engine = engines[name]
        what = about(engine, name, "prefill" if name[0] == "P" else "decode")
        locals[name] = Local(engine, what, withdraw=engine.withdraw)
        fleet.join(locals[name])
    return fleet, locals


def end(engines, locals):
    assert eventually(lambda: not any(engines[name].offered for name in locals))
    for name, local in locals.items():
        local.close()
        local._runner.join(60)
        if engines[name].busy:
            engines[name].recover()
