"""The programs the device runs: known tokens into the cache, and a token or more for each sequence that has caught up.

Both are of static shape, have no other effect than their results, and DONATE the state. What the next step needs stays
on the device, so that the host can launch it before it has read this one.

With drafts, a sequence's last token and `k` guesses at those after it are computed together. At each of these places
the model's own choice is made, as it would be without guesses; a guess holds if it is that choice. So drafts change how
many tokens a step gives, and never which (arXiv:2211.17192, with the noise of a place fixed beforehand).
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxserve.layers.batch import Batch, Rows
from jaxserve.layers.config import Config
from jaxserve.layers.mtp import Draft, draft, follow
from jaxserve.layers.sampling import Logprobs, entropy, logprobs, sample
from jaxserve.layers.transformer import Model, forward, logits
from jaxserve.parallel.ranks import Ranks
from jaxserve.slots import TOP, Choice, Masks, Slots, Table, advance, choose, places, real, report_if, take

ROUNDS = 8
"""Rounds of `decode` at most: what the host has to do for a launch can take longer than a round of a small model."""


class State(NamedTuple):
    """What lives on the device from step to step."""

    slots: Slots
    cache: tuple[Any, ...]
    load: Int[Array, "ranks l e"]  # tokens that each expert got so far, of MTP modules last


class Gate(NamedTuple):
    """When guesses are verified: with at most so many rows, of which half are guessed with at most this entropy.

    With more rows, decoding makes none either.
    """

    entropy: Float[Array, ""]  # nats
    rows: Int[Array, ""]


class Pack(NamedTuple):
    """Chunks of known tokens of several sequences, in tiles (see `Batch`)."""

    tokens_t: Int[Array, " t"]
    next_t: Int[Array, " t"]  # the token after each, where it is known
    positions_t: Int[Array, " t"]  # -1 for padding
    slots_a: Int[Array, " a"]
    rows_a: Int[Array, " a"]  # the slots of sequences that this completes; the others are none
    last_a: Int[Array, " a"]  # where in `t` the last token of each of those is; for none, t
    reported: Bool[Array, ""]  # log-probabilities of the known tokens are wanted


class Chosen(NamedTuple):
    """Tokens of each row, of which the first `count_s` count. As a result of a step, with a leading axis of rounds."""

    tokens_sw: Int[Array, "s w"]
    count_s: Int[Array, " s"]
    status_sw: Int[Array, "s w"]
    report: Logprobs  # of each place, `[s, w, …]`
    drafts_sk: Int[Array, "s k"]  # guesses at what comes next
    wide: Bool[Array, ""]  # whether guesses were verified


class Guesses(NamedTuple):
    """What the MTP module says of some sequences."""

    cache: Any  # the module's own
    drafts_sk: Int[Array, "s k"]
    entropy_s: Float[Array, " s"]  # of the first guess, in nats; inf: none was made
    load_e: Int[Array, " e"] | None  # of the module's experts; None: not counted


class Prefilled(NamedTuple):
    """What `prefill` gives: the next token of sequences that are complete, and how probable the known ones were."""

    chosen: Chosen
    known: Logprobs  # `[microbatches, t, …]`: of the token after each; zeros if nobody wants it


@partial(jax.jit, static_argnames=("cfg", "drafts", "ranks"), donate_argnames="state")
def prefill(
    model: Model, state: State, table: Table, pack: Pack, masks: Masks, *, cfg: Config, drafts: int,
    ranks: Ranks | None = None,
) -> tuple[Prefilled, State]:  # fmt: skip
    """Puts chunks of several sequences into the cache; chooses the next token of those that are then complete."""
    slots, rows_s = state.slots, pack.rows_a
    batch = Batch(pack.tokens_t, pack.positions_t, pack.slots_a, table.pages_sp)
    out = forward(model, batch, state.cache, cfg, ranks)
    start_s = jnp.where(real(rows_s, slots), take(pack.positions_t, pack.last_a) + 1, -1)
    scores_su = logits(model, take(out.hidden_td, pack.last_a))
    none_sk = jnp.zeros((len(rows_s), 0), jnp.int32)
    choice = choose(scores_su, start_s, none_sk, rows_s, slots, table, masks)
    count_s = (start_s >= 0).astype(jnp.int32)
    advanced = advance(slots, rows_s, table, choice.tokens_sw, start_s, count_s)
    state = State(advanced, out.cache, counted(state.load, out.load_le))
    if drafts:
        following_t = pack.next_t.at[pack.last_a].set(choice.tokens_sw[:, 0], mode="drop")
        following, last = batch._replace(tokens_t=following_t), Rows(pack.last_a, rows_s)
        state = _follow(model, out.hidden_td, following, last, state, table, cfg, drafts, ranks)
    chosen = jax.tree.map(lambda column: column[None], chosen_of(choice, count_s, state.slots, rows_s, drafts))
    known = known_of(model, out.hidden_td, pack.next_t, pack.slots_a.shape[0], pack.reported)
    return Prefilled(chosen, jax.tree.map(lambda column: column[None], known)), state


@partial(jax.jit, static_argnames=("cfg", "drafts", "ranks"), donate_argnames="state")
def decode(
    model: Model, state: State, table: Table, rows_s: Int[Array, " s"], masks: Masks, gate: Gate,
    rounds: Int[Array, ""], *, cfg: Config, drafts: int, ranks: Ranks | None = None,
) -> tuple[Chosen, State]:  # fmt: skip
    """Lets the sequences of some slots go on for some rounds, by a token each, or by more where guesses hold.

    Ends early when all have ended, but on ranks, which would have to ask each other. The masks hold for the first
    round: rows that have one can go no further.
    """

    def verify(width: int, state: State) -> tuple[Chosen, State]:
        return _verify(model, state, table, rows_s, masks, gate, cfg, drafts, width, ranks)

    def once(state: State) -> tuple[Chosen, State]:
        if not drafts:
            return verify(1, state)
        wide = _pays(state.slots, rows_s, gate, ranks)
        return jax.lax.cond(wide, partial(verify, 1 + drafts), partial(verify, 1), state)

    def unfinished(carry):
        done, _, state = carry
        return (done < rounds) & (True if ranks else _active(state.slots, rows_s).any())

    def go_on(carry):
        done, all_chosen, state = carry
        chosen, state = once(state)
        return done + 1, jax.tree.map(lambda column, part: column.at[done].set(part), all_chosen, chosen), state

    shapes, _ = jax.eval_shape(once, state)
    nothing = jax.tree.map(lambda part: jnp.zeros((ROUNDS, *part.shape), part.dtype), shapes)
    _, all_chosen, state = jax.lax.while_loop(unfinished, go_on, (jnp.int32(0), nothing, state))
    return all_chosen, state


@partial(jax.jit, static_argnames=("cfg", "drafts", "width", "ranks"))  # traced once for `eval_shape` and the loop
def _verify(
    model: Model, state: State, table: Table, rows_s: Array, masks: Masks, gate: Gate, cfg: Config, drafts: int,
    width: int, ranks: Ranks | None,
) -> tuple[Chosen, State]:  # fmt: skip
    """Computes `width` tokens a row, its last and guesses; of the choices, those count that rest on right guesses."""
    slots = state.slots
    start_s = jnp.where(real(rows_s, slots), take(slots.positions_s, rows_s), -1)
    places_sw = places(start_s, take(table.limits_s, rows_s), width)
    guesses_sk = take(slots.drafts_sk, rows_s)[:, : width - 1]
    tokens_sw = jnp.concatenate([take(slots.tokens_s, rows_s)[:, None], guesses_sk], axis=1)
    batch = Batch(tokens_sw.reshape(-1), places_sw.reshape(-1), rows_s, table.pages_sp)
    out = forward(model, batch, state.cache, cfg, ranks)
    choice = choose(logits(model, out.hidden_td), start_s + 1, guesses_sk, rows_s, slots, table, masks)
    right_sk = (choice.tokens_sw[:, :-1] == guesses_sk) & (places_sw[:, 1:] >= 0)
    count_s = jnp.where(places_sw[:, 0] >= 0, 1 + jnp.cumprod(right_sk, axis=1, dtype=jnp.int32).sum(axis=1), 0)
    advanced = advance(slots, rows_s, table, choice.tokens_sw, start_s + 1, count_s)
    state = State(advanced, out.cache, counted(state.load, out.load_le))
    if drafts:
        kept_sw = jnp.arange(width)[None] < count_s[:, None]
        following = batch._replace(
            tokens_t=choice.tokens_sw.reshape(-1), positions_t=jnp.where(kept_sw, places_sw, -1).reshape(-1)
        )
        last = Rows(jnp.arange(len(rows_s)) * width + jnp.maximum(count_s - 1, 0), rows_s)
        idle = _crowded(state.slots, rows_s, gate, ranks) if width == 1 else None
        state = _follow(model, out.hidden_td, following, last, state, table, cfg, drafts, ranks, idle)
    return chosen_of(choice, count_s, state.slots, rows_s, drafts), state


def _pays(slots: Slots, rows_s: Array, gate: Gate, ranks: Ranks | None) -> Bool[Array, ""]:
    """Whether verifying is worth its cost. Ranks must agree without asking each other: they look at the gate alone."""
    if ranks:
        return ~_crowded(slots, rows_s, gate, ranks)
    active_s = _active(slots, rows_s)
    sure_s = active_s & (take(slots.entropy_s, rows_s) <= gate.entropy)
    return ~_crowded(slots, rows_s, gate, ranks) & (2 * sure_s.sum() >= active_s.sum())


def _crowded(slots: Slots, rows_s: Array, gate: Gate, ranks: Ranks | None) -> Bool[Array, ""]:
    """Whether so many answers go on that guesses would not be verified; of ranks, as many as each has rows for."""
    if ranks:
        return rows_s.shape[0] > gate.rows
    return _active(slots, rows_s).sum() > gate.rows


def _active(slots: Slots, rows_s: Array) -> Bool[Array, " s"]:
    """Whether a row's answer goes on."""
    return real(rows_s, slots) & (take(slots.positions_s, rows_s) >= 0)


