"""Blockwise softmax attention, and grouped-query attention (arXiv:2305.13245) with Qwen3's normed queries and keys."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxserve.layers.batch import Batch, Fresh, Positions, before, num_blocks, read_block, read_own
from jaxserve.layers.config import Config, GroupedAttention
from jaxserve.layers.dims import Leaf
from jaxserve.layers.linear import einsum
from jaxserve.layers.norm import rms_norm
from jaxserve.layers.rope import rotate
from jaxserve.parallel.errors import ShardingError
from jaxserve.parallel.sharding import Param

Mix = Callable[[Float[Array, "a h w j"]], Float[Array, "a h w v"]]


class Block(NamedTuple):
    """One block of keys, seen by all queries."""

    logits_ahwj: Float[Array, "a h w j"]  # float32
    seen_awj: Bool[Array, "a w j"]
    mix: Mix  # the sum of the block's values with these weights, float32


def attend(
    block: Callable[[Leaf, Array], Block], cache: Leaf | Fresh, batch: Batch, heads: int, width: int
) -> Float[Array, "a h w v"]:
    """Softmax over all keys that tokens see, one block at a time, float32; zero for a token that sees no key.

    Keys and values, of this width, are what `block` makes of the cache's entries `[a, j, …]`, seen as `[a, w, j]` says;
    of a `Fresh` one, first the tiles' own. Keeps a running maximum, sum and mixture (arXiv:2205.14135): memory grows
    with a block, not with the context. A cache that is one block is not looped over, which makes it differentiable.
    """
    lowest, shape = jnp.finfo(jnp.float32).min, (batch.slots_a.shape[0], heads, batch.tile)
    start = (jnp.full(shape, lowest), jnp.zeros(shape), jnp.zeros((*shape, width)))

    def step(entries, seen, carry):
        top, total, mixture = carry
        logits, seen, mix = block(entries, seen)
        logits = jnp.where(seen[:, None], logits, -jnp.inf)
        new_top = jax.lax.stop_gradient(jnp.maximum(top, logits.max(axis=-1)))
        weights = jnp.exp(logits - new_top[..., None])
        fade = jnp.exp(top - new_top)
        return new_top, total * fade + weights.sum(axis=-1), mixture * fade[..., None] + mix(weights)

    if isinstance(cache, Fresh):
        start, cache, batch = step(*read_own(cache, batch), start), cache.pages, before(batch)
    blocks, read = num_blocks(cache, batch), lambda i, carry: step(*read_block(cache, batch, i), carry)
    _, total, mixture = read(0, start) if isinstance(blocks, int) else jax.lax.fori_loop(0, blocks, read, start)
    return mixture / jnp.where(total == 0, 1.0, total)[..., None]


class Gqa(NamedTuple):
    """Weights of grouped-query attention; the comments give shape and Hugging Face name."""

    w_q: Leaf  # h r d   q_proj
    w_k: Leaf  # g r d   k_proj
    w_v: Leaf  # g v d   v_proj
    w_o: Leaf  # d h v   o_proj
    q_norm: Leaf  # r    q_norm
    k_norm: Leaf  # r    k_norm


class KeyValueCache(NamedTuple):
    """One layer's pages of keys (rotated) and values."""

    k: Leaf  # p b g r
    v: Leaf  # p b g v


def gqa_params(cfg: Config, att: GroupedAttention, dtype) -> Gqa:
    h, g, r, v, d = att.heads, att.kv_heads, att.head_dim, att.head_dim, cfg.width
    return Gqa(
        w_q=Param((h, r, d), ("h", "r", "d"), dtype, std=d**-0.5),
        w_k=Param((g, r, d), ("g", "r", "d"), dtype, std=d**-0.5),
        w_v=Param((g, v, d), ("g", "v", "d"), dtype, std=d**-0.5),
        w_o=Param((d, h, v), ("d", None, "v"), dtype, std=(h * v) ** -0.5),  # for tokens that have all their heads
        q_norm=Param((r,), ("r",), dtype, mean=1.0),
        k_norm=Param((r,), ("r",), dtype, mean=1.0),
    )


