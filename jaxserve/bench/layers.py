"""Each part of a step alone: what it takes, of all layers one after another.

Parts are the model's own functions, compiled as the engine compiles its programs. All are run in turns, so that
between two runs of a part the others' weights pass by: what it reads comes from memory, not from a processor's cache.
"""

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.bench.costs import Cost, Phase, parts
from jaxserve.bench.models import Subject
from jaxserve.bench.roofline import Point
from jaxserve.layers.attention import Gqa, attend_grouped, keys_values, merge_heads
from jaxserve.layers.batch import Batch, write
from jaxserve.layers.config import Config, GroupedAttention, LatentAttention
from jaxserve.layers.linear import einsum
from jaxserve.layers.mla import Mla, attend_queries, compressed, latents, queries
from jaxserve.layers.moe import Moe, Routing, mix_experts, mlp, route
from jaxserve.layers.transformer import Layer, logits
from jaxserve.options import CacheDtype, EngineConfig, cache_of
from jaxserve.packing import Packer
from jaxserve.parallel.sharding import zeros
from jaxserve.programs import Programs, Progress
from jaxserve.slots import choose, empty
from jaxserve.table import SlotTable

CHOICE = "choice"
"""The part that chooses tokens: all it reads are scores."""

One = Callable[[Any, Any, Any], tuple[Any, Any]]
"""A part of one layer: of weights, cache and what is given, what it makes, and the cache."""


class Part(NamedTuple):
    """A part of a step, with an entry of each tuple for each layer."""

    one: One
    weights: tuple[Any, ...]
    given: tuple[Any, ...]
    cache: tuple[Any, ...]


class Work(NamedTuple):
    """What a step does: the tokens it has, and for how many of them a next one is chosen."""

    batch: Batch
    chosen: int

    @property
    def tokens(self) -> int:
        return self.batch.tokens_t.shape[0]


