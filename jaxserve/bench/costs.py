"""What a phase must read, write and multiply at least, by its parts; and the time that takes where there are limits.

Counted are weights, each once a step and of experts those that some token visits, and the cache: what is seen of it,
and what is added. Activations, norms and gains are not: they stay in a processor's caches, and are small. A product
with a matrix `[f, d]` has 2 f d operations a token. So no program can be faster than `ideal_seconds` but one that
computes something else.

Letters are those of `layers.dims`; `pairs` are those of a token and a key that it sees, summed over the tokens.

    attention, latent       the form of fewer operations, of
      absorbed                2 h (2c + r) pairs  +  2 h (n + v) c t
      expanded                2 h (n + r + v) pairs  +  2 h (n + v) c keys
    attention, grouped      4 h r pairs
    experts                 6 f d k t, bytes of the experts that are visited
    ideal seconds           max(bytes / bandwidth, sum over dtypes of operations / peak)
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxserve.bench.limits import Limits
from jaxserve.layers.config import Config, GroupedAttention, LatentAttention
from jaxserve.layers.int8 import is_quantized
from jaxserve.layers.mla import Mla
from jaxserve.layers.moe import Moe
from jaxserve.layers.transformer import Layer, Model
from jaxserve.parallel.qarray import QArray

PEAKS = {1: "int8", 2: "bfloat16", 4: "float32"}
"""Whose limit holds for products of factors of so many bytes each."""


class Cost(NamedTuple):
    """The least that has to be done."""

    bytes: float
    operations: Mapping[str, float]  # two a product, by the dtype of its factors

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return sum(self.operations.values()) / self.bytes


class Phase(NamedTuple):
    """The tokens of a step, or of a prompt."""

    tokens: int
    pairs: float
    read: float  # cached tokens that are read
    chosen: int  # tokens that a next one is chosen for
    visited: float  # experts that some token visits, of all layers together

    @classmethod
    def decoding(cls, batch: int, seen: float, visited: float) -> "Phase":
        """A token of each of `batch` sequences, which sees so many, itself among them."""
        return cls(batch, batch * seen, batch * (seen - 1), batch, visited)

    @classmethod
    def prompt(cls, tokens: int, visited: float) -> "Phase":
        """A prompt of which nothing is cached, computed at once: its own entries need not be read."""
        return cls(tokens, tokens * (tokens + 1) / 2, 0, 1, visited)


def total(costs: Iterable[Cost]) -> Cost:
    """All of them, one after another."""
    costs = list(costs)
    kinds = sorted({kind for cost in costs for kind in cost.operations})
    operations = {kind: sum(cost.operations.get(kind, 0) for cost in costs) for kind in kinds}
    return Cost(sum(cost.bytes for cost in costs), operations)


def ideal_seconds(cost: Cost, limits: Limits) -> float:
    """The roofline: the time of the machine's memory, or of its arithmetic, whichever is longer."""
    return max(memory_seconds(cost, limits), compute_seconds(cost, limits))


def memory_seconds(cost: Cost, limits: Limits) -> float:
    """The time in which memory could be read or written."""
    return cost.bytes / limits.bandwidth


def compute_seconds(cost: Cost, limits: Limits) -> float:
    """The time of all products at the peaks of their dtypes, one after another."""
    return sum(count / limits.peaks[kind] for kind, count in cost.operations.items())


def bound(cost: Cost, limits: Limits) -> str:
    """What ends the roofline: "memory" or "compute"."""
    return "memory" if memory_seconds(cost, limits) >= compute_seconds(cost, limits) else "compute"


