"""Prefill of prompts that all ranks share, whatever their lengths (arXiv:2506.12708, section 4.3.1).

The chunks of all sequences lie one after another, and every rank computes an equal part of the tokens: the projections
down, the output projection, the feed-forward network. In between the ranks give each other what attention needs of a
token, its latents, and each computes a part of the heads for all tokens. So a layer's attention has one all-gather and
one all-to-all, and a long prompt keeps no rank waiting for another.

What a token leaves in the cache goes to the rank that its sequence belongs to, for decode; what others need of it in
later chunks, they are given again.
"""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxserve.layers.attention import Gqa, KeyValueCache, attend_grouped, keys_values, merge_heads
from jaxserve.layers.batch import Batch, Rows, kept, once_read, write
from jaxserve.layers.config import Config, GroupedAttention, LatentAttention
from jaxserve.layers.dims import AnyArray, Leaf
from jaxserve.layers.linear import einsum
from jaxserve.layers.mla import LatentCache, Mla, attend_queries, compressed, latents, queries
from jaxserve.layers.mtp import Draft, draft_from, join
from jaxserve.layers.norm import rms_norm
from jaxserve.layers.rope import rotate
from jaxserve.layers.transformer import (
    Layer,
    Model,
    Mtp,
    Output,
    States,
    compensate,
    each,
    feed_forward,
    through_layers,
    total_load,
)
from jaxserve.parallel.dispatch import bits, pack, unpack, values
from jaxserve.parallel.ranks import Ranks, exchange, gather, share_of_total, total


class Packed(NamedTuple):
    """Chunks of sequences in tiles of `w = t / a` tokens; a chunk begins a tile, at a multiple of `w` in its sequence.

    All ranks know all of it, but slots: those are a rank's own, and one more than the last where the sequence is
    another's. The past is what the cache has of these sequences, in pages of `w` tokens; `p` may be 0.
    """

    tokens_t: Int[AnyArray, " t"]
    positions_t: Int[AnyArray, " t"]  # -1 for padding
    slots_a: Int[AnyArray, " a"]
    first_a: Int[AnyArray, " a"]  # the first tile of the tile's chunk
    starts_a: Int[AnyArray, " a"]  # where in its sequence that one begins
    past_a: Int[AnyArray, " a"]  # where in the past its sequence begins
    past_slots_p: Int[AnyArray, " p"]
    past_starts_p: Int[AnyArray, " p"]  # the position of each page's first token
    pages_sp: Int[AnyArray, "s p"]  # of this rank's sequences

    @property
    def tile(self) -> int:
        return self.tokens_t.shape[0] // self.slots_a.shape[0]

    def microbatches(self, ranks: Ranks) -> "tuple[Packed, ...]":
        """The equal parts of its tiles and its past that are computed side by side, each with sequences of its own."""
        if (count := ranks.microbatches) == 1:
            return (self,)
        tiles, past = self.slots_a.shape[0] // count, self.past_slots_p.shape[0] // count

        def cut(number: int) -> Packed:
            part = Packed._make([*(jnp.split(column, count)[number] for column in self[:-1]), self.pages_sp])
            return part._replace(first_a=part.first_a - number * tiles, past_a=part.past_a - number * past)

        return tuple(map(cut, range(count)))

    def part(self, ranks: Ranks) -> "Part":
        """The tokens that this rank computes."""
        return Part(mine(self.tokens_t, ranks), mine(self.positions_t, ranks))


class Part(NamedTuple):
    """A rank's tokens."""

    tokens_t: Int[Array, " t"]
    positions_t: Int[Array, " t"]


class Shared(NamedTuple):
    """What attention needs of tokens, on all ranks."""

    query: Array  # what queries are made of: `[t, q]`, or the tokens' states `[t, d]`
    entries: LatentCache | KeyValueCache  # what the tokens leave in the cache: `[t, …]`


