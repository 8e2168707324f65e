"""Tiny random models, batches over paged caches, and the same weights under their published names."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.layers import config
from jaxserve.layers.attention import Gqa
from jaxserve.layers.batch import Batch, Fresh, write
from jaxserve.layers.config import Config
from jaxserve.layers.mla import Mla
from jaxserve.layers.moe import Mlp, Moe
from jaxserve.layers.transformer import Layer, Model, cache_params, forward, logits, model_params

FAMILIES = ("deepseek_v2", "deepseek_v2_lite", "deepseek_v3", "qwen3", "qwen3_moe")
GOLDENS = Path(__file__).parents[1] / "oracles" / "goldens"
GOLDEN_NAMES = sorted(file.parent.name for file in GOLDENS.glob("*/golden.npz"))

Weights = dict[str, np.ndarray]


def raw_config(family: str, **changes: Any) -> dict[str, Any]:
    """The `config.json` behind `Config.tiny(family, **changes)`: what the oracle reads."""
    return config.TINY[family] | changes


def normal(rng: np.random.Generator, *shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape), dtype)


def f64(x: Any) -> np.ndarray:
    """For the oracle."""
    return np.asarray(x, np.float64)


def random_arrays(params: Any, rng: np.random.Generator) -> Any:
    """Random weights, gains and biases too: a tree of ones and zeros hides what is swapped or left out."""
    return jax.tree.map(lambda p: p.mean + (p.std or 0.3) * normal(rng, *p.shape, dtype=p.dtype), params)


def random_model(cfg: Config, rng: np.random.Generator, dtype: Any = jnp.float32) -> Model:
    return random_arrays(model_params(cfg, dtype), rng)


def random_tokens(cfg: Config, rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.integers(0, cfg.vocab_size, count, dtype=np.int32)


def empty(params: Any) -> Any:
    """Zeros, of NumPy's making."""
    return jax.tree.map(lambda p: jnp.asarray(np.zeros(p.shape), p.dtype), params)


def empty_cache(cfg: Config, pages: int, page_size: int) -> tuple[Any, ...]:
    return empty(cache_params(cfg, pages, page_size))


def page_table(sequences: int, pages_each: int, seed: int | None = None) -> np.ndarray:
    """Pages of each sequence: in order, or shuffled over all sequences."""
    ids = np.arange(sequences * pages_each, dtype=np.int32)
    if seed is not None:
        ids = np.random.default_rng(seed).permutation(ids)
    return ids.reshape(sequences, pages_each)


def batch_of(
    runs: Sequence[Sequence[int] | np.ndarray | int], table: np.ndarray, starts: Sequence[int] | None = None, tile=0
) -> Batch:
    """A tile for each run of tokens, which begins at its start and is padded to the longest, or to `tile`.

    Where attention alone is run, which reads no tokens, their number will do.
    """
    rows = [np.zeros(run) if isinstance(run, int) else run for run in runs]
    tile = max(tile, *map(len, rows))
    tokens, positions = np.zeros((len(rows), tile), np.int32), np.full((len(rows), tile), -1, np.int32)
    for i, (run, start) in enumerate(zip(rows, starts or [0] * len(rows), strict=True)):
        tokens[i, : len(run)] = run
        positions[i, : len(run)] = start + np.arange(len(run))
    arrays = tokens.reshape(-1), positions.reshape(-1), np.arange(len(rows), dtype=np.int32), table
    return Batch(*map(jnp.asarray, arrays))


