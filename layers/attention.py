"""Blockwise softmax attention, and grouped-query attention (arXiv:2305.13245) with Qwen3's normed queries and keys."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxserve.layers.batch import Batch, num_blocks, read_block, write
from jaxserve.layers.config import Config, GroupedAttention
from jaxserve.layers.dims import Leaf
from jaxserve.layers.linear import einsum
from jaxserve.layers.norm import rms_norm
from jaxserve.layers.rope import rotate
from jaxserve.parallel.sharding import Param

Mix = Callable[[Float[Array, "a h w j"]], Float[Array, "a h w v"]]


class Block(NamedTuple):
    """One block of keys, seen by all queries."""

    logits_ahwj: Float[Array, "a h w j"]  # float32
    seen_awj: Bool[Array, "a w j"]
    mix: Mix  # the sum of the block's values with these weights, float32


def attend(block: Callable[[Array | int], Block], blocks: Array | int, shape: tuple[int, int, int, int]) -> Array:
    """Softmax over all keys, one block at a time: `[a, h, w, v]`, float32; zero for a query that sees no key.

    Keeps a running maximum, sum and mixture (arXiv:2205.14135): memory grows with a block, not with the context.
    `blocks` may be traced; a Python number unrolls the loop, and makes it differentiable.
    """
    lowest = jnp.finfo(jnp.float32).min
    start = (jnp.full(shape[:3], lowest), jnp.zeros(shape[:3]), jnp.zeros(shape))

    def step(i, carry):
        top, total, mixture = carry
        logits, seen, mix = block(i)
        logits = jnp.where(seen[:, None], logits, -jnp.inf)
        new_top = jax.lax.stop_gradient(jnp.maximum(top, logits.max(axis=-1)))
        weights = jnp.exp(logits - new_top[..., None])
        fade = jnp.exp(top - new_top)
        return new_top, total * fade + weights.sum(axis=-1), mixture * fade[..., None] + mix(weights)

    if isinstance(blocks, int):
        _, total, mixture = functools.reduce(lambda carry, i: step(i, carry), range(blocks), start)
    else:
        _, total, mixture = jax.lax.fori_loop(0, blocks, step, start)
    return mixture / jnp.where(total == 0, 1.0, total)[..., None]


class Gqa(NamedTuple):
    """Weights of grouped-query attention; the comments give shape and Hugging Face name."""

    w_q: Leaf  # h n d   q_proj
    w_k: Leaf  # g n d   k_proj
    w_v: Leaf  # g n d   v_proj
    w_o: Leaf  # d h n   o_proj
    q_norm: Leaf  # n    q_norm
    k_norm: Leaf  # n    k_norm


class KeyValueCache(NamedTuple):
    """One layer's pages of keys (rotated) and values."""

    k: Leaf  # p b g n
    v: Leaf  # p b g n


def gqa_params(cfg: Config, att: GroupedAttention, dtype) -> Gqa:
    h, g, n, d = att.heads, att.kv_heads, att.head_dim, cfg.width
    return Gqa(
        w_q=Param((h, n, d), ("h", "n", "d"), dtype, std=d**-0.5),
        w_k=Param((g, n, d), ("g", "n", "d"), dtype, std=d**-0.5),
        w_v=Param((g, n, d), ("g", "n", "d"), dtype, std=d**-0.5),
        w_o=Param((d, h, n), ("d", "h", "n"), dtype, std=(h * n) ** -0.5),
        q_norm=Param((n,), ("n",), dtype, mean=1.0),
        k_norm=Param((n,), ("n",), dtype, mean=1.0),
    )


def gqa_cache(att: GroupedAttention, pages: int, page_size: int, dtype) -> KeyValueCache:
    page = Param((pages, page_size, att.kv_heads, att.head_dim), ("p", "b", "g", "n"), dtype)
    return KeyValueCache(k=page, v=page)


def gqa(
    p: Gqa, x_td: Float[Array, "t d"], cache: KeyValueCache, batch: Batch, cfg: Config, att: GroupedAttention
) -> tuple[Float[Array, "t d"], KeyValueCache]:
    """Adds the step's keys and values to the cache, then attends to all of it."""
    q_thn = rms_norm(einsum("td,hnd->thn", x_td, p.w_q), p.q_norm, cfg.norm_eps)
    k_tgn = rms_norm(einsum("td,gnd->tgn", x_td, p.w_k), p.k_norm, cfg.norm_eps)
    v_tgn = einsum("td,gnd->tgn", x_td, p.w_v)
    q_thn, k_tgn = (rotate(x, batch.positions_t, cfg.rope) for x in (q_thn, k_tgn))
    cache = write(cache, KeyValueCache(k_tgn, v_tgn), batch)
    o_thn = attend_grouped(q_thn, cache, batch, att)
    return einsum("thn,dhn->td", o_thn, p.w_o), cache


def attend_grouped(q_thn: Array, cache: KeyValueCache, batch: Batch, att: GroupedAttention) -> Float[Array, "t h n"]:
    """Attention of queries to their sequences' cached keys and values; `h / g` queries share a key."""
    a, w, g = batch.slots_a.shape[0], batch.tile, att.kv_heads
    q_awgmn = (q_thn * att.scale).reshape(a, w, g, -1, att.head_dim)
    shape = (a, att.heads, w, att.head_dim)

    def block(i) -> Block:
        (k_ajgn, v_ajgn), seen_awj = read_block(cache, batch, i)
        logits = jnp.einsum("awgmn,ajgn->agmwj", q_awgmn, k_ajgn, preferred_element_type=jnp.float32)

        def mix(weights_ahwj):
            weights = weights_ahwj.reshape(logits.shape).astype(v_ajgn.dtype)
            out = jnp.einsum("agmwj,ajgn->agmwn", weights, v_ajgn, preferred_element_type=jnp.float32)
            return out.reshape(shape)

        return Block(logits.reshape(a, att.heads, w, -1), seen_awj, mix)

    o_ahwn = attend(block, num_blocks(cache, batch), shape)
    return o_ahwn.transpose(0, 2, 1, 3).reshape(q_thn.shape).astype(q_thn.dtype)
