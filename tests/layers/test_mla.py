import math
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.layers import batch as paging
from jaxserve.layers import mla as module
from jaxserve.layers.config import Config, LatentAttention
from jaxserve.layers.mla import (
    LatentCache,
    attend_absorbed,
    attend_expanded,
    expanding_pays,
    latents,
    mla,
    mla_cache,
    mla_params,
)
from tests.layers import published
from tests.layers.helpers import (
    batch_of,
    chunks,
    empty,
    extending,
    f64,
    intermediates,
    normal,
    not_written_yet,
    page_table,
    published_mla,
    random_arrays,
    raw_config,
)
from tests.oracles import reference
from tests.tolerances import LAYER, OP, assert_close

FORMS = {"expanded": attend_expanded, "absorbed": attend_absorbed}
_YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 16, "beta_fast": 32, "beta_slow": 1}
RAW: dict[str, dict[str, Any]] = {
    "compressed query": raw_config("deepseek_v3"),
    "int8 cache": raw_config("deepseek_v3", kv_cache_dtype="int8"),  # for the reference and for `Layer`
    "whole query": raw_config("deepseek_v2_lite"),
    "yarn": raw_config("deepseek_v3", rope_scaling=_YARN | {"mscale": 1.0, "mscale_all_dim": 0.707}),
    "halves": raw_config("deepseek_v3", rope_interleave=False),
    "large eps": raw_config("deepseek_v3", rms_norm_eps=0.05),  # the norms of the latents keep theirs
}


class Layer:
    """A random layer, and a function that runs it over pages of 4 tokens."""

    def __init__(self, name: str, rng: np.random.Generator):
        self.cfg = Config.from_hf(RAW[name])
        assert isinstance(self.cfg.attention, LatentAttention)
        self.att, self.int8 = self.cfg.attention, "kv_cache_dtype" in RAW[name]
        self.weights = random_arrays(mla_params(self.cfg, self.att, jnp.float32), rng)
        self.run = jax.jit(partial(extending(mla, latents), cfg=self.cfg, att=self.att))

    def empty(self, pages: int) -> LatentCache:
        return empty(mla_cache(self.att, pages, 4, jnp.float32, self.int8))

    def filled(self, rng: np.random.Generator, pages: int) -> LatentCache:
        """With random entries."""
        rows = LatentCache(*(normal(rng, pages * 4, width) for width in (self.att.kv_rank, self.att.rope_dim)))
        return paging.write(self.empty(pages), rows, batch_of([pages * 4], page_table(1, pages)))

    def inputs(self, rng: np.random.Generator, tokens: int) -> jax.Array:
        return normal(rng, tokens, self.cfg.width)


