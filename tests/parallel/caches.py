"""Caches of random bytes, as an engine has them: a layer's latents and keys, `[p, b, …]`, on one device or a mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from jaxserve.parallel.devices import Devices
from jaxserve.parallel.mesh import AXES
from jaxserve.parallel.qarray import QArray

PAGES = 6
"""Of a rank."""

KINDS = ["float32", "bfloat16", "int8"]


def mesh_of(ranks: int, first: int = 0) -> Mesh:
    """Some of the emulated devices, from this one on, as two nodes if that divides."""
    nodes = 2 if ranks > 1 else 1
    grid = np.array(jax.devices()[first : first + ranks]).reshape(nodes, -1)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto, AxisType.Auto))


def host_cache(kind: str, ranks: int, seed: int, pages: int = PAGES) -> Any:
    """Two layers of latents and keys; of `int8`, latents have a scale a token and keys 16 bits."""
    rng = np.random.default_rng(seed)

    def one(width: int, dtype: Any) -> np.ndarray:
        if dtype == np.int8:
            return rng.integers(-127, 128, (ranks * pages, 4, width), dtype=np.int8)
        return rng.normal(size=(ranks * pages, 4, width)).astype(dtype)

    def layer() -> tuple[Any, np.ndarray]:
        if kind == "int8":
            return QArray(one(24, np.int8), one(1, np.float32)), one(8, jnp.bfloat16)
        return one(24, jnp.dtype(kind)), one(8, jnp.dtype(kind))

    return [layer(), layer()]


def on_devices(cache: Any, devices: Devices) -> Any:
    """The cache where an engine has it."""
    return devices.split(cache)