def decoding(cfg: Config, batch: int, context: int, page_size: int) -> Work:
    """A token of each sequence, which has so many cached."""
    pages = -(-(context + 1) // page_size)
    own_sp = jnp.arange(batch * pages).reshape(batch, pages)
    tokens_t = jnp.asarray(np.random.default_rng(0).integers(0, cfg.vocab_size, batch))
    return Work(Batch(tokens_t, jnp.full(batch, context), jnp.arange(batch), own_sp), batch)


def prompt(cfg: Config, tokens: int, page_size: int) -> Work:
    """A whole prompt, of which nothing is cached."""
    tokens_t = jnp.asarray(np.random.default_rng(0).integers(0, cfg.vocab_size, tokens))
    pages_sp = jnp.arange(-(-tokens // page_size))[None]
    return Work(Batch(tokens_t, jnp.arange(tokens), jnp.zeros(1, jnp.int32), pages_sp), 1)


def measure(
    subject: Subject, work: Work, repetitions: int, kv_cache_dtype: CacheDtype = "auto",
    progress: Progress | None = None,
) -> list[Point]:  # fmt: skip
    """The time of each part, beside what it costs at least."""
    options = EngineConfig(kv_cache_dtype=kv_cache_dtype)
    cache = cache_of(subject.cfg, options, work.batch.pages_sp.size, subject.params.norm.dtype)
    found = split(subject, work, zeros(cache))
    seconds = run_in_turn(found, repetitions, progress)
    costs = _costs(subject, work, found, cache)
    return [Point(name, seconds[name], costs[name]) for name in found]


def _costs(subject: Subject, work: Work, found: Mapping[str, Part], cache: Any) -> dict[str, Cost]:
    places_t = np.asarray(work.batch.positions_t)
    visits = [np.unique(routing.experts_tk).size for _, routing in found["experts"].given] if "experts" in found else []
    old = int(places_t.sum()) if work.batch.tile == 1 else 0
    phase = Phase(work.tokens, float((places_t + 1).sum()), old, work.chosen, sum(visits))
    scores = Cost(4 * work.chosen * subject.cfg.vocab_size, {})
    return {**parts(subject.cfg, subject.params, cache, phase), CHOICE: scores}


def run_in_turn(found: Mapping[str, Part], turns: int, progress: Progress | None = None) -> dict[str, list[float]]:
    """Seconds of each part in each turn, after one that doesn't count."""
    caches = {name: part.cache for name, part in found.items()}
    run = {name: jax.jit(_of_all_layers(part.one), donate_argnums=0) for name, part in found.items()}
    given = {name: (part.weights, part.given) for name, part in found.items()}
    programs = Programs(lambda name: run[name].trace(caches[name], *given[name]))
    programs.compile(found, progress)
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(1 + turns):
        for name in found:
            began = time.perf_counter()
            made, caches[name] = jax.block_until_ready(programs[name](caches[name], *given[name]))
            seconds[name].append(time.perf_counter() - began)
            del made
    return {name: each[1:] for name, each in seconds.items()}


def _of_all_layers(one: One) -> Callable[..., Any]:
    """The part of one layer after another: each waits for the one before, as if it were given what that has made."""

    def run(cache: Any, weights: Any, given: Any) -> Any:
        made, caches, last = [], [], ()
        for own, layer, what in zip(cache, weights, given, strict=True):
            what, _ = jax.lax.optimization_barrier((what, last))
            last, own = one(layer, own, what)
            made.append(last)
            caches.append(own)
        return made, tuple(caches)

    return run


def split(subject: Subject, work: Work, cache: tuple[Any, ...]) -> dict[str, Part]:
    """The parts of a step, by the names of `costs.parts`; MTP modules have none."""
    cfg, model, rng = subject.cfg, subject.model, np.random.default_rng(0)
    layers, dtype = model.layers[: cfg.layers], subject.params.norm.dtype
    values = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32), dtype)  # noqa: E731
    x_td = values(work.tokens, cfg.width)
    mixtures = [layer.ffn for layer in layers if isinstance(layer.ffn, Moe)]
    dense = [layer.ffn for layer in layers if not isinstance(layer.ffn, Moe)]
    routings = [_route(cfg, mixture, values(work.tokens, cfg.width)) for mixture in mixtures]
    outer = model._replace(layers=(), mtp=())
    found = {
        "embedding": _plain(lambda w, tokens_t: w[tokens_t], [model.embed], [work.batch.tokens_t]),
        **_attention(cfg, layers, work, cache, values),
        "dense network": _plain(mlp, dense, [x_td] * len(dense)),
        "router": _plain(partial(_route, cfg), mixtures, [x_td] * len(mixtures)),
        "experts": _plain(
            lambda w, given: mix_experts(w, *given), [m.experts for m in mixtures], [(x_td, r) for r in routings]
        ),
        "shared expert": _plain(mlp, [m.shared for m in mixtures if m.shared], [x_td for m in mixtures if m.shared]),
        "head": _plain(logits, [outer], [x_td[: work.chosen]]),
        CHOICE: _plain(lambda _, given: choose(*given), [()], [_choice(cfg, work, values)]),
    }
    return {name: part for name, part in found.items() if part.weights}


def _plain(function: Callable[[Any, Any], Any], weights: Any, given: Any) -> Part:
    """A part that has no cache."""
    return Part(lambda w, _, what: (function(w, what), ()), tuple(weights), tuple(given), ((),) * len(weights))


def _route(cfg: Config, mixture: Moe, x_td: jax.Array) -> Routing:
    assert cfg.experts
    return route(mixture, x_td, cfg.experts)


def _attention(
    cfg: Config, layers: tuple[Layer, ...], work: Work, cache: tuple[Any, ...], values: Callable[..., jax.Array]
) -> dict[str, Part]:
    """Its projections, and what it does with the cache: new entries are written, all that is seen is attended to."""
    att, weights = cfg.attention, tuple(layer.attn for layer in layers)
    width = att.value_dim if isinstance(att, LatentAttention) else att.head_dim
    given = values(work.tokens, cfg.width), values(work.tokens, att.heads, width)
    project = partial(_project, cfg, work.batch)
    shapes = jax.eval_shape(project, weights[0], given)[:2]
    seen = jax.tree.map(lambda each: values(*each.shape), shapes)
    return {
        "projections": _plain(project, weights, [given] * len(weights)),
        "attention": Part(partial(_attend, cfg, work.batch), weights, (seen,) * len(weights), cache[: len(weights)]),
    }


def _project(cfg: Config, batch: Batch, p: Mla | Gqa, given: Any) -> tuple[Any, Any, jax.Array]:
    """The tokens' entries of the cache, their queries, and what heads' outputs add to the states."""
    (x_td, o_thv), att = given, cfg.attention
    y_td = merge_heads(o_thv, p.w_o)
    if isinstance(p, Mla):
        assert isinstance(att, LatentAttention)
        return latents(p, x_td, batch, cfg), queries(p, compressed(p, x_td), batch, cfg, att), y_td
    return keys_values(p, x_td, batch, cfg), (einsum("td,hrd->thr", x_td, p.w_q),), y_td


def _attend(cfg: Config, batch: Batch, p: Mla | Gqa, cache: Any, given: Any) -> tuple[jax.Array, Any]:
    """Writes the tokens' entries, and attends to all of them."""
    (entries, asked), att = given, cfg.attention
    cache = write(cache, entries, batch)
    if isinstance(p, Mla):
        assert isinstance(att, LatentAttention)
        q_thn, q_thr = asked
        return attend_queries(p, q_thn, q_thr, cache, batch, att), cache
    assert isinstance(att, GroupedAttention)
    (q_thr,) = asked
    return attend_grouped(q_thr, cache, batch, att), cache


def _choice(cfg: Config, work: Work, values: Callable[..., jax.Array]) -> Any:
    """What `slots.choose` is given for greedy answers."""
    count = work.chosen
    rows_s, masks = Packer(0, cfg.vocab_size, count).rows({}, count, {})
    table = SlotTable(count, 1, frozenset()).on_device()
    scores_su, start_s = values(count, cfg.vocab_size).astype(jnp.float32), jnp.zeros(count, jnp.int32)
    none_sk = jnp.zeros((count, 0), jnp.int32)
    return scores_su, start_s, none_sk, rows_s, empty(count, 0, cfg.vocab_size), table, masks
