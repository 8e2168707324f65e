"""A layer that text has passed through, for tests of what is made of it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.checkpoints.folding import pairs, rescale
from jaxserve.checkpoints.matrices import Sample, sample
from jaxserve.layers.batch import whole
from jaxserve.layers.config import Config
from jaxserve.layers.transformer import Layer
from tests.layers.helpers import empty_cache, normal, random_model

SEQUENCES, LENGTH = 4, 16
ROWS = 24


class Passed(NamedTuple):
    """The last layer of a tiny model: of those with experts, a mixture."""

    cfg: Config
    layer: Layer
    found: Sample


def passed(family: str, seed: int = 0) -> Passed:
    """A random layer and random states."""
    cfg, rng = Config.tiny(family), np.random.default_rng(seed)
    layer = random_model(cfg, rng).layers[-1]
    return through(cfg, layer, normal(rng, SEQUENCES * LENGTH, cfg.width))


def through(cfg: Config, layer: Layer, states_td: jax.Array) -> Passed:
    """A layer and these states."""
    batch = whole(jnp.zeros((SEQUENCES, LENGTH), jnp.int32))
    return Passed(cfg, layer, sample(layer, states_td, batch, empty_cache(cfg, SEQUENCES, LENGTH)[0], cfg))


def planted(p: Passed, factor: float = 60.0, channels: int = 3) -> Passed:
    """The same layer in float, but some channels of what its norms give are larger, and what reads them is smaller."""
    layer, rng = p.layer, np.random.default_rng(1)
    for pair in (pair for block in ("attn", "ffn") for pair in pairs(layer, block) if pair.is_gain):
        gain = layer.attn.q_norm if pair.source == "attn.q_norm" else getattr(layer, pair.source)
        scale = np.ones((1, len(gain)), np.float32)
        scale[0, rng.choice(len(gain), channels, replace=False)] = 1 / factor
        layer = rescale(layer, pair, jnp.asarray(scale))
    return through(p.cfg, layer, p.found.states_td)