def _follow(
    model: Model, hidden_td: Array, following: Batch, last: Rows, state: State, table: Table, cfg: Config, drafts: int,
    ranks: Ranks | None, idle: Array | None = None,
) -> State:  # fmt: skip
    """Tells the MTP module which token has followed each place; unless `idle`, it guesses those after the `last`."""
    rows_s, slots, at = last.slots_s, state.slots, cfg.layers

    def guess(cache):
        first = draft(model, model.mtp[0], hidden_td, following, cache, cfg, last, ranks)
        return guess_on(model, first, rows_s, slots, table, cfg, drafts, ranks)

    def only_follow(cache):
        cache = follow(model, model.mtp[0], hidden_td, following, cache, cfg)
        none_sk, load_e = jnp.zeros((len(rows_s), drafts), jnp.int32), jnp.zeros_like(state.load[0, 0])
        return Guesses(cache, none_sk, jnp.full(len(rows_s), jnp.inf), load_e if cfg.experts else None)

    given = state.cache[at]
    made = guess(given) if idle is None else jax.lax.cond(idle, only_follow, guess, given)
    return keep(state, made, rows_s, cfg)


def keep(state: State, made: Guesses, rows_s: Int[Array, " s"], cfg: Config) -> State:
    """The state with the guesses at what some sequences say next, and the module's cache."""
    slots, at = state.slots, cfg.layers
    slots = slots._replace(
        drafts_sk=slots.drafts_sk.at[rows_s].set(made.drafts_sk, mode="drop"),
        entropy_s=slots.entropy_s.at[rows_s].set(made.entropy_s, mode="drop"),
    )
    module = cfg.mixtures - cfg.mtp_layers  # the first is the one that guesses
    load = state.load if made.load_e is None else state.load.at[0, module].add(made.load_e)
    return State(slots, (*state.cache[:at], made.cache, *state.cache[at + 1 :]), load)


