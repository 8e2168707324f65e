"""An engine at work for a while: nothing is compiled, nothing is lost, nothing is kept."""

import os
import random
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import pytest

from jaxserve.checkpoints import hf
from jaxserve.engine import Engine
from jaxserve.layers.transformer import model_params
from jaxserve.options import EngineConfig
from jaxserve.pages import PagePool
from jaxserve.parallel.sharding import initialize
from jaxserve.request import Output, Request, SamplingParams
from jaxserve.slots import mark
from tests.jaxserve.conftest import GOLDENS, SIZE, with_few_shapes, word_tokenizer

REQUESTS = int(os.environ.get("REQUESTS", 300))  # REQUESTS=5000 make pytest ARGS=tests/jaxserve/test_trace.py
VOCABULARY = 97
BASES = [[random.Random(i).randrange(2, 95) for _ in range(110)] for i in range(3)]


@contextmanager
def watch_compilations():
    """A list to which JAX's own events are added: of all that it traces, lowers or compiles."""
    events: list[str] = []

    def listen(name: str, seconds: float, **_) -> None:
        if name.startswith("/jax/core/compile/"):
            events.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def prompt(rng: random.Random) -> tuple[int, ...]:
    """A short one, or one that begins like others and fills a page or more."""
    own = [rng.randrange(2, 95) for _ in range(rng.randint(1, 12))]
    return tuple(rng.choice(BASES)[: rng.randint(30, 110)] + own if rng.random() < 0.4 else own)


def params(rng: random.Random) -> SamplingParams:
    """What one may ask for, each of it now and then."""

    def maybe(value, chance=0.15):
        return value if rng.random() < chance else None

    most = rng.choice([1, 2, 5, 12, 40])
    return SamplingParams(
        n=rng.choice([1, 1, 1, 1, 2, 3]),
        temperature=rng.choice([0, 0.7, 1.0, 1.5]),
        top_k=rng.choice([0, 0, 20]),
        top_p=rng.choice([1.0, 0.9]),
        min_p=rng.choice([0.0, 0.05]),
        seed=maybe(rng.randrange(2**32), 0.5),
        repetition_penalty=maybe(1.3) or 1.0,
        presence_penalty=maybe(0.5) or 0.0,
        frequency_penalty=maybe(0.5) or 0.0,
        logit_bias=maybe({rng.randrange(VOCABULARY): rng.uniform(-5, 5)}),
        allowed_token_ids=maybe(rng.sample(range(VOCABULARY), 12)),
        bad_words=maybe(
            [f"t{rng.randrange(VOCABULARY)}", f"t{rng.randrange(VOCABULARY)} t{rng.randrange(VOCABULARY)}"]
        ),
        stop=maybe([f"t{rng.randrange(VOCABULARY)}" for _ in range(5)]),
        stop_token_ids=maybe(rng.sample(range(VOCABULARY), 5)),
        ignore_eos=rng.random() < 0.5,
        max_tokens=maybe(most, 0.98),
        min_tokens=rng.choice([0, 0, 0, min(3, most)]),
        logprobs=maybe(rng.randint(0, 3)),
        prompt_logprobs=maybe(rng.randint(0, 3), 0.1),
    )


@dataclass
class Client:
    """Those who ask, all of them."""

    engine: Engine
    rng: random.Random
    asked: int = 0
    aborted: int = 0
    open: dict[str, Request] = field(default_factory=dict)
    answers: dict[tuple[str, int], list[Output]] = field(default_factory=dict)  # of open requests
    finished: int = 0

    def ask(self) -> None:
        request = Request(
            str(self.asked), prompt(self.rng), params(self.rng), priority=self.rng.choice([0, 0, 0, 1, -1])
        )
        self.engine.add(request)
        self.open[request.id] = request
        self.answers |= {(request.id, index): [] for index in range(request.params.n)}
        self.asked += 1

    def abort(self) -> None:
        id = self.rng.choice(list(self.open))
        self.engine.abort(id)
        self._close(id)
        self.aborted += 1

    def step(self) -> None:
        for output in self.engine.step():
            outputs = self.answers[output.request_id, output.index]  # of an aborted request there is none
            assert not (outputs and outputs[-1].finish_reason), "an answer goes on after its end"
            outputs.append(output)
        for id in [id for id, request in self.open.items() if self._answered(request)]:
            for index in range(self.open[id].params.n):
                check_answer(self.open[id], self.answers[id, index])
            self._close(id)
            self.finished += 1

    def _answered(self, request: Request) -> bool:
        each = [self.answers[request.id, index] for index in range(request.params.n)]
        return all(outputs and outputs[-1].finish_reason for outputs in each)

    def _close(self, id: str) -> None:
        for index in range(self.open.pop(id).params.n):
            del self.answers[id, index]


