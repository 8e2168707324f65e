"""A model's way to INT8, with text that passes through it: layer by layer, so that one is in memory at a time."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxserve.checkpoints.embedded import corpus
from jaxserve.checkpoints.matrices import sample
from jaxserve.checkpoints.quantize import LayerReport, Parts, quantize_layer, quantize_matrix
from jaxserve.layers.batch import whole
from jaxserve.layers.config import Config
from jaxserve.layers.mtp import joined
from jaxserve.layers.norm import rms_norm
from jaxserve.layers.transformer import Layer, Model, Mtp, cache_params
from jaxserve.parallel.errors import RequestError
from jaxserve.parallel.sharding import zeros

Encode = Callable[[str], Sequence[int]]
"""From a text to its tokens alone."""
Read = Callable[[Callable[[Model], Any]], Any]
"""Gives a part of a model: `read(lambda model: model.layers[3])`."""


class Calibrated(NamedTuple):
    """A layer, or an MTP module, that has become INT8."""

    number: int  # from 0; modules come after the layers
    part: Layer | Mtp
    report: LayerReport
    states_td: Array  # of the text behind it


class Walk(NamedTuple):
    """How far the text has come."""

    done: int  # layers and modules
    states_td: Float[Array, "t d"]


def calibration_text(
    encode: Encode, sequences: int, length: int, documents: Sequence[str] | None = None
) -> Int[np.ndarray, "s t"]:
    """Tokens to calibrate with: of the standard library's modules that are not held out, or of other documents.

    They are one more than the length, so that each has a next one. Documents come in an order by chance, always the
    same. Raises RequestError if they are too short.
    """
    if documents is None:
        documents = [module.text for module in corpus.split(corpus.modules())[0]]
    order, wanted, found = np.random.default_rng(0).permutation(len(documents)), sequences * (length + 1), []
    for i in map(int, order):
        found += encode(documents[i])
        if len(found) >= wanted:
            return np.array(found[:wanted], np.int32).reshape(sequences, length + 1)
    raise RequestError(
        f"the text has {len(found)} tokens, {wanted} are needed; give more text, or ask for fewer or shorter sequences"
    )


def calibrate(
    read: Read, cfg: Config, tokens_st: Int[np.ndarray, "s t"], parts: Parts, begun: Walk | None = None
) -> Iterator[Calibrated]:
    """Makes the layers INT8, one after another, then the MTP modules; each is read when it is its turn.

    What enters a layer is what the float model gives. With `begun`, only those are made that are not done.
    """
    batch, next_t = whole(jnp.asarray(tokens_st[:, :-1])), tokens_st[:, 1:].reshape(-1)
    cache = zeros(cache_params(cfg, tokens_st.shape[0], tokens_st.shape[1] - 1)[0])
    embed = read(lambda model: model.embed)
    done, states_td = begun or Walk(0, embed[batch.tokens_t])
    for number in range(done, cfg.layers + cfg.mtp_layers):
        if number < cfg.layers:
            layer = read(lambda model, i=number: model.layers[i])
            found = sample(layer, states_td, batch, cache, cfg)
            part, report = quantize_layer(layer, found, cfg, parts)
        else:
            before = number - cfg.layers
            mtp = read(lambda model, i=before: model.mtp[i])
            gain = read(lambda model, i=before: model.mtp[i - 1].norm if i else model.norm)
            x_tz = joined(mtp, embed[next_t], rms_norm(states_td, gain, cfg.norm_eps), cfg)
            found = sample(mtp.layer, x_tz @ mtp.w_join.T, batch, cache, cfg)
            layer, report = quantize_layer(mtp.layer, found, cfg, parts)
            w_join, steps = quantize_matrix(mtp.w_join, x_tz, parts)
            part, report = (
                mtp._replace(layer=layer, w_join=w_join),
                report._replace(steps={"join": steps, **report.steps}),
            )
        states_td = found.after_td
        yield Calibrated(number, part, report, states_td)


def calibrate_model(
    model: Model, cfg: Config, tokens_st: Int[np.ndarray, "s t"], parts: Parts
) -> tuple[Model, list[LayerReport]]:
    """A model in memory as INT8, and how its layers became it."""
    done = list(calibrate(lambda select: select(model), cfg, tokens_st, parts))
    found = tuple(each.part for each in done)
    return model._replace(layers=found[: cfg.layers], mtp=found[cfg.layers :]), [each.report for each in done]
