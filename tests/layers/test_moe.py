import math
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.layers.config import Config, Experts
from jaxserve.layers.moe import (
    Mlp,
    Moe,
    Routing,
    assign_blocks,
    block_shape,
    blocks_beyond,
    mix_experts,
    mlp,
    mlp_params,
    moe,
    moe_params,
    room,
    route,
)
from jaxserve.parallel.qarray import QArray, dequantize, quantize_blocks, quantize_rows
from tests.layers.helpers import f64, intermediates, normal, published_mlp, published_moe, random_arrays, raw_config
from tests.oracles import reference
from tests.tolerances import LAYER, OP, assert_close

run_route = jax.jit(route, static_argnames="cfg")
run_mix = jax.jit(mix_experts, static_argnames="implementation")
run_moe = jax.jit(moe, static_argnames="cfg")
run_assign = jax.jit(assign_blocks, static_argnames=("experts", "size", "count"))

_GROUPS = {"n_routed_experts": 16, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4}
ROUTERS: dict[str, dict[str, Any]] = {
    "v3": raw_config("deepseek_v3", **_GROUPS),
    "v3, weights as they are": raw_config("deepseek_v3", norm_topk_prob=False, **_GROUPS),
    "kimi": raw_config("deepseek_v3", **_GROUPS | {"n_group": 1, "topk_group": 1}),
    "v3, groups of one": raw_config("deepseek_v3", n_group=8, topk_group=5),
    "v2": raw_config("deepseek_v2", **_GROUPS),
    "v2-lite": raw_config("deepseek_v2_lite", n_routed_experts=16),
    "qwen": raw_config("qwen3_moe", num_experts=16),
    "qwen, weights as they are": raw_config("qwen3_moe", num_experts=16, norm_topk_prob=False),
}


def experts_of(raw: dict[str, Any]) -> tuple[Config, Experts]:
    cfg = Config.from_hf(raw)
    assert cfg.experts is not None
    return cfg, cfg.experts


def reference_route(raw: dict[str, Any], logits, bias) -> tuple[np.ndarray, np.ndarray]:
    if raw["model_type"] == "deepseek_v3":
        return reference.route_v3(logits, f64(bias), raw)
    return (reference.route_v2 if raw["model_type"] == "deepseek_v2" else reference.route_qwen3)(logits, raw)


def router(raw: dict[str, Any], rng: np.random.Generator) -> tuple[Moe, Experts]:
    cfg, experts = experts_of(raw)
    return random_arrays(moe_params(cfg, experts, jnp.float32), rng), experts


@pytest.mark.parametrize("offset", [0.0, -3.0])
@pytest.mark.parametrize("name", ROUTERS)
def test_the_same_experts_are_chosen_with_the_same_weights_as_in_the_reference(rng, name, offset):
    """With an offset of -3 all biased scores are negative: an excluded expert must not win with a score of 0."""
    p, cfg = router(ROUTERS[name], rng)
    p = p if p.bias is None else p._replace(bias=p.bias + offset)
    x = normal(rng, 64, p.w_router.shape[1])
    routing = run_route(p, x, cfg)
    chosen, weights = reference_route(ROUTERS[name], f64(x) @ f64(p.w_router).T, p.bias)
    np.testing.assert_array_equal(routing.experts_tk, chosen)
    assert routing.weights_tk.dtype == jnp.float32
    assert_close(routing.weights_tk, weights, OP)


def test_the_bias_chooses_and_does_not_weigh(rng):
    p, cfg = router(ROUTERS["kimi"], rng)
    x = normal(rng, 8, p.w_router.shape[1])
    favoured = p._replace(bias=jnp.zeros(16).at[jnp.array([1, 2, 3, 5])].set(100.0))
    plain, biased = (
        run_route(p._replace(bias=jnp.zeros(16)), x, replace(cfg, per_token=16)),
        run_route(favoured, x, cfg),
    )
    assert (np.sort(biased.experts_tk) == [1, 2, 3, 5]).all()
    share = np.take_along_axis(np.asarray(plain.weights_tk), np.argsort(plain.experts_tk)[:, [1, 2, 3, 5]], axis=1)
    ordered = np.take_along_axis(np.asarray(biased.weights_tk), np.argsort(biased.experts_tk), axis=1)
    assert_close(ordered / ordered.sum(1, keepdims=True), share / share.sum(1, keepdims=True), OP)


