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

FEW = 128
"""Most probable tokens that the filters look at first: to sort a vocabulary takes CPUs longer than a small model."""


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
    greedy_s = argmax(scores_su)
    drawn_s = how.temperature_s >= COLDEST

    def draw():
        hot_s = jnp.where(drawn_s, how.temperature_s, 1.0)
        logits_su = (scores_su - scores_su.max(axis=-1, keepdims=True)) / hot_s[:, None]
        noise_su = jax.vmap(_noise, in_axes=(0, 0, None))(how.seed_s, positions_s, scores_su.shape[1])
        kept_su = logits_su >= least(logits_su, how)[:, None]
        sampled_s = argmax(jnp.where(kept_su, logits_su + noise_su, -jnp.inf))
        return jnp.where(drawn_s, sampled_s, greedy_s)

    return jax.lax.cond(jnp.any(drawn_s), draw, lambda: greedy_s)


def argmax(scores_su: Float[Array, "s u"]) -> Int[Array, " s"]:
    """The first place where each row is largest, in two passes that XLA vectorizes; of `jnp.argmax` it makes a loop."""
    u = scores_su.shape[1]
    is_largest_su = scores_su == scores_su.max(axis=-1, keepdims=True)
    return jnp.where(is_largest_su, jnp.arange(u, dtype=jnp.int32), u - 1).min(axis=-1)


def least(logits_su: Float[Array, "s u"], how: Sampling) -> Float[Array, " s"]:
    """The smallest logit that may be drawn, of logits whose largest is 0; -inf without filters.

    By min-p (arXiv:2407.01082), then top-k, then top-p (arXiv:1904.09751): the fewest most probable tokens whose mass
    reaches p. Tokens as probable as the last of them stay too.

    A few of the most probable tokens decide that nearly always; a row for which they don't is sorted as a whole. What
    a row gets depends on nothing but the row.
    """
    vocabulary = logits_su.shape[1]
    few_sk, _ = jax.lax.top_k(logits_su, min(FEW, vocabulary))
    least_s, sure_s = _least_among(few_sk, logits_su, how)
    sure_s |= how.temperature_s < COLDEST

    def of_all():
        all_s, _ = _least_among(jnp.sort(logits_su, axis=-1, descending=True), logits_su, how)
        return jnp.where(sure_s, least_s, all_s)

    return jax.lax.cond(sure_s.all(), lambda: least_s, of_all)


def _least_among(top_sk: Array, logits_su: Array, how: Sampling) -> tuple[Array, Array]:
    """The smallest of the `k` largest logits that may be drawn, `[s]`, and whether none outside may be, `[s]`."""
    count, vocabulary = top_sk.shape[1], logits_su.shape[1]
    limit_s = jnp.where(how.top_k_s < vocabulary, how.top_k_s, 0)
    kth_s = jnp.take_along_axis(top_sk, jnp.clip(limit_s - 1, 0, count - 1)[:, None], axis=-1)[:, 0]
    floor_s = jnp.maximum(jnp.log(how.min_p_s), jnp.where(limit_s > 0, kth_s, -jnp.inf))
    mass_su, mass_sk = (jnp.exp(jnp.where(x >= floor_s[:, None], x, -jnp.inf)) for x in (logits_su, top_sk))
    before_sk = jnp.pad(jnp.cumsum(mass_sk, axis=-1), ((0, 0), (1, 0)))[:, :-1]
    kept_s = ((before_sk < how.top_p_s[:, None] * mass_su.sum(axis=-1, keepdims=True)) & (mass_sk > 0)).sum(axis=-1)
    last_s = jnp.take_along_axis(top_sk, jnp.maximum(kept_s - 1, 0)[:, None], axis=-1)[:, 0]
    unlimited_s = how.top_p_s >= 1
    sure_s = (limit_s <= count) & (unlimited_s | (kept_s < count))
    return jnp.where(unlimited_s, floor_s, last_s), sure_s


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
    below_su = scores_su - scores_su.max(axis=-1, keepdims=True)
    mass_su = jnp.exp(below_su)
    total_s = mass_su.sum(axis=-1)
    return jnp.log(total_s) - (mass_su * below_su).sum(axis=-1) / total_s