def parts(cfg: Config, params: Model, cache: Any, phase: Phase) -> dict[str, Cost]:
    """What each part of a step costs, all layers together; MTP modules are not used.

    `params` and `cache` are trees of `Param`; of the latter, any number of pages.
    """
    layers = params.layers[: cfg.layers]
    mixtures = [layer.ffn for layer in layers if isinstance(layer.ffn, Moe)]
    networks = [layer.ffn for layer in layers if not isinstance(layer.ffn, Moe)]
    head = params.embed if params.head is None else params.head
    row = params.embed.nbytes / params.embed.shape[0]
    found = {
        "embedding": Cost(phase.tokens * row, {}),
        "projections": total(products(projections(layer), phase.tokens) for layer in layers),
        "attention": total(attention(cfg, layer, entry, phase) for layer, entry in zip(layers, cache, strict=False)),
        "dense network": total(products(network, phase.tokens) for network in networks),
        "router": total(products(mixture.w_router, phase.tokens, jnp.float32) for mixture in mixtures),
        "experts": experts(cfg, mixtures, phase),
        "shared expert": total(products(mixture.shared, phase.tokens) for mixture in mixtures),
        "head": products(head, phase.chosen),
    }
    return {name: cost for name, cost in found.items() if cost.bytes}


def products(weights: Any, rows: float, dtype: Any = None) -> Cost:
    """Rows times each matrix of a tree of `Param`: all of it is read once. `dtype` is that of factors, if another."""
    operations: dict[str, float] = {}
    for leaf in jax.tree.leaves(weights, is_leaf=is_quantized):
        matrix = leaf.codes if isinstance(leaf, QArray) else leaf
        kind = PEAKS[jnp.dtype(dtype or matrix.dtype).itemsize]
        operations[kind] = operations.get(kind, 0) + 2 * rows * matrix.size
    return Cost(nbytes(weights), operations)


def nbytes(tree: Any) -> int:
    """Of a tree of `Param`, with scales."""
    return sum(p.nbytes for p in jax.tree.leaves(tree))


def projections(layer: Layer) -> Any:
    """A layer's matrices that attention multiplies states with, before it looks at the cache and after."""
    attn = layer.attn
    if isinstance(attn, Mla):
        return attn.w_dq, attn.w_uq, attn.w_dkv, attn.w_kr, attn.w_o
    return attn.w_q, attn.w_k, attn.w_v, attn.w_o


def attention(cfg: Config, layer: Layer, cache: Any, phase: Phase) -> Cost:
    """A layer's attention to the cache, in the dtype of activations; of latents with `w_uk` and `w_uv`."""
    att, keys = cfg.attention, phase.read + phase.tokens
    entry = sum(p.nbytes / math.prod(p.shape[:2]) for p in jax.tree.leaves(cache))
    kind = PEAKS[jnp.dtype(layer.attn_norm.dtype).itemsize]
    if isinstance(att, GroupedAttention):
        return Cost(entry * keys, {kind: 4 * att.heads * att.head_dim * phase.pairs})
    assert isinstance(layer.attn, Mla)
    least = min(absorbed(att, phase.pairs, phase.tokens), expanded(att, phase.pairs, keys))
    return Cost(entry * keys + nbytes((layer.attn.w_uk, layer.attn.w_uv)), {kind: least})


def absorbed(att: LatentAttention, pairs: float, tokens: float) -> float:
    """Operations of attention to the latents themselves."""
    per_token = att.kv_rank * (att.nope_dim + att.value_dim)
    return 2 * att.heads * ((2 * att.kv_rank + att.rope_dim) * pairs + per_token * tokens)


def expanded(att: LatentAttention, pairs: float, keys: float) -> float:
    """Operations of attention to keys and values that are computed from the latents, once each."""
    per_key = att.kv_rank * (att.nope_dim + att.value_dim)
    return 2 * att.heads * ((att.nope_dim + att.rope_dim + att.value_dim) * pairs + per_key * keys)


def experts(cfg: Config, mixtures: list[Moe], phase: Phase) -> Cost:
    """The routed experts of all layers: bytes of those that are visited, operations of each visit."""
    if not mixtures or not cfg.experts:
        return Cost(0, {})
    share = cfg.experts.per_token / cfg.experts.count
    layers = [products(mixture.experts, phase.tokens * share) for mixture in mixtures]
    visited = phase.visited / len(mixtures) / cfg.experts.count
    return Cost(visited * sum(cost.bytes for cost in layers), total(layers).operations)