def test_routing_has_float32_whatever_the_activations(rng):
    """Logits of 1 and 1.001 are one number in bfloat16; the weights of the router tell them apart."""
    p, cfg = router(ROUTERS["qwen"], rng)
    w = jnp.asarray(np.eye(1, 32) * (1 + 1e-3 * np.arange(16)[:, None]), jnp.float32)
    routing = run_route(p._replace(w_router=w), jnp.ones((1, 32), jnp.bfloat16), cfg)
    np.testing.assert_array_equal(routing.experts_tk, [[15, 14]])


def test_scores_that_vanish_give_no_nan(rng):
    p, cfg = router(ROUTERS["kimi"], rng)
    routing = run_route(p._replace(w_router=jnp.full((16, 32), -10.0)), jnp.ones((1, 32)), cfg)
    np.testing.assert_array_equal(routing.weights_tk, 0.0)


def test_equal_scores_choose_the_first_experts():
    cfg, experts = experts_of(ROUTERS["v2"])
    p = Moe(jnp.zeros((16, cfg.width)), None, Mlp(None, None, None), None)
    np.testing.assert_array_equal(run_route(p, jnp.ones((1, cfg.width)), experts).experts_tk, [[0, 1, 2, 3]])


def loop_over_experts(p: Mlp, x, routing: Routing) -> np.ndarray:
    out = np.zeros(x.shape)
    experts_tk, weights_tk = np.asarray(routing.experts_tk), f64(routing.weights_tk)
    for t, (experts, weights) in enumerate(zip(experts_tk, weights_tk, strict=True)):
        for e, weight in zip(experts, weights, strict=True):
            out[t] += weight * reference.mlp(published_mlp("m", Mlp(*(w[e] for w in p))), "m", f64(x[t]))
    return out


def routing_of(kind: str, rng: np.random.Generator, tokens: int, experts: int, k: int) -> Routing:
    if kind == "random":
        chosen = np.argsort(rng.random((tokens, experts)), axis=1)[:, :k]
    else:  # all tokens to one expert, or its k neighbours: the others stay empty
        chosen = np.tile(np.arange(experts - k, experts), (tokens, 1))
    return Routing(jnp.asarray(chosen, jnp.int32), jnp.asarray(rng.random((tokens, k)), jnp.float32))


@pytest.mark.parametrize("implementation", ["dense", "rooms", "blocks", None])
@pytest.mark.parametrize("kind", ["random", "all to the last"])
@pytest.mark.parametrize(("tokens", "k"), [(1, 1), (1, 3), (2, 3), (7, 1), (50, 3)])
def test_every_implementation_equals_a_loop_over_experts(rng, tokens, k, kind, implementation):
    cfg, experts = experts_of(raw_config("deepseek_v3"))
    p = random_arrays(moe_params(cfg, experts, jnp.float32), rng).experts
    x = normal(rng, tokens, cfg.width)
    routing = routing_of(kind, rng, tokens, experts.count, k)
    assert_close(run_mix(p, x, routing, implementation=implementation), loop_over_experts(p, x, routing), LAYER)


@pytest.mark.parametrize("implementation", ["dense", "rooms", "blocks"])
@pytest.mark.parametrize(("tokens", "kind"), [(1, "random"), (9, "random"), (50, "all to the last")])
def test_activations_of_bfloat16_keep_their_dtype(rng, tokens, kind, implementation):
    cfg, experts = experts_of(raw_config("deepseek_v3"))
    p = random_arrays(moe_params(cfg, experts, jnp.bfloat16), rng).experts
    x, routing = normal(rng, tokens, cfg.width, dtype=jnp.bfloat16), routing_of(kind, rng, tokens, 8, 3)
    y = run_mix(p, x, routing, implementation=implementation)
    assert y.dtype == jnp.bfloat16
    assert_close(y, loop_over_experts(p, x, routing), 4, jnp.bfloat16)


