"""What an array is before it exists, and where its parts belong on a mesh.

One tree of `Param` describes a model's weights; initial values, abstract arrays, shardings, imported files and
memory accounts are each a `jax.tree.map` over it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jaxserve.parallel.errors import ShardingError
from jaxserve.parallel.mesh import AXES, AnyMesh
from jaxserve.parallel.qarray import QArray

Rules = Mapping[str, str | tuple[str, ...]]
"""Mesh axes of each logical axis (a letter of `layers.dims`); an axis that is absent is replicated."""

DECODE: Rules = {"x": AXES, "s": AXES, "p": AXES}
"""Each rank has experts, and sequences of its own with their pages (arXiv:2506.12708, section 5.1: DP and EP)."""

PREFILL: Rules = {**DECODE, "h": AXES}
"""For ranks that prefill alone: each also has some heads, for the tokens of all (section 4.3.1: SP, TP, SP)."""


CODES_STD = 32.0
"""Of the codes of random INT8 weights: nearly all are within 127."""


@dataclass(frozen=True)
class Param:
    """A weight that does not exist yet: a leaf, so that trees of it map to trees of arrays, shardings or files."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]  # one letter of `layers.dims` an axis; None: never split
    dtype: Any = jnp.float32
    mean: float = 0.0  # of the initial values
    std: float = 0.0

    def __post_init__(self):
        if len(self.axes) != len(self.shape):
            raise ShardingError(
                f"shape {self.shape} has {len(self.shape)} axes, axes {self.axes} name {len(self.axes)}"
            )

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * jnp.dtype(self.dtype).itemsize


def named_sharding(name: str, param: Param, mesh: AnyMesh, rules: Rules) -> NamedSharding:
    """Where the parts of `param` belong; raises ShardingError, with `name`, if an axis does not divide."""
    spec = [rules.get(axis) if axis else None for axis in param.axes]
    used = [m for entry in spec if entry for m in ((entry,) if isinstance(entry, str) else entry)]
    if len(used) != len(set(used)):
        raise ShardingError(f"{name}: axes {param.axes} use a mesh axis twice: {spec}")
    unknown = [m for m in used if m not in mesh.shape]
    if unknown:
        raise ShardingError(f"{name}: the rules name mesh axis {unknown[0]!r}; the mesh has {tuple(mesh.shape)}")
    for axis, size, entry in zip(param.axes, param.shape, spec, strict=True):
        parts = math.prod(mesh.shape[m] for m in ((entry,) if isinstance(entry, str) else entry or ()))
        if size % parts:
            raise ShardingError(
                f"{name}: axis {axis!r} of size {size} does not divide over the {parts} devices of {entry}"
            )
    return NamedSharding(mesh, PartitionSpec(*spec))


def shardings(params: Any, mesh: AnyMesh, rules: Rules) -> Any:
    """The tree of shardings of a tree of `Param`."""
    return jax.tree.map_with_path(lambda path, p: named_sharding(jax.tree_util.keystr(path), p, mesh, rules), params)


def abstract(params: Any, placement: Any = None) -> Any:
    """The tree of `jax.ShapeDtypeStruct` of a tree of `Param`, with shardings if `placement` has them."""
    if placement is None:
        return jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    return jax.tree.map(lambda p, s: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=s), params, placement)


def zeros(params: Any) -> Any:
    """The tree of arrays of zeros of a tree of `Param`."""
    return jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), params)


def place(tree: Any, placement: Any) -> Any:
    """Arrays that this process has, where their parts belong. On a mesh of many processes each has all of them."""

    def one(array: Any, sharding: Sharding) -> jax.Array:
        if sharding.is_fully_addressable:
            return jax.device_put(array, sharding)
        if isinstance(array, jax.Array) and array.sharding == sharding:
            return array
        host = np.asarray(array)
        return jax.make_array_from_callback(host.shape, sharding, lambda part: host[part])

    return jax.tree.map(one, tree, placement)


def unsplit(params: Any, axis: str) -> Any:
    """The tree of `Param`, of which no rule splits this axis."""
    whole = lambda axes: tuple(None if each == axis else each for each in axes)  # noqa: E731
    return jax.tree.map(lambda p: replace(p, axes=whole(p.axes)), params)


def quantized(param: Param, scales: tuple[int, ...] | None = None) -> QArray:
    """A weight as INT8, with so many scales along each axis; without a number, one for each row of the last axis.

    The rules that place the weight place both: codes are split as it was, and scales with them. Where an axis has one
    scale for all, every part has that. Initial values are spread like those of the weight.
    """
    scales = scales or (*param.shape[:-1], 1)
    axes = tuple(None if count == 1 else axis for axis, count in zip(param.axes, scales, strict=True))
    codes = Param(param.shape, param.axes, jnp.int8, std=CODES_STD)
    return QArray(codes, Param(scales, axes, jnp.float32, mean=param.std / CODES_STD))


def bytes_per_device(params: Any, mesh: AnyMesh | None, rules: Rules) -> int:
    """What a tree of `Param` takes on each device of a mesh, or on the only one; nothing is allocated for it."""
    return local_bytes(abstract(params, None if mesh is None else shardings(params, mesh, rules)))


def local_bytes(arrays: Any) -> int:
    """What a tree of arrays, or of abstract ones, takes on each device."""
    return sum(math.prod(_local_shape(leaf)) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(arrays))


def _local_shape(array: Any) -> tuple[int, ...]:
    return array.sharding.shard_shape(array.shape) if array.sharding else array.shape


def initialize(params: Any, key: jax.Array) -> Any:
    """The tree of random arrays of a tree of `Param`: normal with its mean and standard deviation, INT8 rounded."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    return tree.unflatten(_draw(p, k) for p, k in zip(leaves, keys, strict=True))


def _draw(param: Param, key: jax.Array) -> jax.Array:
    if param.std == 0.0:
        return jnp.full(param.shape, param.mean, param.dtype)
    drawn = param.mean + param.std * jax.random.normal(key, param.shape)
    if jnp.issubdtype(param.dtype, jnp.integer):
        drawn = jnp.clip(jnp.round(drawn), -127, 127)
    return drawn.astype(param.dtype)
