"""Prompts that all ranks share give what each would give on a single device."""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxserve.layers.config import Config
from jaxserve.layers.packed import Packed, forward_packed
from jaxserve.layers.spread import in_order, spread
from jaxserve.layers.transformer import cache_params, forward
from jaxserve.parallel.mesh import AXES, make_mesh
from jaxserve.parallel.ranks import Ranks
from jaxserve.parallel.sharding import DECODE, PREFILL, Rules
from tests.layers.helpers import batch_of, empty, empty_cache, page_table, random_model, random_tokens
from tests.parallel.conftest import Collective, collectives, kinds
from tests.tolerances import MODEL, assert_close

TILE, PAGE, SLOTS, PAGES = 4, 8, 2, 5  # a sequence has up to five pages, a rank two sequences
LENGTHS, OWNERS = (29, 3, 12, 1, 17), ((0, 1), (3, 0), (3, 1), (7, 0), (1, 0))  # rank and slot
PACKED = P(), P(), P(AXES), P(), P(), P(), P(AXES), P(), P(AXES)


class Chunk(NamedTuple):
    """Tokens of one of the prompts."""

    prompt: int
    start: int
    end: int


Parts = list[list[Chunk]]
"""The chunks of each microbatch."""


def places(parts: Parts, tiles: int, past: int) -> Iterator[tuple[Chunk, int, int]]:
    """Where each chunk begins, in tiles, and its past: one after another in its part."""
    for number, chunks in enumerate(parts):
        tile, behind = number * tiles // len(parts), number * past // len(parts)
        for chunk in chunks:
            yield chunk, tile, behind
            tile, behind = tile - (chunk.start - chunk.end) // TILE, behind + chunk.start // TILE


def pack(prompts: list[np.ndarray], parts: Parts, tiles: int, past: int) -> Packed:
    """The chunks as all ranks are given them."""
    columns: dict[str, Any] = {name: np.zeros(tiles, np.int32) for name in ("first_a", "starts_a", "past_a")}
    tokens_t, positions_t = np.zeros(tiles * TILE, np.int32), np.full(tiles * TILE, -1, np.int32)
    slots_ra, past_slots_rp = np.full((8, tiles), SLOTS, np.int32), np.full((8, past), SLOTS, np.int32)
    past_starts_p = np.zeros(past, np.int32)
    for (prompt, start, end), tile, behind in places(parts, tiles, past):
        (rank, slot), count, old = OWNERS[prompt], -(-(end - start) // TILE), start // TILE
        begin = tile * TILE
        tokens_t[begin : begin + end - start] = prompts[prompt][start:end]
        positions_t[begin : begin + end - start] = np.arange(start, end)
        slots_ra[rank, tile : tile + count] = slot
        for name, value in (("first_a", tile), ("starts_a", start), ("past_a", behind)):
            columns[name][tile : tile + count] = value
        past_slots_rp[rank, behind : behind + old] = slot
        past_starts_p[behind : behind + old] = np.arange(old) * TILE
    pages_sp = np.tile(page_table(SLOTS, PAGES, seed=3), (8, 1))
    return Packed(
        tokens_t, positions_t, slots_ra.reshape(-1), **columns, past_slots_p=past_slots_rp.reshape(-1),
        past_starts_p=past_starts_p, pages_sp=pages_sp,
    )  # fmt: skip


@functools.cache
def program(cfg: Config, mesh, ranks: Ranks, weights):
    def body(model, packed, cache):
        out = forward_packed(model, packed, cache, cfg, ranks)
        return out.hidden_td, out.cache, out.load_le[None]

    takes = (weights, Packed(*PACKED), P(AXES))
    return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=takes, out_specs=P(AXES), check_vma=False))


def spread_model(cfg: Config, mesh, ranks: Ranks, rules: Rules = DECODE):
    model = random_model(cfg, np.random.default_rng(2))
    placed = spread(model, cfg, mesh, in_order(cfg, 8), rules)
    return model, placed, program(cfg, mesh, ranks, jax.tree.map(lambda leaf: leaf.sharding.spec, placed))


FLAT, TWO = Ranks(), Ranks(microbatches=2)
CASES = [
    ("deepseek_v2_lite", (2, 4), FLAT),
    ("deepseek_v3", (4, 2), TWO._replace(implementation="hierarchical")),
    ("qwen3_moe", (1, 8), TWO),
]


