"""Choosing tokens from scores, on device.

The random key of a token is a function of its request's seed and of its position alone, so that what is sampled
doesn't depend on what else is in the batch, on how the prompt was cut, or on how often the request was interrupted.

The order is vLLM's: what may be chosen at all, bias, penalties, temperature, min-p, top-k, top-p.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

COLDEST = 1e-5
"""Below this temperature the most probable token is taken: float32 could not tell the others apart."""


class Sampling(NamedTuple):
    """How each row of scores chooses."""

    temperature_s: Float[Array, " s"]  # below COLDEST: the most probable token
    top_k_s: Int[Array, " s"]  # 0: no limit
    top_p_s: Float[Array, " s"]
    min_p_s: Float[Array, " s"]
    seed_s: UInt[Array, " s"]
    repetition_s: Float[Array, " s"]  # 1: off
    presence_s: Float[Array, " s"]
    frequency_s: Float[Array, " s"]


class Logprobs(NamedTuple):
    """Log-probabilities of the model's own scores, of the chosen token and of the most probable ones."""

    chosen_s: Float[Array, " s"]
    rank_s: Int[Array, " s"]  # of the chosen token; 1: none is more probable
    top_sk: Float[Array, "s k"]
    top_ids_sk: Int[Array, "s k"]


def forbid(scores_su: Float[Array, "s u"], ids_sk: Int[Array, "s k"]) -> Float[Array, "s u"]:
    """-inf for some tokens of each row; -1 stands for none."""
    s, u = scores_su.shape
    return scores_su.at[jnp.arange(s)[:, None], jnp.where(ids_sk < 0, u, ids_sk)].set(-jnp.inf, mode="drop")


def allow(scores_su: Float[Array, "s u"], bits: Array) -> Float[Array, "s u"]:
    """-inf for tokens whose bit is 0. `bits` is uint32[s, words]; bit i of word j is that of token 32 j + i."""
    u = jnp.arange(scores_su.shape[1])
    words_su = jnp.take(bits, u // 32, axis=1)
    allowed_su = (words_su >> (u % 32).astype(jnp.uint32)[None]) & jnp.uint32(1)
    return jnp.where(allowed_su == 1, scores_su, -jnp.inf)


def penalize(
    scores_su: Float[Array, "s u"], counts_su: Int[Array, "s u"], prompt_su: Bool[Array, "s u"], how: Sampling
) -> Float[Array, "s u"]:
    """Lowers the scores of tokens that the answer has `counts_su` times, or that the prompt has.

    Repetition (arXiv:1909.05858, section 4.1, as vLLM and transformers apply it) is for tokens of prompt and answer;
    frequency and presence (OpenAI's) for tokens of the answer.
    """
    said_su = counts_su > 0
    factor_su = jnp.where(said_su | prompt_su, how.repetition_s[:, None], 1.0)
    scores_su = jnp.where(scores_su > 0, scores_su / factor_su, scores_su * factor_su)
    scores_su = scores_su - how.frequency_s[:, None] * counts_su.astype(jnp.float32)
    return scores_su - how.presence_s[:, None] * said_su.astype(jnp.float32)


def sample(scores_su: Float[Array, "s u"], positions_s: Int[Array, " s"], how: Sampling) -> Int[Array, " s"]:
    """The token of each row; `positions_s` are the places that the tokens will have in their sequences.

    Adds Gumbel noise to the logits that the filters keep and takes the largest: a draw from their softmax.
    """
    greedy_s = jnp.argmax(scores_su, axis=-1).astype(jnp.int32)
    drawn_s = how.temperature_s >= COLDEST

    def draw():
        ranked = rank(scores_su)
        hot_s = jnp.where(drawn_s, how.temperature_s, 1.0)
        logits_su = (ranked.scores_su - ranked.scores_su[:, :1]) / hot_s[:, None]
        noise_su = jax.vmap(_noise, in_axes=(0, 0, None))(how.seed_s, positions_s, scores_su.shape[1])
        noise_su = jnp.take_along_axis(noise_su, ranked.ids_su, axis=-1)
        best_s = jnp.argmax(jnp.where(keep(logits_su, how), logits_su + noise_su, -jnp.inf), axis=-1)
        sampled_s = jnp.take_along_axis(ranked.ids_su, best_s[:, None], axis=-1)[:, 0]
        return jnp.where(drawn_s, sampled_s, greedy_s)

    return jax.lax.cond(jnp.any(drawn_s), draw, lambda: greedy_s)


class Ranked(NamedTuple):
    """Scores in falling order, and the tokens they belong to; of equals the lower token first."""

    scores_su: Float[Array, "s u"]
    ids_su: Int[Array, "s u"]


def rank(scores_su: Float[Array, "s u"]) -> Ranked:
    ids_su = jnp.argsort(scores_su, axis=-1, descending=True, stable=True).astype(jnp.int32)
    return Ranked(jnp.take_along_axis(scores_su, ids_su, axis=-1), ids_su)


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


def _noise(seed: Array, position: Array, vocabulary: int) -> Float[Array, " u"]:
    return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), position), (vocabulary,))


def logprobs(scores_su: Float[Array, "s u"], tokens_s: Int[Array, " s"], count: int) -> Logprobs:
    """Log-probabilities of the chosen tokens and of the `count` most probable."""
    all_su = jax.nn.log_softmax(scores_su, axis=-1)
    chosen_s = jnp.take_along_axis(all_su, tokens_s[:, None], axis=-1)
    top_sk, ids_sk = jax.lax.top_k(all_su, count)
    rank_s = 1 + jnp.sum(all_su > chosen_s, axis=-1, dtype=jnp.int32)
    return Logprobs(chosen_s[:, 0], rank_s, top_sk, ids_sk.astype(jnp.int32))


def entropy(scores_su: Float[Array, "s u"]) -> Float[Array, " s"]:
    """Of each row's softmax, in nats."""
    log_su = jax.nn.log_softmax(scores_su, axis=-1)
    return -jnp.sum(jnp.exp(log_su) * log_su, axis=-1)