def forward_packed(model: Model, packed: Packed, cache: tuple[Any, ...], cfg: Config, ranks: Ranks) -> Output:
    """`transformer.forward` for packed prompts: the hidden states are those of this rank's part of the tokens.

    That is a part of each microbatch, in their order: see `mine`.
    """
    parts = packed.microbatches(ranks)
    run = partial(packed_layer, parts=parts, cfg=cfg, ranks=ranks)
    return through_layers(model, [part.part(ranks).tokens_t for part in parts], cache, run, cfg)


@partial(jax.jit, static_argnames=("cfg", "ranks"))  # traced once for all layers of a kind
def packed_layer(
    p: Layer, states: States, cache: Any, parts: tuple[Packed, ...], cfg: Config, ranks: Ranks
) -> tuple[States, Any, Int[Array, " e"] | None]:
    """`transformer.decoder_layer` for this rank's part of the tokens.

    A single microbatch may find in the cache what it has just written: the past of one sequence can be another's
    tokens. Those of several see it as it was.
    """
    shared, alone = each(partial(share, p, cache=cache, cfg=cfg, ranks=ranks), states, parts), len(parts) == 1
    if alone:
        cache = _extend(cache, shared[0].entries, parts[0])
    found = each(partial(packed_output, p, cache=cache, cfg=cfg, ranks=ranks), states, shared, parts)
    states, loads = tuple(x_td for x_td, _ in found), [load_e for _, load_e in found]
    if not alone:
        cache = once_read(cache, states)
        for (_, rows), packed in zip(shared, parts, strict=True):
            cache = _extend(cache, rows, packed)
    return states, cache, total_load(loads)


@jax.named_scope("attention")
def share(p: Layer, x_td: Float[Array, "t d"], packed: Packed, cache: Any, cfg: Config, ranks: Ranks) -> Shared:
    """Gives all ranks what they need of this rank's tokens.

    Latents are given as the cache keeps them. Keys and values of grouped-query attention are wider than what they are
    made of: that is given, and all make them.
    """
    normed_td = rms_norm(x_td, p.attn_norm, cfg.norm_eps)
    if isinstance(p.attn, Mla):
        own = kept(latents(p.attn, normed_td, packed.part(ranks), cfg), cache)
        return Shared(*_gather((compressed(p.attn, normed_td), own), ranks))
    normed_td = _gather(normed_td, ranks)
    return Shared(normed_td, keys_values(p.attn, normed_td, packed, cfg))


def packed_output(
    p: Layer, x_td: Float[Array, "t d"], shared: Shared, packed: Packed, cache: Any, cfg: Config, ranks: Ranks
) -> tuple[Float[Array, "t d"], Int[Array, " e"] | None]:
    """`transformer.layer_output` for this rank's part of the tokens."""
    if isinstance(p.attn, Mla):
        y_td = mla_over_ranks(p.attn, shared, cache, packed, cfg, ranks)
    else:
        y_td = gqa_over_ranks(p.attn, shared, cache, packed, cfg, ranks)
    x_td = x_td + compensate(y_td, p.attn_bias)
    return feed_forward(p, x_td, packed.part(ranks).positions_t >= 0, cfg, ranks)


