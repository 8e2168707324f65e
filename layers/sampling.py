"""Choosing tokens from scores, on device.

The random key of a token is a function of its request's seed and of its position alone, so that what is sampled
doesn't depend on what else is in the batch, on how the prompt was cut, or on how often the request was interrupted.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from jaxserve.layers.dims import AnyArray


class Sampling(NamedTuple):
    """How each sequence chooses; one entry a sequence."""

    temperature_s: Float[AnyArray, " s"]  # 0: the most probable token
    top_k_s: Int[AnyArray, " s"]  # 0: no limit
    top_p_s: Float[AnyArray, " s"]
    min_p_s: Float[AnyArray, " s"]
    seed_s: UInt[AnyArray, " s"]


class Logprobs(NamedTuple):
    """Log-probabilities before temperature and filters, of the sampled token and of the most probable ones."""

    sampled_s: Float[Array, " s"]
    rank_s: Int[Array, " s"]  # of the sampled token; 1: none is more probable
    top_sk: Float[Array, "s k"]
    top_ids_sk: Int[Array, "s k"]


def sample(logits_su: Float[Array, "s u"], positions_s: Int[AnyArray, " s"], how: Sampling) -> Int[Array, " s"]:
    """The token of each sequence; `positions_s` are the places that the tokens will have in their sequences.

    Adds Gumbel noise to the logits that the filters keep and takes the largest: a draw from their softmax.
    """
    greedy_s = jnp.argmax(logits_su, axis=-1).astype(jnp.int32)

    def draw():
        hot_s = jnp.where(how.temperature_s > 0, how.temperature_s, 1.0)
        ranked = rank(logits_su / hot_s[:, None])
        noise_su = jax.vmap(_noise, in_axes=(0, 0, None))(how.seed_s, positions_s, logits_su.shape[1])
        noise_su = jnp.take_along_axis(noise_su, ranked.ids_su, axis=-1)
        scores_su = jnp.where(keep(ranked.logits_su, how), ranked.logits_su + noise_su, -jnp.inf)
        best_s = jnp.argmax(scores_su, axis=-1)
        sampled_s = jnp.take_along_axis(ranked.ids_su, best_s[:, None], axis=-1)[:, 0]
        return jnp.where(how.temperature_s > 0, sampled_s, greedy_s)

    return jax.lax.cond(jnp.any(how.temperature_s > 0), draw, lambda: greedy_s)


class Ranked(NamedTuple):
    """Logits in falling order, and the tokens they belong to; of equals the lower token first."""

    logits_su: Float[Array, "s u"]
    ids_su: Int[Array, "s u"]


def rank(logits_su: Float[Array, "s u"]) -> Ranked:
    ids_su = jnp.argsort(logits_su, axis=-1, descending=True, stable=True).astype(jnp.int32)
    return Ranked(jnp.take_along_axis(logits_su, ids_su, axis=-1), ids_su)


def keep(ranked_su: Float[Array, "s u"], how: Sampling) -> Bool[Array, "s u"]:
    """Which of the ranked logits may be drawn: by min-p (arXiv:2407.01082), then top-k, then top-p (arXiv:1904.09751).

    Ties with the k-th token all stay. Top-p keeps the smallest set whose mass reaches p, summed from the tail.
    """
    floor_s = ranked_su[:, 0] + jnp.log(how.min_p_s)  # -inf if off
    likely_su = ranked_su >= floor_s[:, None]
    last_s = jnp.where(how.top_k_s > 0, how.top_k_s, ranked_su.shape[1]) - 1
    kth_s = jnp.take_along_axis(ranked_su, jnp.minimum(last_s, ranked_su.shape[1] - 1)[:, None], axis=-1)
    likely_su &= ranked_su >= kth_s
    mass_su = jax.nn.softmax(jnp.where(likely_su, ranked_su, -jnp.inf), axis=-1)
    tail_su = jax.lax.cumsum(mass_su, axis=1, reverse=True)
    first_u = jnp.arange(ranked_su.shape[1]) == 0
    return likely_su & ((tail_su > 1 - how.top_p_s[:, None]) | (how.top_p_s >= 1)[:, None] | first_u[None])


def _noise(seed: AnyArray, position: AnyArray, vocabulary: int) -> Float[Array, " u"]:
    return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), position), (vocabulary,))


def logprobs(logits_su: Float[Array, "s u"], tokens_s: Int[Array, " s"], count: int) -> Logprobs:
    """Log-probabilities of the sampled tokens and of the `count` most probable."""
    all_su = jax.nn.log_softmax(logits_su, axis=-1)
    sampled_s = jnp.take_along_axis(all_su, tokens_s[:, None], axis=-1)
    top_sk, ids_sk = jax.lax.top_k(all_su, count)
    rank_s = 1 + jnp.sum(all_su > sampled_s, axis=-1)
    return Logprobs(sampled_s[:, 0], rank_s, top_sk, ids_sk)