def alone(layer: Layer, x: jax.Array) -> np.ndarray:
    """A sequence's outputs from one step."""
    table = page_table(1, -(-len(x) // 4))
    return np.asarray(layer.run(layer.weights, x, layer.empty(table.size), batch_of([len(x)], table))[0])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", RAW)
def test_both_forms_equal_the_reference(rng, monkeypatch, name, form):
    monkeypatch.setattr(module, "expanding_pays", lambda att, tile: form == "expanded")
    layer = Layer(name, rng)
    x = layer.inputs(rng, 19)
    expected = reference.mla(RAW[name], published_mla("a", layer.weights), "a", f64(x))
    assert_close(alone(layer, x), expected, LAYER)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("tile", "block_tokens", "name"), [(1, 256, "yarn"), (3, 8, "yarn"), (3, 8, "int8 cache")])
def test_own_latents_beside_the_cache_are_seen_as_if_they_were_in_it(rng, monkeypatch, tile, block_tokens, name, form):
    monkeypatch.setattr(paging, "BLOCK_TOKENS", block_tokens)
    layer, batch = Layer(name, rng), batch_of([tile, 1, 0, 1], page_table(4, 6, seed=5), starts=[18, 3, 0, 0])
    cache = layer.filled(rng, pages=24)
    rows = LatentCache(*(normal(rng, 4 * tile, width) for width in (layer.att.kv_rank, layer.att.rope_dim)))
    q_thn = normal(rng, 4 * tile, layer.att.heads, layer.att.nope_dim)
    q_thr = normal(rng, 4 * tile, layer.att.heads, layer.att.rope_dim)
    found, expected = (
        jax.jit(partial(FORMS[form], att=layer.att))(layer.weights, q_thn, q_thr, each, batch)
        for each in (not_written_yet(cache, rows, batch), paging.write(cache, rows, batch))
    )
    assert_close(found, expected, LAYER)


@pytest.mark.parametrize("block_tokens", [256, 8])
@pytest.mark.parametrize("name", ["compressed query", "whole query", "int8 cache"])
def test_absorbed_equals_expanded(rng, monkeypatch, name, block_tokens):
    monkeypatch.setattr(paging, "BLOCK_TOKENS", block_tokens)
    layer, table = Layer(name, rng), page_table(2, 6, seed=5)
    cache = layer.filled(rng, pages=12)
    batch = batch_of([5, 2], table, starts=[18, 3])
    q_thn = normal(rng, 10, layer.att.heads, layer.att.nope_dim)
    q_thr = normal(rng, 10, layer.att.heads, layer.att.rope_dim)
    expanded, absorbed = (
        jax.jit(partial(form, att=layer.att))(layer.weights, q_thn, q_thr, cache, batch) for form in FORMS.values()
    )
    assert_close(absorbed, expanded, LAYER)
    np.testing.assert_array_equal(absorbed[7:], 0.0)  # padding sees nothing


@pytest.mark.parametrize("form", FORMS)
def test_chunks_and_single_tokens_give_what_the_whole_gives(rng, monkeypatch, form):
    monkeypatch.setattr(module, "expanding_pays", lambda att, tile: form == "expanded")
    monkeypatch.setattr(paging, "BLOCK_TOKENS", 8)
    layer = Layer("compressed query", rng)
    x = layer.inputs(rng, 16)
    whole, table = alone(layer, x), page_table(1, 4, seed=2)
    for size in (8, 1):
        cache, parts = layer.empty(4), []
        for batch, part in zip(chunks(np.zeros(16), table, size), jnp.split(x, 16 // size), strict=True):
            y, cache = layer.run(layer.weights, part, cache, batch)
            parts.append(y)
        assert_close(np.concatenate(parts), whole, LAYER)


def test_sequences_in_one_step_do_not_see_each_other(rng):
    layer, lengths = Layer("whole query", rng), [5, 1, 9]
    x = layer.inputs(rng, 27).reshape(3, 9, -1)
    batch = batch_of(lengths, page_table(3, 3, seed=8))
    y = layer.run(layer.weights, x.reshape(27, -1), layer.empty(9), batch)[0].reshape(3, 9, -1)
    assert jnp.isfinite(y).all()
    for i, length in enumerate(lengths):
        assert_close(y[i, :length], alone(layer, x[i])[:length], LAYER)


def test_the_form_is_the_one_with_fewer_operations():
    """With DeepSeek-V3's sizes: 320 w + 131,072 against 1,088 w operations a key and head."""
    att = Config.from_hf(published.DEEPSEEK_V3).attention
    assert isinstance(att, LatentAttention)
    assert [expanding_pays(att, tile) for tile in (1, 2, 170, 171, 4096)] == [False, False, False, True, True]


def test_the_cache_of_deepseek_v3_takes_576_values_a_token():
    att = Config.from_hf(published.DEEPSEEK_V3).attention
    assert isinstance(att, LatentAttention)
    pages = mla_cache(att, pages=10, page_size=128, dtype=jnp.bfloat16)
    assert sum(page.nbytes for page in pages) == 10 * 128 * 576 * 2


@pytest.mark.parametrize("form", FORMS)
def test_a_cache_of_bfloat16_serves_activations_of_float32(rng, monkeypatch, form):
    monkeypatch.setattr(module, "expanding_pays", lambda att, tile: form == "expanded")
    layer = Layer("compressed query", rng)
    x, batch = layer.inputs(rng, 6), batch_of([6], page_table(1, 2))
    exact, exact_cache = layer.run(layer.weights, x, layer.empty(2), batch)
    halves = jax.tree.map(lambda page: page.astype(jnp.bfloat16), layer.empty(2))
    rounded, rounded_cache = layer.run(layer.weights, x, halves, batch)
    assert (rounded.dtype, rounded_cache.c.dtype, exact_cache.c.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    assert_close(rounded, exact, 4, jnp.bfloat16)


def test_an_int8_cache_has_the_codes_and_scales_of_the_rule(rng):
    layer = Layer("int8 cache", rng)
    c_tc = np.asarray(normal(rng, 8, layer.att.kv_rank)) * np.float32([[1], [0], [1e-3], [50], [1], [1], [1], [1]])
    r_tr = normal(rng, 8, layer.att.rope_dim)
    cache = paging.write(layer.empty(2), LatentCache(jnp.asarray(c_tc), r_tr), batch_of([8], page_table(1, 2)))
    most_t1 = np.abs(c_tc).max(axis=1, keepdims=True)
    codes_tc = np.round(c_tc * np.divide(127, most_t1, out=np.zeros_like(most_t1), where=most_t1 > 0))
    assert cache.c.codes.dtype == jnp.int8 and cache.r.dtype == jnp.bfloat16
    np.testing.assert_array_equal(cache.c.codes.reshape(8, -1), codes_tc)
    assert_close(cache.c.scale.reshape(8, 1), most_t1 / 127, OP)
    np.testing.assert_array_equal(cache.r.reshape(8, -1), r_tr.astype(jnp.bfloat16))


@pytest.mark.parametrize("form", FORMS)
def test_an_int8_cache_changes_what_attention_gives_by_no_more_than_follows_from_rounding(rng, form):
    """A latent is off by half a code at most, a key by 2**-9 of itself, so a logit by `off`.

    Then a weight is off by a factor of exp(2 off), and a mixture of latents by that and half a code.
    """
    layer, batch, whole = (
        Layer("int8 cache", rng),
        batch_of([3], page_table(1, 6), [20]),
        batch_of([24], page_table(1, 6)),
    )
    att = replace(layer.att, scale=0.05)
    c_jc, k_jr = normal(rng, 24, att.kv_rank), normal(rng, 24, att.rope_dim)
    q_thn, q_thr = normal(rng, 3, att.heads, att.nope_dim), normal(rng, 3, att.heads, att.rope_dim)
    found, expected = (
        np.asarray(
            FORMS[form](layer.weights, q_thn, q_thr, paging.write(pages, LatentCache(c_jc, k_jr), whole), batch, att)
        )
        for pages in (layer.empty(6), empty(mla_cache(att, 6, 4, jnp.float32)))
    )
    c_jc, k_jr, q_thr, w_uk, w_uv = map(f64, (c_jc, k_jr, q_thr, layer.weights.w_uk, layer.weights.w_uv))
    q_thc = np.einsum("thn,hnc->thc", f64(q_thn), w_uk)
    logits_thj = att.scale * (q_thc @ c_jc.T + q_thr @ k_jr.T)
    seen_tj = np.arange(24)[None] <= 20 + np.arange(3)[:, None]
    weights_thj = reference.softmax(np.where(seen_tj[:, None], logits_thj, -np.inf))
    half_j = np.abs(c_jc).max(axis=1) / 254
    off_thj = att.scale * (np.abs(q_thc).sum(axis=-1)[..., None] * half_j + np.abs(q_thr) @ np.abs(k_jr).T * 2**-9)
    factor_th1 = np.exp(2 * off_thj.max(axis=-1, keepdims=True))
    mixed_thc = (factor_th1 - 1) * (weights_thj @ np.abs(c_jc)) + half_j.max()
    bound_thv = np.einsum("thc,hvc->thv", mixed_thc, np.abs(w_uv))
    assert (np.abs(found - expected) <= bound_thv).all()
    assert np.abs(found - expected).max() > bound_thv.max() / 100


def shapes_of_a_step(tile: int, context: int, dtype=jnp.float32) -> tuple[Layer, list[tuple[int, ...]]]:
    layer, pages = Layer("compressed query", np.random.default_rng(0)), context // 4
    batch = batch_of([tile], page_table(1, pages), starts=[context - tile])
    args = layer.weights, jnp.ones((tile, layer.cfg.width), dtype), layer.empty(pages), batch
    return layer, list(intermediates(jax.make_jaxpr(layer.run)(*args)))


@pytest.mark.parametrize("form", FORMS)
def test_memory_grows_with_a_block_and_not_with_the_context(monkeypatch, form):
    monkeypatch.setattr(module, "expanding_pays", lambda att, tile: form == "expanded")
    tile, context = 256, 4096
    layer, shapes = shapes_of_a_step(tile, context)
    largest = max(map(math.prod, shapes))
    logits_of_a_block, cached = layer.att.heads * tile * paging.BLOCK_TOKENS, context * layer.att.kv_rank
    assert largest <= max(logits_of_a_block, cached) < layer.att.heads * tile * context / 8


def test_decoding_never_expands_the_keys_of_a_block():
    layer, shapes = shapes_of_a_step(tile=1, context=4096)
    per_key = [shape for shape in shapes if paging.DECODE_BLOCK_TOKENS in shape]
    assert per_key  # the block is there: its latents, rotated keys and logits
    largest = max(map(math.prod, per_key))
    assert largest == paging.DECODE_BLOCK_TOKENS * layer.att.kv_rank
