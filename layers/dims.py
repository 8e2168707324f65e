"""The dimensions of the model: one letter each, the same in annotations, einsum strings and variable suffixes.

q_thn: Float[Array, "t h n"]      jnp.einsum("thn,jhn->thj", q_thn, k_jhn)
"""

from typing import Any

import jax
import numpy as np

AnyArray = np.ndarray | jax.Array
"""On the host or on the device: what a step is given."""

Leaf = Any
"""A weight: `jax.Array`, or whatever a tree of the same structure holds (a `Param`, a sharding, a slice of a file).

`Any`, because trees of parameters are mapped to trees of other things; shapes are checked where a leaf is used.
"""

DIMS = {
    "t": "tokens of a step, flat over sequences",
    "a": "attention tiles of a step: runs of tokens of one sequence, t = a * w",
    "w": "tokens in a tile",
    "s": "sequences (slots)",
    "j": "cached tokens attended to",
    "d": "model width",
    "h": "query heads",
    "g": "key/value heads of grouped-query attention",
    "y": "query heads that share a key/value head, h = g * y",
    "n": "width of a head's part that is not rotated",
    "r": "width of a head's part that is rotated: of grouped-query attention, the whole head",
    "v": "width of a head's value",
    "z": "two widths joined: n + r or c + r of a query or key, 2 d of an MTP module's input",
    "c": "latent width of key and value",
    "q": "latent width of the query",
    "e": "experts, as the router numbers them",
    "x": "physical expert slots",
    "k": "experts chosen per token",
    "m": "replicas of an expert",
    "i": "rows of an exchange's buffer: tokens of all ranks, for one's experts",
    "f": "feed-forward width",
    "p": "pages",
    "b": "tokens per page",
    "l": "layers",
    "u": "vocabulary",
}
