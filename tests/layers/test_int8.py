"""Models with INT8 weights: what is rounded, and what that does."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.layers.config import Config
from jaxserve.layers.int8 import described, in_int8, is_int8, quantize_model
from jaxserve.layers.spread import in_order, payload, spread, spread_params
from jaxserve.layers.transformer import Model, forward, logits, model_params
from jaxserve.parallel.errors import ShardingError
from jaxserve.parallel.mesh import make_mesh
from jaxserve.parallel.qarray import QArray, dequantize, quantize_blocks
from jaxserve.parallel.sharding import Param
from tests.layers.helpers import FAMILIES, batch_of, empty_cache, page_table, random_model, random_tokens

is_quantized = functools.partial(lambda leaf: isinstance(leaf, QArray))


def both(family: str, **changes) -> tuple[Config, Model, Model]:
    """A random model, and the same in INT8."""
    cfg = Config.tiny(family, **changes)
    model = random_model(cfg, np.random.default_rng(0))
    return cfg, model, quantize_model(model, in_int8(model_params(cfg)))


def in_blocks(model: Model, rounded: Model, size: int = 4) -> Model:
    """The model with scales for blocks of inputs where it is rounded."""
    one = lambda r, w: quantize_blocks(w, w.shape[-1] // math.gcd(size, w.shape[-1])) if is_quantized(r) else w  # noqa: E731
    return jax.tree.map(one, rounded, model, is_leaf=is_quantized)


def scores(cfg: Config, model: Model) -> np.ndarray:
    prompts = [random_tokens(cfg, np.random.default_rng(1), length) for length in (9, 4, 16)]
    batch = batch_of(prompts, page_table(3, 2), tile=16)
    out = jax.jit(functools.partial(forward, cfg=cfg))(model, batch, empty_cache(cfg, 6, 8))
    return np.asarray(logits(model, out.hidden_td))[np.asarray(batch.positions_t) >= 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_matrices_are_rounded_and_what_is_small_or_decides_stays(family):
    _, model, rounded = both(family)
    pairs = zip(*(jax.tree.leaves_with_path(tree, is_leaf=is_quantized) for tree in (model, rounded)), strict=True)
    for (path, before), (_, after) in pairs:
        name = jax.tree_util.keystr(path).rpartition(".")[2]
        kept = before.ndim == 1 or name in ("embed", "head", "w_router", "w_uk", "w_uv")
        assert isinstance(after, QArray) != kept, path
        if kept:
            assert after is before
            continue
        summed = tuple(axis for axis, size in enumerate(after.scale.shape) if size == 1 < after.codes.shape[axis])
        assert summed == ((1, 2) if name == "w_o" else (before.ndim - 1,))
        assert np.abs(after.codes).max(axis=summed).min() == 127
        error = np.abs(dequantize(after, jnp.float32) - before)
        assert (error <= 0.5001 * after.scale).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_the_rounded_weights_but_for_rounded_activations(family):
    """Against the float model whose weights are the codes' values; its activations are not rounded."""
    cfg, model, rounded = both(family)
    twin = jax.tree.map(lambda w: dequantize(w, jnp.float32) if is_quantized(w) else w, rounded, is_leaf=is_quantized)
    found, expected, exact = scores(cfg, rounded), scores(cfg, twin), scores(cfg, model)
    size = np.linalg.norm(exact)
    assert 0 < np.linalg.norm(found - expected) < 0.15 * size
    assert np.linalg.norm(found - exact) < 0.15 * size


def test_an_int8_model_is_spread_with_its_scales():
    cfg, _, rounded = both("deepseek_v3")
    slots_lx = in_order(cfg, 8, redundant=8)
    placed = spread(rounded, cfg, make_mesh(2, 4), slots_lx)
    assert is_int8(placed) and not is_int8(both("qwen3")[1])
    before, after = rounded.layers[1].ffn.experts, placed.layers[1].ffn.experts
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert new.addressable_shards[0].data.shape[0] * 8 == new.shape[0]
        assert np.array_equal(new, np.asarray(old)[slots_lx[0]])


