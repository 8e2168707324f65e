"""With INT8 weights: what is the same to the last bit on one device and on two, four or eight."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxserve.layers.batch import Batch
from jaxserve.layers.config import Config
from jaxserve.layers.int8 import in_int8, quantize_model
from jaxserve.layers.linear import product, quantized_like
from jaxserve.layers.moe import Mlp, Routing, Spread, mix_experts, mlp
from jaxserve.layers.spread import in_order, spread
from jaxserve.layers.transformer import Model, cache_params, forward, logits, model_params
from jaxserve.parallel.dispatch import combine, dispatch
from jaxserve.parallel.mesh import AXES, make_mesh
from jaxserve.parallel.qarray import QArray, quantize
from jaxserve.parallel.ranks import Ranks
from jaxserve.parallel.sharding import DECODE, PREFILL
from tests.layers.helpers import FAMILIES, random_arrays, random_model, random_tokens

MESHES = {1: (1, 1), 2: (1, 2), 4: (2, 2), 8: (2, 4)}
RANKS = Ranks(payload="int8")


def on_ranks(count: int, body: Callable[..., Any], weights: Any, specs: Any, *split: Any) -> Any:
    """The body on each rank, with weights that lie as `specs` say and its part of all else."""
    mesh, each = make_mesh(*MESHES[count]), P(AXES)
    weights = jax.device_put(weights, jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))
    split = jax.device_put(split, NamedSharding(mesh, each))
    takes = (specs, *(each for _ in split))
    run = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=takes, out_specs=each, check_vma=False))
    return jax.tree.map(np.asarray, run(weights, *split))


# -- whatever rows a rank has --

TOKENS, WIDTH, HIDDEN, EXPERTS, CHOICES = 16, 64, 40, 8, 3


def network(rng: np.random.Generator, *leading: int) -> Mlp:
    """Random INT8 weights, of a large and a small size."""
    shapes = (HIDDEN, WIDTH), (HIDDEN, WIDTH), (WIDTH, HIDDEN)
    draw = lambda shape: rng.standard_normal((*leading, *shape)) * rng.choice([1e-3, 1.0], (*leading, shape[0], 1))  # noqa: E731
    return Mlp(*(quantize(jnp.asarray(draw(shape), jnp.float32), (len(leading) + 1,)) for shape in shapes))


def visit(weights: tuple[Mlp, Mlp], x_td: jax.Array, slots_tk: jax.Array, weights_tk: jax.Array) -> dict[str, Any]:
    """What a token's experts are sent, add up and answer, `[t, k, …]`; what a network adds up and answers."""
    (experts, dense), here = weights, weights[0].w_gate.shape[0]
    came, handle = dispatch(x_td, slots_tk, here, RANKS)
    own_i = jnp.minimum(came.slots_i, here - 1)
    sums_ixf = product("td,xfd->txf", came.rows_id.codes, experts.w_gate.codes)
    alone_i1 = Routing(came.slots_i[:, None], jnp.ones((len(own_i), 1)))
    answers_id = mix_experts(experts, came.rows_id, alone_i1, dtype=x_td.dtype, sparse=True)
    found = {
        "codes": came.rows_id.codes,
        "scales": came.rows_id.scale,
        "sums": jnp.take_along_axis(sums_ixf, own_i[:, None, None], axis=1)[:, 0],
        "answers": answers_id,
    }
    rows_td = quantized_like(dense.w_gate, x_td)
    return {name: by_choice(rows.astype(jnp.float32), handle) for name, rows in found.items()} | {
        "mixed": combine(answers_id, weights_tk, handle, RANKS),
        "dense sums": product("td,fd->tf", rows_td.codes, dense.w_gate.codes),
        "dense answers": mlp(dense, x_td),
    }


def by_choice(rows_in: jax.Array, handle: Any) -> jax.Array:
    """Rows where their tokens are; sums of less than 2**24 are exact in float32."""
    t, k = handle.row_tk.shape
    each = [combine(rows_in, jnp.zeros((t, k)).at[:, choice].set(1.0), handle, RANKS) for choice in range(k)]
    return jnp.stack(each, axis=1)


@pytest.fixture(scope="module")
def visited() -> tuple[Any, dict[int, dict[str, np.ndarray]]]:
    """The same tokens, as many as each rank gets of them."""
    rng = np.random.default_rng(0)
    x_td = rng.standard_normal((TOKENS, WIDTH), np.float32) * rng.choice([1e-3, 1.0, 50.0], (TOKENS, 1))
    slots_tk = np.array([rng.permutation(EXPERTS)[:CHOICES] for _ in range(TOKENS)], np.int32)
    given = x_td.astype(np.float32), slots_tk, rng.random((TOKENS, CHOICES), np.float32)
    experts, dense = network(rng, EXPERTS), network(rng)
    specs = jax.tree.map(lambda _: P(AXES), experts), jax.tree.map(lambda _: P(), dense)
    found = {count: on_ranks(count, visit, (experts, dense), specs, *given) for count in MESHES}
    return (experts, dense, *given), found


