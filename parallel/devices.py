"""Between the host and the devices: what a step is given, and what it gives."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxserve.parallel.errors import ShardingError
from jaxserve.parallel.mesh import AXES, AnyMesh

ALIGNED = 64
"""Bytes at multiples of which XLA:CPU takes arrays as they lie; others it copies, which a step would wait for."""


def empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An array of the host, of any content, that a CPU device takes without a copy."""
    nbytes = math.prod(shape) * dtype.itemsize
    room = np.empty(nbytes + ALIGNED, np.uint8)
    begin = -room.ctypes.data % ALIGNED
    return room[begin : begin + nbytes].view(dtype).reshape(shape)


class Devices:
    """Where the arrays of a step go: to one device, or over the ranks of a mesh.

    Of a mesh that processes share, each process says what is its own ranks', which follow one another, and what is the
    same for all. On a mesh without devices arrays are only described, as `jax.ShapeDtypeStruct`.
    """

    def __init__(self, mesh: AnyMesh | None = None):
        """Raises ShardingError if the mesh has other axes, or processes don't have equally many ranks in a row."""
        if mesh is not None and mesh.axis_names != AXES:
            raise ShardingError(
                f"the mesh has the axes {mesh.axis_names}; they must be {AXES}: see parallel.mesh.make_mesh"
            )
        self.mesh, self.count = mesh, mesh.size if mesh else 1
        self.here = _own_ranks(mesh) if isinstance(mesh, Mesh) else range(self.count)
        self._split = NamedSharding(mesh, PartitionSpec(mesh.axis_names)) if mesh else None
        self._same = NamedSharding(mesh, PartitionSpec()) if mesh else None
        # Within nodes, then between them: beyond about 256 ranks it can't be at once.
        near = NamedSharding(mesh, PartitionSpec(None, AXES[0])) if mesh else None
        self._copies = [jax.jit(lambda tree: tree, out_shardings=each) for each in (near, self._same)]

    @property
    def shared(self) -> bool:
        """Whether other processes have some of the ranks."""
        return len(self.here) < self.count

    def split(self, tree: Any) -> Any:
        """The first axis of each array over the ranks of this process."""
        return self._send(tree, self._split)

    def join(self, parts: Sequence[Any]) -> Any:
        """Arrays whose first axis is over the ranks, of a part for each rank of this process.

        A part goes to its rank's device alone, if it isn't there.
        """
        if not isinstance(self.mesh, Mesh):
            return self.split(parts[0])
        own = self.mesh.devices.flat[self.here.start : self.here.stop]
        placed = [jax.device_put(part, device) for part, device in zip(parts, own, strict=True)]
        return jax.tree.map(lambda *arrays: self._joined(arrays), *placed)

    def same(self, tree: Any) -> Any:
        """All of it on each rank; every process must say the same."""
        return self._send(tree, self._same)

    def make(self, function: Callable[[], Any]) -> Any:
        """What the function gives, made where its parts belong: the first axis of each array over all ranks."""
        if isinstance(self.mesh, AbstractMesh):
            return self._send(jax.eval_shape(function), self._split)
        return jax.jit(function, out_shardings=self._split)()  # one program, however many arrays

    def fetch(self, tree: Any) -> Any:
        """What this process's ranks have of each array, on the host."""
        return jax.tree.map(_own_part, tree) if self.shared else jax.device_get(tree)

    def fetch_all(self, tree: Any) -> Any:
        """Whole arrays on the host, whose second axis is over the ranks; all processes must ask for them."""
        for copy in self._copies if self.shared else ():
            tree = copy(tree)
        return jax.device_get(tree)

    def _joined(self, arrays: Sequence[jax.Array]) -> jax.Array:
        assert self._split is not None
        shape = (self.count * arrays[0].shape[0], *arrays[0].shape[1:])
        return jax.make_array_from_single_device_arrays(shape, self._split, arrays)

    def _send(self, tree: Any, sharding: NamedSharding | None) -> Any:
        if isinstance(self.mesh, AbstractMesh):
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)
        if not self.shared:
            return jax.device_put(tree, sharding)
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree)


def _own_ranks(mesh: Mesh) -> range:
    owners, me = [device.process_index for device in mesh.devices.flat], jax.process_index()
    count = owners.count(me)
    if count == len(owners):
        return range(count)
    if any(owners.count(each) != count for each in range(jax.process_count())):
        shares = [owners.count(each) for each in range(jax.process_count())]
        raise ShardingError(f"processes have {shares} devices of the mesh; each must have as many as the others")
    first = owners.index(me)
    if set(owners[first : first + count]) != {me}:
        raise ShardingError("the devices of a process must follow one another in the mesh, as in jax.devices()")
    return range(first, first + count)


def _own_part(array: jax.Array) -> np.ndarray:
    if array.is_fully_replicated:
        return np.asarray(array)
    parts = sorted(array.addressable_shards, key=lambda shard: [part.start or 0 for part in shard.index])
    axis = next(axis for axis, size in enumerate(array.shape) if parts[0].data.shape[axis] < size)
    return np.concatenate([np.asarray(part.data) for part in parts], axis=axis)