@pytest.mark.parametrize(("family", "shape", "ranks"), CASES)
def test_whole_and_chunked_prompts_of_any_lengths_give_the_states_of_a_single_device(family, shape, ranks):
    cfg, rng = Config.tiny(family), np.random.default_rng(5)
    prompts = [random_tokens(cfg, rng, length) for length in LENGTHS]
    model, placed, run = spread_model(cfg, make_mesh(*shape), ranks)
    alone = batch_of(prompts, page_table(len(prompts), PAGES), tile=32)
    expected = jax.jit(functools.partial(forward, cfg=cfg))(model, alone, empty_cache(cfg, len(prompts) * PAGES, PAGE))
    first, second, third, fourth, fifth = (Chunk(i, 0, length) for i, length in enumerate(LENGTHS))
    whole: list[Parts] = [[[first, second, fourth], [third, fifth]]]
    chunked: list[Parts] = [[[Chunk(0, 0, 16)], [Chunk(2, 0, 8)]], [[Chunk(0, 16, 29)], [Chunk(2, 8, 12), fifth]]]
    for steps, past in ((whole, 0), (chunked, 8)):
        cache, load_le = empty_cache(cfg, 8 * SLOTS * PAGES, PAGE), 0
        for parts in steps:
            parts = parts if ranks.microbatches == 2 else [[chunk for chunks in parts for chunk in chunks]]
            packed = pack(prompts, parts, tiles=24, past=past)
            hidden_td, cache, load_rle = run(placed, packed, cache)
            load_le = load_le + np.asarray(load_rle).sum(axis=0)
            check_states(hidden_td, expected.hidden_td, parts)
        check_cache(cache, expected.cache, [chunk for parts in steps for chunks in parts for chunk in chunks])
    # of the last steps: the tokens of three prompts
    assert load_le.sum() == (29 + 12 + 17) * sum(cfg.is_moe) * (cfg.experts.per_token if cfg.experts else 0)


@pytest.mark.parametrize(("family", "shape"), [("deepseek_v3", (2, 4)), ("qwen3_moe", (4, 2))])
def test_ranks_that_have_their_heads_alone_give_the_same_states_as_those_that_have_all(family, shape):
    cfg, rng = Config.tiny(family, num_attention_heads=8), np.random.default_rng(6)
    prompts = [random_tokens(cfg, rng, length) for length in LENGTHS]
    packed = pack(prompts, [[Chunk(i, 0, length) for i, length in enumerate(LENGTHS)]], tiles=24, past=0)
    found = []
    for rules in (DECODE, PREFILL):
        _, placed, run = spread_model(cfg, make_mesh(*shape), FLAT, rules)
        attn = placed.layers[0].attn
        heads = attn.w_uq if family == "deepseek_v3" else attn.w_q
        assert heads.addressable_shards[0].data.shape[0] == (1 if rules is PREFILL else 8)
        found.append(run(placed, packed, empty_cache(cfg, 8 * SLOTS * PAGES, PAGE)))
    for all_heads, own_heads in zip(*map(jax.tree.leaves, found), strict=True):
        assert_close(own_heads, all_heads, MODEL)


def check_states(hidden_td, expected_td, parts: Parts) -> None:
    """Of each microbatch, each rank has a part."""
    states = np.asarray(hidden_td).reshape(8, len(parts), -1, expected_td.shape[1]).swapaxes(0, 1)
    states_td = states.reshape(hidden_td.shape)
    for (prompt, start, end), tile, _ in places(parts, tiles=24, past=0):
        found, wanted = states_td[tile * TILE :][: end - start], expected_td[32 * prompt + start : 32 * prompt + end]
        assert_close(found, wanted, MODEL)


def check_cache(cache, expected, chunks: list[Chunk]) -> None:
    """Each sequence's entries are in the pages of its rank, and in no other's."""
    pages_sp = page_table(SLOTS, PAGES, seed=3)
    for mine, wanted in zip(jax.tree.leaves(cache), jax.tree.leaves(expected), strict=True):
        ranks = np.asarray(mine).reshape(8, SLOTS * PAGES, PAGE, -1)
        single = np.asarray(wanted).reshape(len(LENGTHS), PAGES * PAGE, -1)
        written = 0
        for prompt, start, end in chunks:
            rank, slot = OWNERS[prompt]
            rows = ranks[rank][pages_sp[slot]].reshape(PAGES * PAGE, -1)
            assert_close(rows[start:end], single[prompt, start:end], MODEL)
            written += np.count_nonzero(rows[start:end].any(axis=-1))
        assert np.count_nonzero(ranks.any(axis=-1)) == written


@pytest.mark.parametrize(("past", "reductions", "int8"), [(0, 0, False), (8, 1, False), (8, 1, True)])
def test_a_layer_has_one_gather_one_exchange_of_heads_and_two_of_experts(past, reductions, int8):
    """And only where there is a past one sum more. What is gathered of latents has as many bytes as in the cache."""
    cfg = Config.tiny("deepseek_v3")
    _, placed, run = spread_model(cfg, make_mesh(2, 4), FLAT)
    prompts = [np.zeros(length, np.int32) for length in LENGTHS]
    cache = cache_params(cfg, 8 * SLOTS * PAGES, PAGE, int8=int8)
    given = placed, pack(prompts, [[]], tiles=24, past=past), empty(cache)
    compiled = run.lower(*given).compile()
    layers, experts = cfg.layers, sum(cfg.is_moe)
    expected = {"all-gather": layers, "all-to-all": layers + 2 * experts, "all-reduce": layers * reductions}
    assert kinds(compiled) == {kind: count for kind, count in expected.items() if count}
    gathered = [one for one in collectives(compiled) if one.kind == "all-gather"]
    att = cfg.attention
    kept = att.kv_rank + 4 + 2 * att.rope_dim if int8 else 4 * (att.kv_rank + att.rope_dim)
    assert set(gathered) == {Collective("all-gather", "u8", 24 * TILE * (4 * att.query_rank + kept))}