@pytest.mark.parametrize("count", MESHES)
def test_integer_sums_are_those_of_unbounded_integers_on_any_number_of_devices(visited, count):
    (experts, dense, x_td, slots_tk, _), found = visited
    codes_td = np.round(x_td * (np.float32(127) / np.abs(x_td).max(axis=1, keepdims=True))).astype(np.int64)
    gate_xfd, gate_fd = (np.asarray(p.w_gate.codes, np.int64) for p in (experts, dense))
    assert np.array_equal(found[count]["codes"], np.repeat(codes_td[:, None], CHOICES, axis=1))
    assert np.array_equal(found[count]["sums"], np.einsum("td,tkfd->tkf", codes_td, gate_xfd[slots_tk]))
    assert np.array_equal(found[count]["dense sums"], codes_td @ gate_fd.T)


@pytest.mark.parametrize("count", [2, 4, 8])
def test_what_is_sent_and_what_experts_answer_has_the_bits_of_a_single_device_whatever_rows_a_rank_has(visited, count):
    _, found = visited
    for name, expected in found[1].items():
        assert np.array_equal(found[count][name], expected), name


@pytest.mark.parametrize("family", FAMILIES)
def test_no_rule_splits_an_axis_that_integers_are_summed_along(family):
    params = in_int8(model_params(Config.tiny(family), spread=Spread(8, 1, 0)))
    is_quantized = lambda leaf: isinstance(leaf, QArray)  # noqa: E731
    matrices = [leaf for leaf in jax.tree.leaves(params, is_leaf=is_quantized) if is_quantized(leaf)]
    assert matrices
    for codes, scale in matrices:
        summed = {axis for axis, size in zip(codes.axes, scale.shape, strict=True) if size == 1}
        assert not summed & {*DECODE, *PREFILL}, codes


# -- as many rows on each rank --

ROWS, PAGES, PAGE, LENGTH = 2, 2, 8, 12


def decode(model: Model, tokens_s: jax.Array, cache: Any, cfg: Config, ranks: Ranks | None) -> jax.Array:
    """Scores of the token after these, which are the last of a rank's sequences."""
    table_sp = jnp.arange(ROWS * PAGES).reshape(ROWS, PAGES)
    batch = Batch(tokens_s, jnp.full(ROWS, LENGTH), jnp.arange(ROWS), table_sp)
    return logits(model, forward(model, batch, cache, cfg, ranks).hidden_td)


@pytest.fixture(scope="module")
def decoded() -> tuple[Config, Model, np.ndarray, Any, np.ndarray]:
    """A model with INT8 weights, sixteen sequences with their pages, and what a single device says, two at a time."""
    cfg = Config.tiny("deepseek_v3", num_hidden_layers=2, num_nextn_predict_layers=0)
    rng, pages = np.random.default_rng(0), ROWS * PAGES
    model = quantize_model(random_model(cfg, rng), in_int8(model_params(cfg)))
    tokens_s, filled = random_tokens(cfg, rng, 8 * ROWS), random_arrays(cache_params(cfg, 8 * pages, PAGE), rng)
    run = jax.jit(partial(decode, cfg=cfg, ranks=None))
    parts = [jax.tree.map(lambda page, i=i: page[i * pages : (i + 1) * pages], filled) for i in range(8)]
    scores_su = [run(model, *given) for given in zip(np.split(tokens_s, 8), parts, strict=True)]
    return cfg, model, tokens_s, filled, np.concatenate(scores_su)


@pytest.mark.parametrize(("count", "exchange"), [(2, "flat"), (4, "hierarchical"), (8, "flat")])
def test_scores_of_a_decode_step_have_the_bits_of_a_single_device_that_has_as_many_rows(decoded, count, exchange):
    cfg, model, tokens_s, cache, expected_su = decoded
    placed = spread(model, cfg, make_mesh(*MESHES[count]), in_order(cfg, count, redundant=4))
    specs, some = jax.tree.map(lambda leaf: leaf.sharding.spec, placed), count * ROWS
    given = tokens_s[:some], jax.tree.map(lambda page: page[: some * PAGES], cache)
    body = partial(decode, cfg=cfg, ranks=RANKS._replace(implementation=exchange))
    found_su = on_ranks(count, body, placed, specs, *given)
    assert np.array_equal(found_su, expected_su[:some])