def gqa_cache(att: GroupedAttention, pages: int, page_size: int, dtype) -> KeyValueCache:
    shape = (pages, page_size, att.kv_heads, att.head_dim)
    return KeyValueCache(k=Param(shape, ("p", "b", "g", "r"), dtype), v=Param(shape, ("p", "b", "g", "v"), dtype))


def gqa(
    p: Gqa, x_td: Float[Array, "t d"], cache: KeyValueCache | Fresh, batch: Batch, cfg: Config, att: GroupedAttention
) -> Float[Array, "t d"]:
    """Attends to the cache, which has the tokens' own keys and values."""
    check_heads(p.w_q, att.heads)
    return merge_heads(gqa_heads(p, x_td, cache, batch, cfg, att), p.w_o)


def gqa_heads(
    p: Gqa, x_td: Float[Array, "t d"], cache: KeyValueCache | Fresh, batch: Batch, cfg: Config, att: GroupedAttention
) -> Float[Array, "t h v"]:
    """What each head makes of what it attends to, before they are merged."""
    q_thr = rms_norm(einsum("td,hrd->thr", x_td, p.w_q), p.q_norm, cfg.norm_eps)
    return attend_grouped(rotate(q_thr, batch.positions_t, cfg.rope), cache, batch, att)


def check_heads(w: Leaf, heads: int) -> None:
    """Raises ShardingError if a weight whose first axis are heads has not all of them: it would be broadcast."""
    if w.shape[0] != heads:
        raise ShardingError(
            f"weights have {w.shape[0]} of {heads} heads, as PREFILL places them; decode needs all, placed by DECODE"
        )


def keys_values(p: Gqa, x_td: Float[Array, "t d"], batch: Positions, cfg: Config) -> KeyValueCache:
    """What a token leaves in the cache: its keys `[t, g, r]`, normed and rotated, and its values `[t, g, v]`."""
    k_tgr = rms_norm(einsum("td,grd->tgr", x_td, p.w_k), p.k_norm, cfg.norm_eps)
    return KeyValueCache(rotate(k_tgr, batch.positions_t, cfg.rope), einsum("td,gvd->tgv", x_td, p.w_v))


def merge_heads(o_thv: Float[Array, "t h v"], w_o: Leaf) -> Float[Array, "t d"]:
    """The output projection, as one flat product: XLA's CPU backend would copy a weight with two summed axes.

    Scales of blocks stay those of blocks of equal size: of several heads each, or parts of a head.
    """
    w_dz = jax.tree.map(lambda part: part.reshape(part.shape[0], -1), w_o)
    return einsum("tz,dz->td", o_thv.reshape(o_thv.shape[0], -1), w_dz)


def attend_grouped(
    q_thr: Float[Array, "t h r"], cache: KeyValueCache | Fresh, batch: Batch, att: GroupedAttention
) -> Float[Array, "t h v"]:
    """Attention of queries to their sequences' cached keys and values; `y` queries share a key."""
    a, w, g = batch.slots_a.shape[0], batch.tile, att.kv_heads
    q_awgyr = (q_thr * att.scale).reshape(a, w, g, -1, att.head_dim)

    def block(entries: KeyValueCache, seen_awj: Array) -> Block:
        k_ajgr, v_ajgv = entries
        logits_agywj = jnp.einsum("awgyr,ajgr->agywj", q_awgyr, k_ajgr, preferred_element_type=jnp.float32)

        def mix(weights_ahwj):
            weights_agywj = weights_ahwj.reshape(logits_agywj.shape).astype(v_ajgv.dtype)
            o_agywv = jnp.einsum("agywj,ajgv->agywv", weights_agywj, v_ajgv, preferred_element_type=jnp.float32)
            return o_agywv.reshape(a, att.heads, w, -1)

        return Block(logits_agywj.reshape(a, att.heads, w, -1), seen_awj, mix)

    o_ahwv = attend(block, cache, batch, att.heads, att.head_dim)
    return o_ahwv.transpose(0, 2, 1, 3).reshape(q_thr.shape).astype(q_thr.dtype)
