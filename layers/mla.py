"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1).

The cache holds, for a token and a layer, one latent of `c` values for all heads and one rotated key of `r` values.
Two forms of the same attention read it:

- expanded: keys and values of all heads are computed from the latents, block by block. Fewer operations: prefill.
- absorbed: the key matrix is moved onto the query, the value matrix onto the output; all heads attend to the latents
  themselves. Fewer bytes: decode.
"""

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxserve.layers.attention import Block, attend, check_heads, merge_heads
from jaxserve.layers.batch import Batch, Fresh, Positions
from jaxserve.layers.config import Config, LatentAttention
from jaxserve.layers.dims import Leaf
from jaxserve.layers.linear import einsum
from jaxserve.layers.norm import rms_norm
from jaxserve.layers.rope import rotate
from jaxserve.parallel.qarray import QArray, dequantize
from jaxserve.parallel.sharding import Param, quantized

LATENT_EPS = 1e-6
"""Of the norms inside latent attention: the published models' code has this whatever `rms_norm_eps` says."""


class Mla(NamedTuple):
    """Named after the paper's matrices; the comments give shape and Hugging Face name."""

    w_dq: Leaf | None  # q d        q_a_proj; None: the query is not compressed
    q_norm: Leaf | None  # q        q_a_layernorm
    w_uq: Leaf  # h z q             q_b_proj; of an uncompressed query h z d, q_proj
    w_dkv: Leaf  # c d              kv_a_proj_with_mqa[:c]
    w_kr: Leaf  # r d               kv_a_proj_with_mqa[c:]
    kv_norm: Leaf  # c              kv_a_layernorm
    w_uk: Leaf  # h n c             kv_b_proj, of each head the first n rows
    w_uv: Leaf  # h v c             kv_b_proj, of each head the other v rows
    w_o: Leaf  # d h v              o_proj


class LatentCache(NamedTuple):
    """One layer's pages of latents (normed) and keys (rotated).

    Latents may be in INT8, with a scale a token; keys are in 16 bits then (arXiv:2508.02520, section 4.7).
    """

    c: Leaf  # p b c
    r: Leaf  # p b r


def mla_params(cfg: Config, att: LatentAttention, dtype) -> Mla:
    h, n, r, v, c, q, d = (
        att.heads, att.nope_dim, att.rope_dim, att.value_dim, att.kv_rank, att.query_rank, cfg.width,
    )  # fmt: skip
    return Mla(
        w_dq=Param((q, d), ("q", "d"), dtype, std=d**-0.5) if q else None,
        q_norm=Param((q,), ("q",), dtype, mean=1.0) if q else None,
        w_uq=Param((h, n + r, q or d), ("h", None, "q" if q else "d"), dtype, std=(q or d) ** -0.5),
        w_dkv=Param((c, d), ("c", "d"), dtype, std=d**-0.5),
        w_kr=Param((r, d), ("r", "d"), dtype, std=d**-0.5),
        kv_norm=Param((c,), ("c",), dtype, mean=1.0),
        w_uk=Param((h, n, c), ("h", "n", "c"), dtype, std=c**-0.5),
        w_uv=Param((h, v, c), ("h", "v", "c"), dtype, std=c**-0.5),
        w_o=Param((d, h, v), ("d", None, "v"), dtype, std=(h * v) ** -0.5),  # for tokens that have all their heads
    )


def mla_cache(att: LatentAttention, pages: int, page_size: int, dtype, int8: bool = False) -> LatentCache:
    c = Param((pages, page_size, att.kv_rank), ("p", "b", "c"), dtype)
    r = Param((pages, page_size, att.rope_dim), ("p", "b", "r"), dtype)
    if not int8:
        return LatentCache(c, r)
    return LatentCache(quantized(c), replace(r, dtype=dtype if jnp.dtype(dtype).itemsize == 2 else jnp.bfloat16))


def mla(
    p: Mla, x_td: Float[Array, "t d"], cache: LatentCache | Fresh, batch: Batch, cfg: Config, att: LatentAttention
) -> Float[Array, "t d"]:
    """Attends to the cache, which has the tokens' own latents, in the form that costs less."""
    check_heads(p.w_uk, att.heads)
    return merge_heads(mla_heads(p, x_td, cache, batch, cfg, att), p.w_o)


def mla_heads(
    p: Mla, x_td: Float[Array, "t d"], cache: LatentCache | Fresh, batch: Batch, cfg: Config, att: LatentAttention
) -> Float[Array, "t h v"]:
    """What each head makes of what it attends to, before they are merged."""
    q_thn, q_thr = queries(p, compressed(p, x_td), batch, cfg, att)
    return attend_queries(p, q_thn, q_thr, cache, batch, att)


def attend_queries(
    p: Mla, q_thn: Array, q_thr: Array, cache: LatentCache | Fresh, batch: Batch, att: LatentAttention
) -> Float[Array, "t h v"]:
    """Attention in the form that costs less."""
    form = attend_expanded if expanding_pays(att, batch.tile) else attend_absorbed
    return form(p, q_thn, q_thr, cache, batch, att)