def test_a_shared_expert_in_parts_keeps_its_scales():
    cfg, _, rounded = both("deepseek_v3", n_shared_experts=2)
    shared = rounded.layers[1].ffn.shared
    slots_lx = in_order(cfg, 8, shared_ranks=2)
    experts = spread(rounded, cfg, make_mesh(2, 4), slots_lx).layers[1].ffn.experts
    count = cfg.experts.count
    parts = [dequantize(jax.tree.map(lambda w, s=s: w[list(slots_lx[0]).index(s)], experts.w_down), jnp.float32)
             for s in (count, count + 1)]  # fmt: skip
    assert np.array_equal(np.concatenate(parts, axis=1), dequantize(shared.w_down, jnp.float32))


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3"])
def test_scores_of_weights_with_scales_of_blocks_are_nearer_to_those_of_floats(family):
    cfg, model, rounded = both(family)
    found, rows, exact = scores(cfg, in_blocks(model, rounded)), scores(cfg, rounded), scores(cfg, model)
    assert 0 < np.linalg.norm(found - exact) < np.linalg.norm(rows - exact)


def mixed() -> tuple[Config, Model]:
    """A model of which some is INT8: the first mixture's experts, with blocks, and the last one's attention."""
    cfg, model, rounded = both("deepseek_v3")
    blocks = in_blocks(model, rounded)
    layers = list(model.layers)
    layers[1] = layers[1]._replace(ffn=layers[1].ffn._replace(experts=blocks.layers[1].ffn.experts))
    layers[2] = layers[2]._replace(attn=rounded.layers[2].attn)
    return cfg, model._replace(layers=tuple(layers))


def shapes(tree) -> list[tuple]:
    return [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]


def test_a_model_of_which_some_is_int8_is_described_and_spread_as_it_is():
    cfg, model = mixed()
    params = described(model, model_params(cfg))
    assert shapes(params) == shapes(model)
    assert {type(leaf) for leaf in jax.tree.leaves(params)} == {Param}
    slots_lx = in_order(cfg, 8, redundant=8)
    placed = spread(model, cfg, make_mesh(2, 4), slots_lx)
    assert shapes(placed) == shapes(spread_params(params, cfg, slots_lx))
    scale = placed.layers[1].ffn.experts.w_down.scale
    assert scale.addressable_shards[0].data.shape[0] * 8 == scale.shape[0]
    assert np.array_equal(scale, np.asarray(model.layers[1].ffn.experts.w_down.scale)[slots_lx[0]])


def test_tokens_are_sent_in_int8_if_all_experts_round_them_with_one_scale():
    _, model, rounded = both("deepseek_v3")
    assert payload(rounded) == payload(in_int8(model_params(Config.tiny("deepseek_v3")))) == "int8"
    half = rounded._replace(layers=(*model.layers[:2], *rounded.layers[2:]))
    for other in (model, half, mixed()[1], in_blocks(model, rounded), both("qwen3")[2]):
        assert payload(other) == "float"


def test_a_shared_expert_in_parts_keeps_its_scales_of_blocks():
    """Its width is that of two others, so its blocks are larger."""
    cfg, model, rounded = both("deepseek_v3", n_shared_experts=2)
    blocks = in_blocks(model, rounded)
    assert blocks.layers[1].ffn.shared.w_down.scale.shape[1:] == blocks.layers[1].ffn.experts.w_down.scale.shape[2:]
    shared = blocks.layers[1].ffn.shared
    slots_lx, count = in_order(cfg, 8, shared_ranks=2), cfg.experts.count
    experts = spread(blocks, cfg, make_mesh(2, 4), slots_lx).layers[1].ffn.experts
    parts = [dequantize(jax.tree.map(lambda w, s=s: w[list(slots_lx[0]).index(s)], experts.w_down), jnp.float32)
             for s in (count, count + 1)]  # fmt: skip
    assert np.array_equal(np.concatenate(parts, axis=1), dequantize(shared.w_down, jnp.float32))


def test_a_shared_expert_unlike_the_others_can_have_no_ranks():
    cfg, model, rounded = both("deepseek_v3", n_shared_experts=2)
    slots_lx, mesh = in_order(cfg, 8, shared_ranks=2), make_mesh(2, 4)

    def with_shared(p):
        layers = [layer._replace(ffn=layer.ffn._replace(shared=p)) if i == 1 else layer
                  for i, layer in enumerate(rounded.layers)]  # fmt: skip
        return rounded._replace(layers=tuple(layers))

    with pytest.raises(ShardingError, match="shared and routed experts are not INT8 in the same way"):
        spread(with_shared(model.layers[1].ffn.shared), cfg, mesh, slots_lx)
    with pytest.raises(ShardingError, match="shared and routed experts are not INT8 in the same way"):
        spread(with_shared(in_blocks(model, rounded).layers[1].ffn.shared), cfg, mesh, slots_lx)
