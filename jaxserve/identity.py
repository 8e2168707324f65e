"""What engines must have in common to go on with each other's answers, and to use each other's pages."""

import hashlib
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxserve import options as sizes
from jaxserve.layers.config import Config
from jaxserve.options import EngineConfig
from jaxserve.tiers.keys import PageKind


class Identity(NamedTuple):
    """Of an engine's weights and cache."""

    config: str  # a digest, see below
    mtp_layers: int
    weights: str  # of a part of them that all ranks have, and whether they are INT8; or a digest of all
    dtype: str
    kv_cache_dtype: str
    page_size: int
    guesses: bool  # whether pages have what guesses are made from

    @property
    def page_kind(self) -> PageKind:
        """What the bytes of its pages depend on; another backend computes others."""
        model = f"{self.config} with {self.mtp_layers} MTP modules"
        dtype = f"{self.dtype} {self.kv_cache_dtype} on {jax.default_backend()}"
        return PageKind(model, self.weights, dtype, self.page_size)


def identify(cfg: Config, weights: str, dtype: Any, options: EngineConfig) -> Identity:
    """Of an engine by what it is made of; `dtype` is that of activations."""
    name = str(jnp.dtype(dtype))
    guesses = sizes.drafts(cfg, options) > 0
    return Identity(digest(cfg), cfg.mtp_layers, weights, name, options.kv_cache_dtype, options.page_size, guesses)


def digest(cfg: Config) -> str:
    """The same for equal configs. MTP modules don't count: only who has the weights knows whether they are there."""
    return hashlib.sha256(repr(replace(cfg, mtp_layers=0)).encode()).hexdigest()[:16]