def not_written_yet(pages: Any, rows: Any, batch: Batch) -> Fresh:
    """What the tiles' own rows would be written into; there and after it, pages hold what is no number, or -128."""
    table, b = np.asarray(batch.pages_sp), jax.tree.leaves(pages)[0].shape[1]
    old = np.zeros((jax.tree.leaves(pages)[0].shape[0], b), bool)
    for slot, start in zip(np.asarray(batch.slots_a), np.asarray(batch.positions_t)[:: batch.tile], strict=True):
        places = np.arange(max(start, 0))
        old[table[slot, places // b], places % b] = True

    def hide(page):
        nothing = jnp.nan if jnp.issubdtype(page.dtype, jnp.floating) else -128
        return jnp.where(old.reshape(*old.shape, *(1,) * (page.ndim - 2)), page, nothing)

    return Fresh(jax.tree.map(hide, pages), rows)


def chunks(tokens: np.ndarray, table: np.ndarray, size: int) -> Iterator[Batch]:
    """One sequence as batches of `size` tokens, the last one padded."""
    for start in range(0, len(tokens), size):
        yield batch_of([tokens[start : start + size]], table, [start], tile=size)


def extending(attention: Callable, entries: Callable) -> Callable:
    """An attention that first adds the tokens' own entries to the cache, and gives that too."""

    def run(p: Any, x_td: jax.Array, cache: Any, batch: Batch, cfg: Config, att: Any) -> tuple[jax.Array, Any]:
        cache = write(cache, entries(p, x_td, batch, cfg), batch)
        return attention(p, x_td, cache, batch, cfg, att), cache

    return run


@partial(jax.jit, static_argnames="cfg")
def step(model: Model, batch: Batch, cache: tuple[Any, ...], cfg: Config) -> tuple[jax.Array, tuple[Any, ...]]:
    """Logits `[a, w, u]` and the cache after the step."""
    out = forward(model, batch, cache, cfg)
    return logits(model, out.hidden_td).reshape(len(batch.slots_a), batch.tile, -1), out.cache


def intermediates(jaxpr: Any, primitive: str = "") -> Iterator[tuple[int, ...]]:
    """Shapes of all that a program computes, in loops and calls too; or of the results of one primitive."""
    for eqn in jaxpr.eqns:
        if not primitive or eqn.primitive.name == primitive:
            yield from (var.aval.shape for var in eqn.outvars)
        for inner in jax.tree.leaves(eqn.params, is_leaf=_is_program):
            if _is_program(inner):
                yield from intermediates(inner, primitive)


def _is_program(value: Any) -> bool:
    return hasattr(value, "eqns")


def published(model: Model) -> Weights:
    """A model's weights under Hugging Face's names, linear ones `[out, in]`."""
    named = {"model.embed_tokens.weight": model.embed, "model.norm.weight": model.norm}
    if model.head is not None:
        named["lm_head.weight"] = model.head
    for i, layer in enumerate(model.layers):
        named |= published_layer(f"model.layers.{i}", layer)
    for i, p in enumerate(model.mtp, start=len(model.layers)):
        at = f"model.layers.{i}"
        parts = {"enorm": p.embed_norm, "hnorm": p.hidden_norm, "eh_proj": p.w_join, "shared_head.norm": p.norm}
        named |= published_layer(at, p.layer) | {f"{at}.{name}.weight": w for name, w in parts.items()}
    return {name: np.asarray(w) for name, w in named.items()}


def published_layer(at: str, p: Layer) -> dict[str, Any]:
    norms = {f"{at}.input_layernorm.weight": p.attn_norm, f"{at}.post_attention_layernorm.weight": p.ffn_norm}
    at_attn, at_ffn = f"{at}.self_attn", f"{at}.mlp"
    attn = published_mla(at_attn, p.attn) if isinstance(p.attn, Mla) else published_gqa(at_attn, p.attn)
    ffn = published_moe(at_ffn, p.ffn) if isinstance(p.ffn, Moe) else published_mlp(at_ffn, p.ffn)
    return norms | attn | ffn


def published_mla(at: str, p: Mla) -> Weights:
    parts = {
        "kv_a_proj_with_mqa": np.concatenate([p.w_dkv, p.w_kr]),
        "kv_a_layernorm": p.kv_norm,
        "kv_b_proj": _matrix(np.concatenate([p.w_uk, p.w_uv], axis=1), 2),
        "o_proj": _matrix(p.w_o, 1),
    }
    query = _matrix(p.w_uq, 2)
    if p.w_dq is None:
        parts["q_proj"] = query
    else:
        parts |= {"q_a_proj": p.w_dq, "q_a_layernorm": p.q_norm, "q_b_proj": query}
    return {f"{at}.{name}.weight": np.asarray(w) for name, w in parts.items()}


def published_gqa(at: str, p: Gqa) -> Weights:
    parts = {name: _matrix(w, 2) for name, w in (("q_proj", p.w_q), ("k_proj", p.w_k), ("v_proj", p.w_v))}
    parts |= {"o_proj": _matrix(p.w_o, 1), "q_norm": p.q_norm, "k_norm": p.k_norm}
    return {f"{at}.{name}.weight": np.asarray(w) for name, w in parts.items()}


def published_mlp(at: str, p: Mlp) -> Weights:
    return {f"{at}.{n}_proj.weight": np.asarray(w) for n, w in (("gate", p.w_gate), ("up", p.w_up), ("down", p.w_down))}


def published_moe(at: str, p: Moe) -> Weights:
    named = {f"{at}.gate.weight": np.asarray(p.w_router)}
    if p.bias is not None:
        named[f"{at}.gate.e_score_correction_bias"] = np.asarray(p.bias)
    for i in range(len(p.w_router)):
        named |= published_mlp(f"{at}.experts.{i}", Mlp(*(w[i] for w in p.experts)))
    return named if p.shared is None else named | published_mlp(f"{at}.shared_experts", p.shared)


def _matrix(w: Any, outputs: int) -> np.ndarray:
    """`[out, in]` of a weight whose first `outputs` axes are the out."""
    array = np.asarray(w)
    return array.reshape(int(np.prod(array.shape[:outputs])), -1)
