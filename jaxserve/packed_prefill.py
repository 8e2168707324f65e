"""Prefill on a mesh: the ranks compute the prompts of all of them together, each an equal part."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxserve.layers.batch import Rows
from jaxserve.layers.config import Config
from jaxserve.layers.packed import Packed, draft_packed, forward_packed, mine, to_owners
from jaxserve.layers.transformer import Model, logits
from jaxserve.parallel.ranks import Ranks, gather
from jaxserve.slots import Masks, Table, advance, choose, real, take
from jaxserve.steps import Prefilled, State, chosen_of, counted, guess_on, keep, known_of


class SharedPack(NamedTuple):
    """Chunks of the sequences of all ranks, in tiles; see `layers.packed.Packed`."""

    tokens_t: Int[Array, " t"]
    next_t: Int[Array, " t"]  # the token after each, where it is known
    positions_t: Int[Array, " t"]
    slots_a: Int[Array, " a"]  # this rank's
    first_a: Int[Array, " a"]
    starts_a: Int[Array, " a"]
    past_a: Int[Array, " a"]
    past_slots_p: Int[Array, " p"]  # this rank's
    past_starts_p: Int[Array, " p"]
    rows_s: Int[Array, " s"]  # this rank's slots of sequences that this completes; the others are none
    last_s: Int[Array, " all_s"]  # of every rank, where in `t` the last tokens of those are; for none, t
    reported: Bool[Array, ""]  # log-probabilities of the known tokens are wanted


@partial(jax.jit, static_argnames=("cfg", "drafts", "ranks"), donate_argnames="state")
def prefill_packed(
    model: Model, state: State, table: Table, pack: SharedPack, masks: Masks, *, cfg: Config, drafts: int, ranks: Ranks
) -> tuple[Prefilled, State]:
    """`steps.prefill` inside a `shard_map`: the next tokens are chosen on the ranks that the sequences belong to."""
    slots, rows_s = state.slots, pack.rows_s
    packed = Packed(
        pack.tokens_t, pack.positions_t, pack.slots_a, pack.first_a, pack.starts_a, pack.past_a, pack.past_slots_p,
        pack.past_starts_p, table.pages_sp,
    )  # fmt: skip
    out = forward_packed(model, packed, state.cache, cfg, ranks)
    place_s = take(pack.positions_t, mine(pack.last_s, ranks))
    start_s = jnp.where(real(rows_s, slots), place_s + 1, -1)
    scores_su = logits(model, to_owners(out.hidden_td, pack.last_s, ranks))
    choice = choose(scores_su, start_s, jnp.zeros((len(rows_s), 0), jnp.int32), rows_s, slots, table, masks)
    count_s = (start_s >= 0).astype(jnp.int32)
    advanced = advance(slots, rows_s, table, choice.tokens_sw, start_s, count_s)
    state = State(advanced, out.cache, counted(state.load, out.load_le))
    if drafts:
        chosen_s = gather(choice.tokens_sw[:, 0], ranks)
        following = packed._replace(tokens_t=pack.next_t.at[pack.last_s].set(chosen_s, mode="drop"))
        last, cache = Rows(pack.last_s, rows_s), state.cache[cfg.layers]
        first = draft_packed(model, model.mtp[0], out.hidden_td, following, cache, last, cfg, ranks)
        state = keep(state, guess_on(model, first, rows_s, state.slots, table, cfg, drafts, ranks), rows_s, cfg)
    chosen = jax.tree.map(lambda column: column[None], chosen_of(choice, count_s, state.slots, rows_s, drafts))
    next_t, tiles = mine(pack.next_t, ranks, ranks.microbatches), pack.first_a.shape[0] // ranks.size
    known = known_of(model, out.hidden_td, next_t, tiles, pack.reported)
    apart = lambda column: column.reshape(ranks.microbatches, -1, *column.shape[1:])  # noqa: E731
    return Prefilled(chosen, jax.tree.map(apart, known)), state
