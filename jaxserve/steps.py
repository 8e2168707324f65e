"""The two programs the device runs: prefill of a chunk of one prompt, and one token for every running sequence.

Both are pure, of static shape, and DONATE the cache.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxserve.layers.batch import Batch
from jaxserve.layers.config import Config
from jaxserve.layers.dims import AnyArray
from jaxserve.layers.sampling import Logprobs, Sampling, logprobs, sample
from jaxserve.layers.transformer import Model, forward, logits


class Rows(NamedTuple):
    """The sequences of a decode step, on the host or the device. A row without a sequence has position -1."""

    tokens_s: Int[AnyArray, " s"]  # the last token of each: it is not in the cache yet
    positions_s: Int[AnyArray, " s"]  # its place
    pages_sp: Int[AnyArray, "s p"]
    sampling: Sampling
    ends_sk: Int[AnyArray, "s k"]  # tokens that end the answer, -1 for none
    first_end_s: Int[AnyArray, " s"]  # the first position at which one of them may stand


class Chosen(NamedTuple):
    """The next token of each sequence."""

    tokens_s: Int[Array, " s"]
    logprobs: Logprobs | None
    finite_s: Bool[Array, " s"]  # whether the model's scores were numbers


@partial(jax.jit, static_argnames=("cfg", "top"), donate_argnames="cache")
def prefill(
    model: Model, chunk: Batch, last: Int[Array, ""], rows: Rows, cache: Any, *, cfg: Config, top: int | None
) -> tuple[Chosen, Any]:
    """Puts a chunk of one prompt into the cache; chooses the token after its row `last`, as `rows` (of one) says."""
    out = forward(model, chunk, cache, cfg)
    scores_su = logits(model, jax.lax.dynamic_slice_in_dim(out.hidden_td, last, 1))
    return choose(scores_su, rows, top), out.cache


@partial(jax.jit, static_argnames=("cfg", "top"), donate_argnames="cache")
def decode(model: Model, rows: Rows, cache: Any, *, cfg: Config, top: int | None) -> tuple[Chosen, Any]:
    """Computes each sequence's last token, and chooses the next."""
    slots_s = jnp.arange(rows.tokens_s.shape[0])
    out = forward(model, Batch(rows.tokens_s, rows.positions_s, slots_s, rows.pages_sp), cache, cfg)
    return choose(logits(model, out.hidden_td), rows, top), out.cache


def choose(scores_su: Array, rows: Rows, top: int | None) -> Chosen:
    """Samples a token for the position after each row's."""
    next_s = rows.positions_s + 1
    allowed_su = _without_early_ends(scores_su, next_s, rows)
    tokens_s = sample(allowed_su, next_s, rows.sampling)
    found = None if top is None else logprobs(scores_su, tokens_s, top)
    return Chosen(tokens_s, found, jnp.isfinite(scores_su).all(axis=-1))


def _without_early_ends(scores_su: Array, next_s: AnyArray, rows: Rows) -> Array:
    """-inf for tokens that would end an answer before its `min_tokens`."""
    s, u = scores_su.shape
    early_sk = jnp.where((next_s < rows.first_end_s)[:, None] & (rows.ends_sk >= 0), rows.ends_sk, u)
    return scores_su.at[jnp.arange(s)[:, None], early_sk].set(-jnp.inf, mode="drop")
