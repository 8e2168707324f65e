"""Whether what was made fast still is: times beside others of the same run, never times alone.

`python -m benchmarks.smoke` runs pairs of things in turns, on the same cores: one that a careless change would make
slow, and one to hold it against. It ends with 1 if a pair's ratio is above its bound, which is nearly twice the ratio
that there was when it was set, or below what there would be without what was made. A ratio that is above is measured
again before it counts: others may have used the machine.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from jaxserve.bench import runs
from jaxserve.bench.costs import Phase, parts, total
from jaxserve.bench.layers import decoding
from jaxserve.bench.limits import compiled
from jaxserve.bench.models import MODELS, Subject, draw, random
from jaxserve.compilation import enable_cache
from jaxserve.engine import Engine
from jaxserve.layers.config import TINY, Config, LatentAttention
from jaxserve.layers.linear import einsum
from jaxserve.layers.mla import attend_queries, mla_params
from jaxserve.layers.moe import Mlp, Routing, mix_experts, moe_params
from jaxserve.layers.transformer import cache_params
from jaxserve.options import EngineConfig
from jaxserve.parallel.sharding import Param, quantized, zeros

ATTEMPTS, TURNS, SECONDS = 3, 5, 1.0
"""How often a pair is measured at most; and each time, how often it is run at least, and how long."""

WIDE = MODELS["bench-1b"] | {"num_hidden_layers": 2, "n_routed_experts": 32, "vocab_size": 8192}
"""Layers as wide as those of a standard model, but few."""
QUICK = TINY["deepseek_v2_lite"] | {"vocab_size": 4200}
"""A round of it takes less time than to launch one."""
PAGE = EngineConfig().page_size

Run = Callable[[], Any]


class Pair(NamedTuple):
    """What is to be fast, and what it is held against."""

    name: str
    run: Run
    other: str
    beside: Run
    most: float  # seconds of the one, in seconds of the other

    def ratio(self) -> float:
        """Of the best times in turns, after one that compiles; measured again as long as it is above the bound."""
        for each in (self.run, self.beside):
            each()
        times, found = [], float("inf")
        for _ in range(ATTEMPTS):
            began = time.perf_counter()
            for turn in itertools.count():
                if turn >= TURNS and time.perf_counter() - began >= SECONDS:
                    break
                times.append((_seconds(self.run), _seconds(self.beside)))
            best, other = map(min, zip(*times, strict=True))
            if (found := best / other) <= self.most:
                break
        return found


def _seconds(run: Run) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def pairs() -> Iterator[Pair]:
    """All of them, from a product of one row to the engine."""
    cfg = Config.from_hf(WIDE)
    yield _row()
    yield from _experts(cfg)
    yield from _attention(cfg)
    yield _rounds()
    yield from _answers()


def _row() -> Pair:
    w = draw(quantized(Param((32_768, 1024), ("f", "d"), jnp.float32)))
    product = _of(lambda x, w: einsum("td,fd->tf", x, w), _normal(1, 1024), w)
    return Pair("a row by an INT8 matrix", product, "a sum of its bytes", _reading(w.codes.nbytes), 2.1)


def _experts(cfg: Config) -> Iterator[Pair]:
    assert cfg.experts
    params = moe_params(cfg, cfg.experts, jnp.float32).experts
    w, w8 = draw(params), draw(Mlp(*map(quantized, params)))
    one, few, many = (_given(cfg, tokens) for tokens in (1, 8, 256))

    def all_of(*given: Any) -> Run:
        return _of(lambda *given: mix_experts(*given, implementation="dense"), *given)

    yield Pair("a token's experts, INT8", _of(mix_experts, w8, *one), "in float32", _of(mix_experts, w, *one), 0.45)
    yield Pair("a token's experts, float32", _of(mix_experts, w, *one), "all experts", all_of(w, *one), 0.75)
    yield Pair("8 tokens' experts, INT8", _of(mix_experts, w8, *few), "all experts", all_of(w8, *few), 0.8)
    yield Pair("256 tokens' experts, INT8", _of(mix_experts, w8, *many), "all experts", all_of(w8, *many), 0.5)


def _given(cfg: Config, tokens: int) -> tuple[jax.Array, Routing]:
    """Random tokens, and as random experts."""
    assert cfg.experts
    order_te = np.random.default_rng(0).random((tokens, cfg.experts.count)).argsort(axis=1)
    experts_tk = jnp.asarray(order_te[:, : cfg.experts.per_token])
    return _normal(tokens, cfg.width), Routing(experts_tk, jnp.ones(experts_tk.shape))


def _attention(cfg: Config) -> Iterator[Pair]:
    att = cfg.attention
    assert isinstance(att, LatentAttention)
    p, batch = draw(mla_params(cfg, att, jnp.float32)), 8
    queries = _normal(batch, att.heads, att.nope_dim), _normal(batch, att.heads, att.rope_dim)

    def to(context: int, pages: int) -> Run:
        """A token of each sequence, in whose table there are so many pages."""
        step = decoding(cfg, batch, context - 1, PAGE).batch
        cache = zeros(cache_params(cfg, step.pages_sp.size, PAGE, jnp.float32))[0]
        step = step._replace(pages_sp=jnp.pad(step.pages_sp, ((0, 0), (0, pages - step.pages_sp.shape[1]))))
        return _of(partial(attend_queries, att=att), p, *queries, cache, step)

    seen = 2048 * batch * (att.kv_rank + att.rope_dim) * 4
    yield Pair("attention to 100 tokens of 8,192", to(100, 8192 // PAGE), "of 128", to(100, 128 // PAGE), 1.8)
    yield Pair("attention to 2,048 tokens", to(2048, 2048 // PAGE), "a sum of their bytes", _reading(seen), 8)


def _rounds() -> Pair:
    """The same two answers in the other order: the first can have no rounds together while the second waits."""
    subject, prompts = random("quick", QUICK, "float32", jnp.float32), itertools.count()
    engine = _engine(subject, 1)
    together, alone = (_asking(engine, prompts, [8, 8], tokens) for tokens in ([1, 64], [64, 1]))
    return Pair("rounds in one launch", together, "each launched", alone, 0.75)


def _answers() -> Iterator[Pair]:
    subject, prompts = random("wide", WIDE, "int8", jnp.float32), itertools.count()
    engine, in_floats = _engine(subject, 4), _engine(random("wide", WIDE, "float32", jnp.float32), 4)
    one, four = (_asking(engine, prompts, [8] * count, [24] * count) for count in (1, 4))
    yield Pair("an answer, INT8", one, "in float32", _asking(in_floats, prompts, [8], [24]), 0.57)
    yield Pair("four answers together", four, "one", one, 3.6)
    prompt = _asking(engine, prompts, [512], [1])
    yield Pair("a prompt of 512", prompt, "products as large", _products(subject, 512), 8)
    (known,) = runs.prompts(subject.cfg, [960], next(prompts))
    again = _asking(engine, prompts, [64], [1], known)
    yield Pair("a prompt of 1,024, 960 known", again, "a new one", _asking(engine, prompts, [1024], [1]), 0.4)


def _engine(subject: Subject, answers: int) -> Engine:
    options = EngineConfig(max_num_seqs=answers, num_speculative_tokens=0, warmup=False)
    return Engine(subject.model, subject.cfg, subject.tokenizer, options)


def _asking(
    engine: Engine, seeds: Iterator[int], sizes: Sequence[int], tokens: Sequence[int], known: runs.Prompt = ()
) -> Run:
    """Answers to prompts that are new each time, but for what they begin with."""

    def run() -> None:
        ends = runs.prompts(engine.cfg, sizes, next(seeds))
        runs.answer(engine, [known + end for end in ends], tokens)

    return run


def _products(subject: Subject, tokens: int) -> Run:
    """Square products, of as many INT8 operations together as a prompt of so many tokens."""
    cfg, width = subject.cfg, subject.cfg.width
    phase, cache = Phase.prompt(tokens, visited=0), cache_params(cfg, 1, PAGE, jnp.float32)
    operations = total(parts(cfg, subject.params, cache, phase).values()).operations["int8"]
    x_td, w_lfd = (jnp.ones(shape, jnp.int8) for shape in ((tokens, width), (4, width, width)))

    def run(x_td: jax.Array, w_lfd: jax.Array) -> jax.Array:
        one = lambda i: jnp.einsum("td,fd->tf", x_td, w_lfd[i % 4], preferred_element_type=jnp.int32)  # noqa: E731
        count = round(operations / (2 * tokens * width**2))
        return jax.lax.fori_loop(0, count, lambda i, y: y + one(i), jnp.zeros((tokens, width), jnp.int32))

    return _of(run, x_td, w_lfd)


def _of(function: Callable[..., Any], *given: Any) -> Run:
    """A function of arrays, as the engine compiles."""
    made = compiled(function)
    return lambda: jax.block_until_ready(made(*given))


def _reading(count: int) -> Run:
    """A sum of float32 numbers of so many bytes."""
    return _of(lambda x: x.sum(axis=1), _normal(1024, count // 4096))


def _normal(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))


def main() -> None:
    """Prints each pair's ratio and bound; exits with 1 if one is above."""
    jax.config.update("jax_platforms", "cpu")
    enable_cache()
    table, slow = Table("seconds of", "in seconds of", "ratio", "at most", "", box=None), 0
    for pair in track(list(pairs()), "running pairs in turns", console=Console(stderr=True)):
        ratio = pair.ratio()
        slow += ratio > pair.most
        table.add_row(pair.name, pair.other, f"{ratio:.2f}", f"{pair.most:.2f}", "SLOW" if ratio > pair.most else "ok")
    Console().print(table)
    if slow:
        Console(stderr=True).print(f"{slow} of {len(table.rows)} are above their bound, measured {ATTEMPTS} times")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