def compressed(p: Mla, x_td: Array) -> Float[Array, "t q"]:
    """What queries are made of: their latent, normed; the token's state itself if they have none."""
    if p.w_dq is None or p.q_norm is None:
        return x_td
    return rms_norm(einsum("td,qd->tq", x_td, p.w_dq), p.q_norm, LATENT_EPS)


def queries(
    p: Mla, q_tq: Float[Array, "t q"], batch: Positions, cfg: Config, att: LatentAttention
) -> tuple[Array, Array]:
    """The queries' two parts, `[t, h, n]` and, rotated, `[t, h, r]`, from what `compressed` gives."""
    q_thn, q_thr = jnp.split(einsum("tq,hzq->thz", q_tq, p.w_uq), [att.nope_dim], axis=-1)
    return q_thn, rotate(q_thr, batch.positions_t, cfg.rope)


def latents(p: Mla, x_td: Array, batch: Positions, cfg: Config) -> LatentCache:
    """What a token leaves in the cache: its latent `[t, c]`, normed, and its key `[t, r]`, rotated."""
    c_tc = rms_norm(einsum("td,cd->tc", x_td, p.w_dkv), p.kv_norm, LATENT_EPS)
    k_tr = einsum("td,rd->tr", x_td, p.w_kr)
    return LatentCache(c_tc, rotate(k_tr[:, None], batch.positions_t, cfg.rope)[:, 0])


def expanding_pays(att: LatentAttention, tile: int) -> bool:
    """Whether a tile's operations per key and head, the key's expansion included, are fewer in the expanded form."""
    expanded = tile * (att.nope_dim + att.rope_dim + att.value_dim) + att.kv_rank * (att.nope_dim + att.value_dim)
    absorbed = tile * (2 * att.kv_rank + att.rope_dim)
    return expanded < absorbed


def attend_expanded(
    p: Mla, q_thn: Float[Array, "t h n"], q_thr: Float[Array, "t h r"], cache: LatentCache | Fresh, batch: Batch,
    att: LatentAttention,
) -> Float[Array, "t h v"]:  # fmt: skip
    """Computes the keys and values of all heads from the latents of a block, and attends to them."""
    q_awhz = _tiles(jnp.concatenate([q_thn, q_thr], axis=-1) * att.scale, batch)

    def block(entries: LatentCache, seen_awj: Array) -> Block:
        c_ajc, k_ajr = _floats(entries, q_thn.dtype)
        k_ajhr = jnp.broadcast_to(k_ajr[:, :, None], (*k_ajr.shape[:2], att.heads, att.rope_dim))
        k_ajhz = jnp.concatenate([einsum("ajc,hnc->ajhn", c_ajc, p.w_uk), k_ajhr], axis=-1)
        v_ajhv = einsum("ajc,hvc->ajhv", c_ajc, p.w_uv)
        logits_ahwj = _dot32("awhz,ajhz->ahwj", q_awhz, k_ajhz)
        return Block(logits_ahwj, seen_awj, lambda w_ahwj: _dot32("ahwj,ajhv->ahwv", w_ahwj, v_ajhv))

    o_ahwv = attend(block, cache, batch, att.heads, att.value_dim)
    return o_ahwv.transpose(0, 2, 1, 3).reshape(-1, att.heads, att.value_dim).astype(q_thn.dtype)


def attend_absorbed(
    p: Mla, q_thn: Float[Array, "t h n"], q_thr: Float[Array, "t h r"], cache: LatentCache | Fresh, batch: Batch,
    att: LatentAttention,
) -> Float[Array, "t h v"]:  # fmt: skip
    """Moves `w_uk` onto the query and `w_uv` onto the output, so that keys and values stay latent."""
    q_thc = einsum("thn,hnc->thc", q_thn, p.w_uk)
    q_awhc, q_awhr = _tiles(q_thc * att.scale, batch), _tiles(q_thr * att.scale, batch)

    def block(entries: LatentCache, seen_awj: Array) -> Block:
        c_ajc, k_ajr = jax.lax.optimization_barrier(_floats(entries, q_thn.dtype))  # or each use would gather them
        logits_ahwj = _dot32("awhc,ajc->ahwj", q_awhc, c_ajc) + _dot32("awhr,ajr->ahwj", q_awhr, k_ajr)
        return Block(logits_ahwj, seen_awj, lambda w_ahwj: _dot32("ahwj,ajc->ahwc", w_ahwj, c_ajc))

    o_ahwc = attend(block, cache, batch, att.heads, att.kv_rank)
    o_thc = o_ahwc.transpose(0, 2, 1, 3).reshape(-1, att.heads, att.kv_rank).astype(q_thn.dtype)
    return einsum("thc,hvc->thv", o_thc, p.w_uv)


def _floats(entries: LatentCache, dtype) -> tuple[Array, Array]:
    """A block's latents and keys as attention multiplies them."""
    c, r = entries
    return dequantize(c, dtype) if isinstance(c, QArray) else c.astype(dtype), r.astype(dtype)


def _tiles(q_thz: Array, batch: Batch) -> Array:
    return q_thz.reshape(-1, batch.tile, *q_thz.shape[1:])


def _dot32(spec: str, x: Array, y: Array) -> Array:
    """A product of activations with float32 sums; the softmax's float32 weights take the values' dtype."""
    return jnp.einsum(spec, x.astype(y.dtype), y, preferred_element_type=jnp.float32)