@pytest.mark.parametrize("implementation", ["dense", "blocks"])
def test_no_expert_computes_a_single_row_of_16_bits(rng, implementation):
    """XLA's CPU backend has a scalar loop for one row, 15 times slower than two; not so for a vector."""
    cfg, experts = experts_of(raw_config("deepseek_v3"))
    p = random_arrays(moe_params(cfg, experts, jnp.bfloat16), rng).experts
    args = p, normal(rng, 1, cfg.width, dtype=jnp.bfloat16), routing_of("random", rng, 1, 8, 3)
    jaxpr = jax.make_jaxpr(partial(mix_experts, implementation=implementation))(*args)
    *products, mixture = intermediates(jaxpr, "dot_general")
    assert len(products) == 3 and mixture == (1, cfg.width)
    assert all(2 in shape if implementation == "dense" else len(shape) == 1 for shape in products)


def test_an_unknown_implementation_is_refused_with_those_there_are(rng):
    cfg, experts = experts_of(raw_config("deepseek_v3"))
    p = random_arrays(moe_params(cfg, experts, jnp.float32), rng).experts
    with pytest.raises(NotImplementedError, match="'ragged'.*dense, rooms, blocks"):
        mix_experts(p, jnp.ones((1, cfg.width)), routing_of("random", rng, 1, 8, 3), implementation="ragged")


def test_blocks_compute_in_proportion_to_the_tokens(rng):
    cfg, experts = experts_of(raw_config("deepseek_v3"))
    p = random_arrays(moe_params(cfg, experts, jnp.float32), rng).experts
    args = p, jnp.ones((512, cfg.width)), routing_of("random", rng, 512, 8, 3)
    jaxpr = jax.make_jaxpr(partial(mix_experts, implementation="blocks"))(*args)
    values = max(math.prod(shape) for shape in intermediates(jaxpr, "dot_general"))
    assert values <= (512 * 3 + 8 * 64) * cfg.width < 512 * 8 * cfg.width


SHAPES = [(1, 1, 1), (1, 3, 4), (5, 3, 4), (16, 2, 40), (33, 3, 5)]  # tokens, choices, experts


