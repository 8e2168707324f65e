"""What an engine keeps on each device, known before anything is there."""

from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from jaxserve.describe import human
from jaxserve.layers.config import Config
from jaxserve.layers.transformer import Model
from jaxserve.options import EngineConfig
from jaxserve.parallel.errors import RequestError, ShardingError
from jaxserve.parallel.sharding import local_bytes
from jaxserve.tracing import Described, describe


class Footprint(NamedTuple):
    """Bytes of a device, without what a step needs while it runs."""

    weights: int
    cache: int
    slots: int  # what is known of each sequence

    @property
    def total(self) -> int:
        return sum(self)


def footprint(engine: Described) -> Footprint:
    """What a described engine would keep."""
    state = engine.state
    return Footprint(local_bytes(engine.model), local_bytes(state.cache), local_bytes((state.slots, state.load)))


def check_room(cfg: Config, options: EngineConfig, dtype: Any, mesh: Mesh | None, params: Model | None = None) -> None:
    """Raises before anything is loaded if it can't fit: ShardingError for weights, RequestError for cache and state.

    `params` describe the weights, by default in floats.
    """
    need, limit = footprint(describe(cfg, options, dtype, mesh, params)), device_bytes(mesh)
    if limit is None or need.total <= limit:
        return
    found = (
        f"each device needs {human(need.total)} ({human(need.weights)} for weights, {human(need.cache)} for the "
        f"cache, {human(need.slots)} for what is known of sequences) and has {human(limit)}"
    )
    larger = "a larger mesh, over which the experts are spread" if cfg.experts else "a device with more memory"
    if need.weights > limit:
        raise ShardingError(
            f"{found}: the weights alone do not fit. Take {larger}, a dtype of fewer bits, or quantization='int8'"
        )
    raise RequestError(f"{found}. Lower max_num_seqs, num_pages or cache_bytes, or take {larger}")


def device_bytes(mesh: Mesh | None) -> int | None:
    """What a device can hold, the least of those here; None if its backend doesn't say."""
    devices = mesh.local_devices if mesh else jax.local_devices()[:1]
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
    return min((limit for limit in limits if limit is not None), default=None)
