"""What engines must have in common to go on with each other's answers."""

import hashlib
from typing import NamedTuple

from jaxserve.layers.config import Config


class Identity(NamedTuple):
    """Of an engine's weights and cache."""

    config: str  # a digest
    weights: str  # of a part of them that all ranks have, and whether they are INT8
    dtype: str
    kv_cache_dtype: str
    page_size: int


def digest(cfg: Config) -> str:
    """The same for equal configs."""
    return hashlib.sha256(repr(cfg).encode()).hexdigest()[:16]