@settings(max_examples=60)
@given(st.data())
def test_a_block_has_one_expert_and_a_row_one_token_for_any_routing(data):
    t, k, experts = data.draw(st.sampled_from(SHAPES))
    chosen = data.draw(st.lists(st.integers(0, experts), min_size=t * k, max_size=t * k))
    experts_tk = np.reshape(chosen, (t, k)).astype(np.int32)
    size, count = block_shape(t, k, experts)
    row_tk, expert = map(np.asarray, run_assign(experts_tk, experts=experts, size=size, count=count))
    assert expert.shape == (count,) and (expert >= 0).all() and (expert <= experts).all()
    assert len(np.unique(row_tk)) == t * k and (row_tk >= 0).all()
    has_place = row_tk < size * count
    assert has_place[experts_tk < experts].all()
    np.testing.assert_array_equal(expert[row_tk[has_place] // size], experts_tk[has_place])


@given(t=st.integers(1, 5000), k=st.integers(1, 9), experts=st.integers(9, 400))
def test_there_are_blocks_enough_for_the_worst_routing_and_few_more(t, k, experts):
    size, count = block_shape(t, k, experts)
    visited = min(experts, t * k)
    worst = (t * k - visited) // size + visited  # every visited expert begins one more block with a single row
    assert 1 <= size <= 64
    assert worst <= count <= worst + visited // size + 1


def test_rows_that_mostly_are_none_get_no_rooms(rng):
    cfg, experts = experts_of(raw_config("deepseek_v3"))
    p = random_arrays(moe_params(cfg, experts, jnp.float32), rng).experts
    args = p, jnp.ones((64, cfg.width)), routing_of("random", rng, 64, 8, 3)

    def largest(sparse: bool) -> int:
        jaxpr = jax.make_jaxpr(partial(mix_experts, sparse=sparse))(*args)
        return max(math.prod(shape) for shape in intermediates(jaxpr, "dot_general"))

    assert largest(sparse=False) == 8 * room(64, 3, 8) * cfg.width
    assert largest(sparse=True) == 64 * cfg.width  # a block's, or the sum


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_int8_without_room_has_the_bits_of_every_other_plan(rng, dtype):
    """The same sum, whatever others took the room."""
    cfg, experts = experts_of(raw_config("deepseek_v3", hidden_size=64, moe_intermediate_size=32))
    p = random_arrays(moe_params(cfg, experts, jnp.float32), rng).experts
    p = Mlp(*(quantize_blocks(w, 1) for w in p))
    chosen = np.stack([[7, *rng.permutation(7)[:2]] for _ in range(60)])  # more than expert 7 has room for
    assert room(60, 3, 8) < 60
    routing = Routing(jnp.asarray(chosen, jnp.int32), jnp.asarray(rng.random((60, 3)), jnp.float32))
    x = normal(rng, 60, cfg.width, dtype=dtype)
    plans = "dense", "rooms", "blocks", "rows"
    dense, *others = (np.asarray(run_mix(p, x, routing, implementation=plan)) for plan in plans)
    for found in others:
        np.testing.assert_array_equal(found, dense)


@given(st.data())
def test_what_finds_no_room_has_blocks_enough(data):
    t, k, experts = data.draw(st.tuples(st.integers(1, 600), st.integers(1, 4), st.integers(4, 40)))
    loads = data.draw(st.lists(st.integers(0, t), min_size=experts, max_size=experts))
    while sum(loads) > t * k:
        loads[int(np.argmax(loads))] -= min(max(loads), sum(loads) - t * k)
    beyond = [max(0, load - room(t, k, experts)) for load in loads]
    size, _ = block_shape(t, k, experts)
    assert sum(-(-tokens // size) for tokens in beyond) <= blocks_beyond(t, k, experts)


@pytest.mark.parametrize(("t", "k", "experts", "expected"), [(512, 6, 64, 64), (64, 6, 64, 16), (8, 6, 64, 8)])
def test_rooms_are_a_third_larger_than_fair_shares_in_whole_tiles(t, k, experts, expected):
    assert room(t, k, experts) == expected


@pytest.mark.parametrize("name", ROUTERS)
def test_the_layer_equals_the_reference(rng, name):
    p, cfg = router(ROUTERS[name], rng)
    x = normal(rng, 11, p.w_router.shape[1])
    y, _ = run_moe(p, x, jnp.ones(11, bool), cfg=cfg)
    expected = reference.moe(ROUTERS[name], published_moe("m", p), "m", f64(x))
    assert_close(y, expected, LAYER)


@pytest.mark.parametrize("tokens", [11, 64])
def test_padding_visits_no_expert_and_changes_no_other_token(rng, tokens):
    p, cfg = router(ROUTERS["v3"], rng)
    x, valid = normal(rng, tokens, p.w_router.shape[1]), np.arange(tokens) % 3 != 0
    y, load_e = run_moe(p, x, jnp.asarray(valid), cfg=cfg)
    chosen = np.asarray(run_route(p, x, cfg).experts_tk)[valid]
    np.testing.assert_array_equal(load_e, np.bincount(chosen.reshape(-1), minlength=cfg.count))
    expected = reference.moe(ROUTERS["v3"], published_moe("m", p), "m", f64(x))
    assert_close(y[valid], expected[valid], LAYER)
    assert np.isfinite(y).all()


@pytest.mark.parametrize("kind", ["random", "all to the last"])
def test_gradients_are_those_of_the_dense_plan(rng, kind):
    cfg, experts = experts_of(raw_config("deepseek_v3"))
    p = random_arrays(moe_params(cfg, experts, jnp.float32), rng).experts
    x, routing = normal(rng, 64, cfg.width), routing_of(kind, rng, 64, 8, 3)
    loss = lambda p, plan: (run_mix(p, x, routing, implementation=plan) ** 2).sum()  # noqa: E731
    *found, expected = (jax.grad(loss)(p, plan) for plan in ("blocks", "rooms", "dense"))
    for each in found:
        jax.tree.map(lambda a, b: assert_close(a, b, LAYER), each, expected)


def test_a_single_network_equals_the_reference(rng):
    p = random_arrays(mlp_params(32, 48, jnp.float32), rng)
    x = normal(rng, 5, 32)
    assert_close(jax.jit(mlp)(p, x), reference.mlp(published_mlp("m", p), "m", f64(x)), LAYER)


KINDS = {
    "rows": (1, 1, 1),
    "blocks": (4, 4, 6),
    "gate alone": (4, None, None),
    "unlike": (1, 4, None),
    "down": (None, None, 6),
}
"""Scales of a row of each matrix; None: floats."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 9])
def test_experts_of_every_kind_equal_their_floats_but_for_rounded_activations_by_every_plan(rng, tokens, kind):
    cfg, experts = experts_of(raw_config("deepseek_v3", moe_intermediate_size=24))
    p = random_arrays(moe_params(cfg, experts, jnp.float32), rng).experts
    p = Mlp(*(w if n is None else quantize_blocks(w, n) for w, n in zip(p, KINDS[kind], strict=True)))
    twin = Mlp(*(dequantize(w, jnp.float32) if isinstance(w, QArray) else w for w in p))
    x, routing = normal(rng, tokens, cfg.width), routing_of("random", rng, tokens, experts.count, 3)
    plans = "dense", "rooms", "blocks"
    dense, rooms, blocks = (np.asarray(run_mix(p, x, routing, implementation=plan)) for plan in plans)
    assert_close(rooms, dense, OP)
    expected = loop_over_experts(twin, x, routing)
    assert 0 < np.linalg.norm(dense - expected) < 0.05 * np.linalg.norm(expected)
    assert_close(blocks, dense, OP)
    alone = run_mix(p, x[:1], Routing(routing.experts_tk[:1], routing.weights_tk[:1]), implementation="dense")
    if kind in ("rows", "blocks"):
        np.testing.assert_array_equal(alone, dense[:1])


@pytest.mark.parametrize("tokens", [1, 9, 40])
def test_experts_in_int8_give_the_same_row_by_row(rng, tokens):
    """Few rows at a time, none for choices of no expert: these add nothing."""
    cfg, experts = experts_of(raw_config("deepseek_v3", hidden_size=64, moe_intermediate_size=32))
    p = random_arrays(moe_params(cfg, experts, jnp.float32), rng).experts
    p = Mlp(*(quantize_blocks(w, 1) for w in p))
    x, routing = normal(rng, tokens, cfg.width), routing_of("random", rng, tokens, experts.count, 3)
    routing = routing._replace(experts_tk=routing.experts_tk.at[1::2].set(experts.count))
    rows, blocks = (run_mix(p, x, routing, implementation=plan) for plan in ("rows", "blocks"))
    assert_close(rows, blocks, OP)
    assert not rows[1::2].any()
    assert rows[::2].any(axis=1).all()


def test_rows_are_for_experts_in_int8_that_few_visit(rng):
    def products(tokens: int, scales: int) -> list:
        cfg, experts = experts_of(raw_config("deepseek_v3", hidden_size=64, moe_intermediate_size=32))
        p = random_arrays(moe_params(cfg, experts, jnp.float32), rng).experts
        p = Mlp(*(quantize_blocks(w, scales) for w in p))
        args = p, normal(rng, tokens, cfg.width), routing_of("random", rng, tokens, experts.count, 3)
        return list(intermediates(jax.make_jaxpr(mix_experts)(*args), "dot_general"))

    assert len(products(2, scales=1)) == 1  # the weighted sum
    assert len(products(64, scales=1)) > 1
    assert len(products(2, scales=4)) > 1


def test_rows_that_came_with_one_scale_visit_experts_with_several(rng):
    cfg, experts = experts_of(raw_config("deepseek_v3", moe_intermediate_size=24))
    p = Mlp(*(quantize_blocks(w, 4) for w in random_arrays(moe_params(cfg, experts, jnp.float32), rng).experts))
    x, routing = normal(rng, 9, cfg.width), routing_of("random", rng, 9, experts.count, 3)
    dense, blocks = (mix_experts(p, quantize_rows(x), routing, plan, jnp.float32) for plan in ("dense", "blocks"))
    assert_close(blocks, dense, OP)
    expected = loop_over_experts(Mlp(*(dequantize(w, jnp.float32) for w in p)), x, routing)
    assert np.linalg.norm(dense - expected) < 0.05 * np.linalg.norm(expected)
