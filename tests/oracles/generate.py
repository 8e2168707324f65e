"""The engine's oracle: one sequence at a time, everything computed again for every token, no cache, NumPy float64.

It shares no code with jaxserve. What both take from elsewhere is the noise of a draw: `jax.random.gumbel` with the key
of the seed folded with the token's place, which is the definition of what a seeded request gives.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from tests.oracles.reference import kept_set, logits, softmax

Params = Mapping[str, Any]


def generate(config: Mapping[str, Any], weights: Mapping[str, np.ndarray], prompt: Sequence[int], **params: Any):
    """The tokens that follow a prompt; `params` are named as in `SamplingParams`. Ends after an end token."""
    tokens, ends = list(prompt), set(params.get("ends", ()))
    for count in range(params["max_tokens"]):
        scores = logits(config, weights, tokens)[-1]
        banned = ends if count < params.get("min_tokens", 0) else set()
        tokens.append(choose(scores, tokens[len(prompt) :], prompt, len(tokens), banned, params))
        if tokens[-1] in ends:
            break
    return tokens[len(prompt) :]


def choose(
    scores: np.ndarray,
    said: Sequence[int],
    prompt: Sequence[int],
    place: int,
    banned: set[int],
    params: Params,
) -> int:
    """The token for a place, from the model's scores."""
    scores = allowed(scores, said, banned, params)
    scores = penalized(scores, said, prompt, params)
    temperature = params.get("temperature", 1.0)
    if temperature == 0:
        return int(np.argmax(scores))
    kept = kept_set(
        scores, temperature, params.get("top_k") or len(scores), params.get("top_p", 1.0), params.get("min_p", 0.0)
    )
    key = jax.random.fold_in(jax.random.key(params["seed"]), place)
    noise = np.asarray(jax.random.gumbel(key, scores.shape), np.float64)
    return max(kept, key=lambda token: (scores[token] / temperature + noise[token], -token))


def allowed(scores: np.ndarray, said: Sequence[int], banned: set[int], params: Params) -> np.ndarray:
    """Bias, and -inf for what may not be said."""
    scores = scores.copy()
    only = params.get("allowed_token_ids")
    if only is not None:
        scores[~np.isin(np.arange(len(scores)), only)] = -np.inf
    for token, bias in (params.get("logit_bias") or {}).items():
        scores[token] += bias
    for *before, last in params.get("bad_runs", ()):
        if list(said[len(said) - len(before) :]) == before:
            scores[last] = -np.inf
    scores[list(banned)] = -np.inf
    return scores


def penalized(scores: np.ndarray, said: Sequence[int], prompt: Sequence[int], params: Params) -> np.ndarray:
    """Repetition for tokens of prompt and answer (arXiv:1909.05858), then OpenAI's two for tokens of the answer."""
    scores = scores.copy()
    for token in {*said, *prompt}:
        factor = params.get("repetition_penalty", 1.0)
        scores[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
    for token in set(said):
        scores[token] -= params.get("presence_penalty", 0.0)
        scores[token] -= params.get("frequency_penalty", 0.0) * list(said).count(token)
    return scores


def logprob(scores: np.ndarray, token: int) -> float:
    """Of the model's own scores."""
    return float(np.log(softmax(scores)[token]))