@jax.named_scope("attention")
def mla_over_ranks(
    p: Mla, shared: Shared, cache: LatentCache, packed: Packed, cfg: Config, ranks: Ranks
) -> Float[Array, "t d"]:
    """Latent attention of this rank's tokens."""
    att = cfg.attention
    assert isinstance(att, LatentAttention)
    some = replace(att, heads=-(-att.heads // ranks.size))
    heads = p._replace(**{name: _my_heads(getattr(p, name), some.heads, ranks) for name in ("w_uq", "w_uk", "w_uv")})
    memory, batch = _memory(cache, shared.entries, packed, ranks)
    o_thv = attend_queries(heads, *queries(heads, shared.query, batch, cfg, some), memory, batch, some)
    return merge_heads(_to_tokens(o_thv, att.heads, ranks), p.w_o)


@jax.named_scope("attention")
def gqa_over_ranks(
    p: Gqa, shared: Shared, cache: KeyValueCache, packed: Packed, cfg: Config, ranks: Ranks
) -> Float[Array, "t d"]:
    """Grouped-query attention of this rank's tokens."""
    att = cfg.attention
    assert isinstance(att, GroupedAttention)
    count = -(-att.heads // ranks.size)
    memory, batch = _memory(cache, shared.entries, packed, ranks)
    heads = jnp.minimum(ranks.rank * count + jnp.arange(count), att.heads - 1)
    memory = jax.tree.map(lambda pages: jnp.take(pages, heads // (att.heads // att.kv_heads), axis=2), memory)
    q_thr = rms_norm(einsum("td,hrd->thr", shared.query, _my_heads(p.w_q, count, ranks)), p.q_norm, cfg.norm_eps)
    q_thr = rotate(q_thr, packed.positions_t, cfg.rope)
    o_thv = attend_grouped(q_thr, memory, batch, replace(att, heads=count, kv_heads=count))
    return merge_heads(_to_tokens(o_thv, att.heads, ranks), p.w_o)


@jax.named_scope("draft")
def draft_packed(
    model: Model, mtp: Mtp, hidden_td: Float[Array, "t d"], packed: Packed, cache: Any, last: Rows, cfg: Config,
    ranks: Ranks,
) -> Draft:  # fmt: skip
    """`mtp.draft` for this rank's part of packed prompts, whose `tokens_t` are the next ones.

    The results are those of the `last` tokens of some sequences, on the ranks that these belong to: `index_s` says for
    all ranks where they are, `slots_s` which of this rank's slots they have.
    """
    parts = packed.microbatches(ranks)
    x_td = join(model, mtp, hidden_td, mine(packed.tokens_t, ranks, len(parts)), cfg)
    rows = each(partial(_entries, mtp.layer, cache=cache, cfg=cfg, ranks=ranks), jnp.split(x_td, len(parts)), parts)
    for entries, part in zip(rows, parts, strict=True):
        cache = _extend(cache, entries, part)
    positions_s = jnp.take(packed.positions_t, mine(last.index_s, ranks), mode="fill", fill_value=-1)
    batch = Batch(jnp.zeros_like(positions_s), positions_s, last.slots_s, packed.pages_sp)
    return draft_from(mtp, to_owners(x_td, last.index_s, ranks), batch, cache, cfg, ranks)


def to_owners(x_td: Float[Array, "t d"], index_i: Int[Array, " i"], ranks: Ranks) -> Float[Array, "s d"]:
    """The states of some tokens, wherever they were computed, on the ranks that want them.

    `index_i` are their places among all tokens, as many for each rank, one rank's after another's. A place past the
    last is none.
    """
    size = x_td.shape[0] // ranks.microbatches
    block_i, row_i = jnp.divmod(index_i, size)
    part_i, rank_i = jnp.divmod(block_i, ranks.size)  # the order that `mine` takes blocks from
    held_i = (rank_i == ranks.rank) & (part_i < ranks.microbatches)
    rows_id = jnp.where(held_i[:, None], jnp.take(x_td, part_i * size + row_i, axis=0, mode="clip"), 0)
    return share_of_total(rows_id, ranks)


def mine(column: AnyArray, ranks: Ranks, parts: int = 1) -> Array:
    """This rank's part of a column that all have: of each of its equal parts, one after another."""
    blocks = jnp.asarray(column).reshape(parts, ranks.size, -1)
    return jax.lax.dynamic_index_in_dim(blocks, ranks.rank, axis=1, keepdims=False).reshape(-1)


def _entries(
    p: Layer, x_td: Array, packed: Packed, cache: Any, cfg: Config, ranks: Ranks
) -> LatentCache | KeyValueCache:
    """What all tokens leave in the cache."""
    normed_td = rms_norm(x_td, p.attn_norm, cfg.norm_eps)
    if isinstance(p.attn, Mla):
        return _gather(kept(latents(p.attn, normed_td, packed.part(ranks), cfg), cache), ranks)
    return keys_values(p.attn, _gather(normed_td, ranks), packed, cfg)


def _gather(tree: Any, ranks: Ranks) -> Any:
    """Rows of all ranks, of a whole tree in one message."""
    return unpack(gather(pack(tree), ranks), tree)


def _extend(cache: Leaf, entries: Leaf, packed: Packed) -> Leaf:
    """The cache with the entries of this rank's sequences."""
    known = packed.slots_a < packed.pages_sp.shape[0]
    positions_t = jnp.where(jnp.repeat(known, packed.tile), packed.positions_t, -1)
    slots_a = jnp.where(known, packed.slots_a, 0)
    return write(cache, entries, Batch(packed.tokens_t, positions_t, slots_a, packed.pages_sp))


def _memory(cache: Leaf, entries: Leaf, packed: Packed, ranks: Ranks) -> tuple[Leaf, Batch]:
    """All that attention may look at, in pages of `w` tokens: the past, then the step's own; and the way to them."""
    w, count = packed.tile, packed.past_slots_p.shape[0]
    pages = jax.tree.map(lambda rows: rows.reshape(-1, w, *rows.shape[1:]), entries)
    if count:
        past = _past(cache, packed, ranks)
        pages = jax.tree.map(lambda old, new: jnp.concatenate([old.astype(new.dtype), new]), past, pages)
    longest = packed.pages_sp.shape[1] * jax.tree.leaves(cache)[0].shape[1]
    place_ap, before_a1 = jnp.arange(-(-longest // w))[None], (packed.starts_a // w)[:, None]
    own_ap = count + packed.first_a[:, None] + place_ap - before_a1
    table_ap = jnp.where(place_ap < before_a1, packed.past_a[:, None] + place_ap, own_ap)
    tiles = jnp.arange(packed.slots_a.shape[0])
    return pages, Batch(packed.tokens_t, packed.positions_t, tiles, jnp.minimum(table_ap, count + len(tiles) - 1))


def _past(cache: Leaf, packed: Packed, ranks: Ranks) -> Leaf:
    """What the ranks' caches have of the sequences: each rank gives the pages of its own, and zeros for the others'."""
    b = jax.tree.leaves(cache)[0].shape[1]
    known_p = packed.past_slots_p < packed.pages_sp.shape[0]
    places_pw = packed.past_starts_p[:, None] + jnp.arange(packed.tile)[None]
    ids_pw = packed.pages_sp[jnp.where(known_p, packed.past_slots_p, 0)[:, None], places_pw // b]

    def give(pages):
        rows = pages[ids_pw, places_pw % b]
        return jnp.where(known_p.reshape(-1, *(1,) * (rows.ndim - 1)), rows, 0)

    own = jax.tree.map(give, cache)
    return unpack(total(pack(own), ranks), own)  # all ranks' bytes but one's are zero


def _my_heads(w: Leaf, count: int, ranks: Ranks) -> Leaf:
    """This rank's heads of a weight whose first axis they are; if they don't divide, the last ranks have zeros.

    By the rules of PREFILL it has no others.
    """
    if w.shape[0] == count:
        return w
    missing = count * ranks.size - w.shape[0]

    def some(part: Array) -> Array:
        padded = jnp.pad(part, ((0, missing), *((0, 0),) * (part.ndim - 1)))
        return jax.lax.dynamic_slice_in_dim(padded, ranks.rank * count, count)

    return jax.tree.map(some, w)


def _to_tokens(o_thv: Array, heads: int, ranks: Ranks) -> Array:
    """From a part of the heads of all tokens to all heads of a part of the tokens."""
    t, some, v = o_thv.shape
    came = exchange(bits(o_thv).reshape(ranks.size, -1, some, v), ranks)  # by source: which heads
    return values(came.swapaxes(0, 1).reshape(t // ranks.size, -1, v), o_thv.dtype)[:, :heads]
