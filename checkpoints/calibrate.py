"""A model's way to INT8, with text that passes through it: layer by layer, so that one is in memory at a time."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxserve.checkpoints.embedded import corpus
from jaxserve.checkpoints.matrices import Sample, sample
from jaxserve.checkpoints.quantize import LayerReport, Parts, quantize_layer, quantize_matrix
from jaxserve.layers.batch import whole
from jaxserve.layers.config import Config
from jaxserve.layers.mtp import joined
from jaxserve.layers.norm import rms_norm
from jaxserve.layers.transformer import Layer, Model, Mtp, cache_params
from jaxserve.parallel.errors import ConfigError, RequestError
from jaxserve.parallel.qarray import QArray
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

    Documents give a piece each, from a place by chance that is always the same, and then another, until there are
    enough; what is too short is joined with the next. Pieces are one token longer than the length, so that each has a
    next one. Raises RequestError if there is too little text.
    """
    if documents is None:
        documents = [module.text for module in corpus.split(corpus.modules())[0]]
    rng, size, found, turned = np.random.default_rng(0), length + 1, [], {}
    order = [int(i) for i in rng.permutation(len(documents))]
    for start in itertools.count(0, size):
        known = len(found)
        for i in order:
            if i not in turned:
                ids = list(encode(documents[i]))
                place = int(rng.integers(max(1, len(ids) - length)))
                turned[i] = ids[place:] + ids[:place]
            found += turned[i][start : start + size]
            if len(found) >= sequences * size:
                return np.array(found[: sequences * size], np.int32).reshape(sequences, size)
        if len(found) == known:
            break
    raise RequestError(
        f"the text has {len(found)} tokens, {sequences * size} are needed; give more text, or ask for fewer or shorter "
        "sequences"
    )


def calibrate(
    read: Read, cfg: Config, tokens_st: Int[np.ndarray, "s t"], parts: Parts, begun: Walk | None = None
) -> Iterator[Calibrated]:
    """Makes the layers INT8, one after another, then the MTP modules; each is read when it is its turn.

    What enters a layer is what the float model gives. With `begun`, only those are made that are not done.
    Raises ConfigError for several MTP modules: each would need tokens further ahead.
    """
    if cfg.mtp_layers > 1:
        raise ConfigError(f"the model has {cfg.mtp_layers} MTP modules; with more than one it can't be calibrated")
    batch = whole(jnp.asarray(tokens_st[:, :-1]))
    cache = zeros(cache_params(cfg, tokens_st.shape[0], tokens_st.shape[1] - 1)[0])
    embed = read(lambda model: model.embed)
    done, states_td = begun or Walk(0, embed[batch.tokens_t])
    for number in range(done, cfg.layers):
        found = sample(p := read(lambda model, i=number: model.layers[i]), states_td, batch, cache, cfg)
        layer, report = quantize_layer(p, found, cfg, parts)
        states_td = found.after_td
        yield Calibrated(number, layer, report, states_td)
    if cfg.mtp_layers and done <= cfg.layers:
        hidden_td = rms_norm(states_td, read(lambda model: model.norm), cfg.norm_eps)
        mtp = read(lambda model: model.mtp[0])
        x_tz = joined(mtp, embed[tokens_st[:, 1:].reshape(-1)], hidden_td, cfg)
        found = sample(mtp.layer, x_tz @ mtp.w_join.T, batch, cache, cfg)
        yield Calibrated(cfg.layers, *_quantize_module(mtp, x_tz, found, cfg, parts), found.after_td)


def _quantize_module(
    mtp: Mtp, x_tz: Float[Array, "t z"], found: Sample, cfg: Config, parts: Parts
) -> tuple[Mtp, LayerReport]:
    """An MTP module: the matrix that joins its inputs, and its layer."""
    layer, report = quantize_layer(mtp.layer, found, cfg, parts)
    w_join, steps = quantize_matrix(mtp.w_join, x_tz, parts)
    kept = report.kept if isinstance(w_join, QArray) else (*report.kept, "join.w_join")
    return mtp._replace(layer=layer, w_join=w_join), report._replace(steps={"join": steps, **report.steps}, kept=kept)


def calibrate_model(
    model: Model, cfg: Config, tokens_st: Int[np.ndarray, "s t"], parts: Parts
) -> tuple[Model, list[LayerReport]]:
    """A model in memory as INT8, and how its layers became it."""
    done = list(calibrate(lambda select: select(model), cfg, tokens_st, parts))
    found = tuple(each.part for each in done)
    return model._replace(layers=found[: cfg.layers], mtp=found[cfg.layers :]), [each.report for each in done]
