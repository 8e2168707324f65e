"""The exchange of tokens between the devices that share the experts, from inside a `shard_map`.

FusedDispatch and FusedCombine of CloudMatrix-Infer (arXiv:2506.12708, section 4.2.1) in collectives: a token goes to
the devices of its experts in one all-to-all, and what these make of it comes back in another.

Buffers are static: of each device, a block for every other, with room for all that the device could have to send there.
So nothing is dropped and nothing compiled anew, whatever the routing; no counts are sent ahead. The place in a buffer
says where a message comes from and where its answer goes, so a message says only which expert it is for.

A token's codes and scale are made of it alone, and its answers are added in the order of its choices, whichever rank
they come from. So with experts in INT8 it gets the same bits on any number of devices (docs/structure.md).
"""

import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from jaxserve.parallel.qarray import QArray, quantize_rows
from jaxserve.parallel.ranks import Ranks, exchange


class Received(NamedTuple):
    """What a device has to work on: a row for every place of its buffer, most of them empty."""

    rows_id: Any  # [i, d]; a QArray if they were quantized
    slots_i: Int[Array, " i"]  # which of the device's experts; empty rows: one more than the last


class Handle(NamedTuple):
    """Where a device has sent its tokens."""

    row_tk: Int[Array, "t k"]  # of its buffer; one more than the last: nowhere
    capacity: int  # rows a rank


def capacity(tokens: int, per_token: int, slots_per_rank: int) -> int:
    """Messages that a device can have for another: no token has more for one device than this has experts."""
    return tokens * min(per_token, slots_per_rank)


def message_bytes(width: int, payload: str, itemsize: int = 2) -> int:
    """Bytes of a token on its way to an expert: values, scale if they are quantized, and the expert's number."""
    return width + 8 if payload == "int8" else width * itemsize + 4


def published_message_bytes(width: int) -> int:
    """The same in the paper: INT8 values and a scale, filled up to a multiple of 512 bytes (section 4.2.1)."""
    return -(-(width + 4) // 512) * 512


def buffer_bytes(ranks: int, tokens: int, per_token: int, slots_per_rank: int, message: int) -> int:
    """Bytes of a device's buffer (arXiv:2506.12708, eq. 1 and 2)."""
    return ranks * capacity(tokens, per_token, slots_per_rank) * message


@jax.named_scope("dispatch")
def dispatch(
    x_td: Float[Array, "t d"], slots_tk: Int[Array, "t k"], slots_per_rank: int, ranks: Ranks
) -> tuple[Received, Handle]:
    """Sends each token to the devices that have its experts.

    `slots_tk` are physical: rank r has those from `r * slots_per_rank` on; numbers beyond the last are none, and no
    token has one twice.
    """
    (t, k), count = slots_tk.shape, ranks.size
    room = capacity(t, k, slots_per_rank)
    rank_tk = jnp.minimum(slots_tk // slots_per_rank, count)
    place_tk, _ = rank_in_group(rank_tk.reshape(-1), count)
    row_tk = jnp.where(rank_tk < count, rank_tk * room + place_tk.reshape(t, k), count * room)
    fill = lambda values, nothing: jnp.full(count * room, nothing).at[row_tk].set(values, mode="drop")  # noqa: E731
    tokens_i = fill(jnp.broadcast_to(jnp.arange(t)[:, None], (t, k)), t)
    slots_i = fill(slots_tk % slots_per_rank, slots_per_rank)
    rows_td, numbers_i1 = _payload(x_td, ranks.payload), slots_i[:, None]
    messages = jnp.take(pack(rows_td), tokens_i, axis=0, mode="fill", fill_value=0)
    sent = jnp.concatenate([messages, pack(numbers_i1)], axis=1)
    came = exchange(sent.reshape(count, room, -1), ranks).reshape(count * room, -1)
    rows_id, numbers_i1 = unpack(came, (rows_td, numbers_i1))
    return Received(rows_id, numbers_i1[:, 0]), Handle(row_tk, room)


@jax.named_scope("combine")
def combine(
    y_id: Float[Array, "i d"], weights_tk: Float[Array, "t k"], handle: Handle, ranks: Ranks
) -> Float[Array, "t d"]:
    """Sends what the experts made of each row back, and sums it by its weights."""
    came = exchange(bits(y_id).reshape(ranks.size, handle.capacity, -1), ranks).reshape(y_id.shape)
    back_id = values(came, y_id.dtype)
    y_tkd = jnp.take(back_id, handle.row_tk, axis=0, mode="fill", fill_value=0)
    return jnp.einsum("tkd,tk->td", y_tkd, weights_tk.astype(y_id.dtype))


def rank_in_group(group_i: Int[Array, " i"], groups: int) -> tuple[Int[Array, " i"], Int[Array, " g"]]:
    """How many members of its group stand before each, and how many each group has. Group `groups` is none."""
    order = jnp.argsort(group_i, stable=True)
    place = jnp.zeros_like(group_i).at[order].set(jnp.arange(group_i.size, dtype=group_i.dtype))
    count_g = jnp.zeros(groups, group_i.dtype).at[group_i].add(1, mode="drop")
    first = jnp.pad(jnp.cumsum(count_g, dtype=count_g.dtype), (1, 0))
    return place - first[group_i], count_g


def _payload(x_td: Array, kind: str) -> Array | QArray:
    """What a token's experts are sent of it."""
    if kind == "float":
        return x_td
    if kind != "int8":
        raise NotImplementedError(f"payload {kind!r} of dispatch; there are: int8, float")
    return quantize_rows(x_td)


def pack(tree: Any) -> UInt8[Array, "rows bytes"]:
    """A tree of arrays with as many rows as one of bytes: a single message, which no backend widens."""
    in_bytes = lambda x: jax.lax.bitcast_convert_type(x, jnp.uint8).reshape(x.shape[0], -1)  # noqa: E731
    return jnp.concatenate([in_bytes(x) for x in jax.tree.leaves(tree)], axis=1)


def unpack(message: UInt8[Array, "rows bytes"], like: Any) -> Any:
    """The tree that `pack` was given: arrays like these, but with the message's rows."""
    leaves, tree = jax.tree.flatten(like)
    widths = [x.dtype.itemsize * math.prod(x.shape[1:]) for x in leaves]
    parts = jnp.split(message, list(itertools.accumulate(widths[:-1])), axis=1)
    return tree.unflatten(map(_from_bytes, parts, leaves))


def _from_bytes(part: Array, like: Any) -> Array:
    size = like.dtype.itemsize
    grouped = part.reshape(-1, *like.shape[1:], *([size] if size > 1 else []))
    return jax.lax.bitcast_convert_type(grouped, like.dtype)


def bits(x: Array) -> Array:
    """16-bit values as integers: XLA's CPU backend would send them as float32."""
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x


def values(x: Array, dtype: Any) -> Array:
    """What `bits` was made of."""
    return jax.lax.bitcast_convert_type(x, dtype)