def counted(load: Array, load_le: Int[Array, "l e"]) -> Array:
    """The load so far, with that of the model's own layers in one step."""
    layers = load_le.shape[0]
    return load.at[0, :layers].add(load_le) if layers else load


@jax.named_scope("guess")
def guess_on(
    model: Model, first: Draft, rows_s: Int[Array, " s"], slots: Slots, table: Table, cfg: Config, drafts: int,
    ranks: Ranks | None,
) -> Guesses:  # fmt: skip
    """The tokens after the last of each sequence, by the module's account, which has computed the `first`.

    For guesses after it, the module goes on from its own state. A guess is drawn with the noise that the model's
    choice at its place will be drawn with.
    """
    sampling = jax.tree.map(lambda column: take(column, rows_s), table.sampling)
    place_s, made = take(slots.positions_s, rows_s), [first]
    scores, guesses = [], []
    for i in range(drafts):
        if i:
            at_s = places(jnp.where(place_s < 0, -1, place_s + i - 1), take(table.limits_s, rows_s), 1)[:, 0]
            following = Batch(guesses[-1], at_s, rows_s, table.pages_sp)
            made.append(draft(model, model.mtp[0], made[-1].hidden_td, following, made[-1].cache, cfg, None, ranks))
        scores.append(logits(model, made[-1].hidden_td))
        guesses.append(sample(scores[-1], place_s + 1 + i, sampling))
    loads = [each.load_e for each in made if each.load_e is not None]
    load_e = jnp.stack(loads).sum(axis=0) if loads else None
    return Guesses(made[-1].cache, jnp.stack(guesses, axis=1), entropy(scores[0]), load_e)


def chosen_of(choice: Choice, count_s: Array, slots: Slots, rows_s: Array, drafts: int) -> Chosen:
    """The choice, as wide as guesses may make it."""
    missing = 1 + drafts - choice.tokens_sw.shape[1]
    fill = lambda column: jnp.pad(column, ((0, 0), (0, missing), *((0, 0),) * (column.ndim - 2)))  # noqa: E731
    tokens_sw, status_sw, report = jax.tree.map(fill, choice)
    wide = jnp.array(choice.tokens_sw.shape[1] > 1)
    return Chosen(tokens_sw, count_s, status_sw, report, take(slots.drafts_sk, rows_s), wide)


def known_of(
    model: Model, hidden_td: Array, next_t: Int[Array, " t"], tiles: int, reported: Bool[Array, ""]
) -> Logprobs:
    """Log-probabilities of the known next tokens, if wanted; a tile at a time: the scores of all would not fit."""
    t, top = hidden_td.shape[0], min(TOP, model.embed.shape[0])
    each = hidden_td.reshape(tiles, t // tiles, -1), jnp.maximum(next_t, 0).reshape(tiles, t // tiles)

    def compute():
        found = jax.lax.map(lambda tile: logprobs(logits(model, tile[0]), tile[1], top), each)
        return jax.tree.map(lambda column: column.reshape(t, *column.shape[2:]), found)

    return report_if(reported, compute, t, top)