def check_answer(request: Request, outputs: list[Output]) -> None:
    p, last = request.params, outputs[-1]
    room = SIZE["max_model_len"] - len(request.prompt_token_ids)
    said = [token for output in outputs for token in output.token_ids]
    assert last.error is None
    assert p.min_tokens <= len(said) <= min(p.max_tokens or room, room) or len(said) == room
    assert (last.finish_reason == "length") <= (len(said) == min(p.max_tokens or room, room))
    assert p.allowed_token_ids is None or set(said) <= set(p.allowed_token_ids)
    assert sum(len(output.logprobs) for output in outputs) == (len(said) if p.logprobs is not None else 0)
    if p.prompt_logprobs is not None and outputs[0].index == 0:
        assert len(outputs[0].prompt_logprobs or ()) == len(request.prompt_token_ids)


def make_engine(name: str, drafts: int) -> Engine:
    """All is compiled. Of its eight pages four are handed out: so it is the size of other tests, and has too few."""
    cfg, model = hf.load(GOLDENS / name)
    if drafts:  # by a module of random weights
        cfg = replace(cfg, mtp_layers=1)
        model = model._replace(mtp=initialize(model_params(cfg).mtp, jax.random.key(0)))
    size = SIZE | {"num_speculative_tokens": drafts, "speculation_entropy": 10.0}
    engine = Engine(model, cfg, word_tokenizer(cfg.vocab_size), EngineConfig(**size))
    if drafts:  # they take long to compile
        with_few_shapes(engine)
    engine._programs.compile([*engine._shapes.prefill, *engine._shapes.decode, mark])
    engine._schedulers[0].pool = PagePool(4, engine.options.page_size, lookahead=drafts)
    return engine


@pytest.mark.parametrize(("name", "drafts", "requests"), [("qwen3", 0, REQUESTS), ("deepseek_v3", 1, REQUESTS // 2)])
def test_any_trace_is_answered_once_and_nothing_is_compiled_after_the_start(name, drafts, requests):
    engine = make_engine(name, drafts)
    client = Client(engine, rng := random.Random(1))
    with watch_compilations() as events:
        while client.asked < requests or client.open:
            if client.asked < requests and len(client.open) < 30 and rng.random() < 0.2:
                for _ in range(min(rng.randint(1, 12), requests - client.asked)):
                    client.ask()
            if client.open and rng.random() < 0.02:
                client.abort()
            client.step()
        assert events == []
    scheduler, counters = engine._schedulers[0], engine.counters
    assert counters.late_compiled == 0
    assert client.finished + client.aborted == client.asked
    assert (engine.busy, list(scheduler), scheduler.pool.used) == (False, [], 0)
    assert engine.step() == []
    assert (counters.waiting, counters.running, counters.pages_used) == (0, 0, 0)
    assert counters.preemptions > 10
    assert counters.cached_tokens > 0
    assert client.aborted > 5
    assert counters.wide_rows >= 1000 * drafts
    assert sum(counters.accepted) >= 10 * drafts


def test_compilations_are_noticed():
    with watch_compilations() as events:
        jax.jit(lambda x: jnp.sin(x) + 17)(jnp.float32(1))
    assert "/jax/core/compile/backend_compile_duration" in events
    with watch_compilations() as events:
        pass
    assert events == []
