"""Pages of a cache as arrays of their own: out of it, and into another.

A cache is a tree of arrays `[p, b, …]`. On a mesh each rank has pages of its own, numbered from 0; the ranks' pages are
one after another along the first axis, split over them.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int

from jaxserve.parallel.devices import Devices
from jaxserve.parallel.errors import ShardingError
from jaxserve.parallel.mesh import AXES

NONE = np.iinfo(np.int32).max
"""The number of no page."""


def gather_pages(cache: Any, ids_k: Int[Array, " k"]) -> Any:
    """Some pages of one rank, `[k, b, …]`; a number past the last is none, and gives zeros."""
    return jax.tree.map(lambda pages: jnp.take(pages, ids_k, axis=0, mode="fill", fill_value=0), cache)


def scatter_pages(cache: Any, pages: Any, ids_k: Int[Array, " k"]) -> Any:
    """One rank's cache with these pages; what has a number past the last goes nowhere."""
    return jax.tree.map(lambda into, given: into.at[ids_k].set(given, mode="drop"), cache, pages)


class PageCopier:
    """Copies pages out of the caches of this process's ranks and into them, at most `count` of each rank at once.

    Two programs of static shape, for any number of pages; on a mesh they have no collectives, and processes that share
    it launch them together.
    """

    def __init__(self, devices: Devices, count: int):
        gather, scatter, split = gather_pages, scatter_pages, PartitionSpec(AXES)
        if devices.mesh is not None:
            over = lambda body, takes: jax.shard_map(  # noqa: E731
                body, mesh=devices.mesh, in_specs=takes, out_specs=split, check_vma=False
            )
            gather, scatter = over(gather, (split, split)), over(scatter, (split, split, split))
        self.count, self._devices = count, devices
        self._gather, self._scatter = jax.jit(gather), jax.jit(scatter, donate_argnums=0)
        self._nothing: dict[int, Any] = {}  # for each rank of this process pages of zeros, there

    def gather(self, cache: Any, ids: Mapping[int, Sequence[int]]) -> dict[int, Any]:
        """Pages by rank, `[count, b, …]` on its device, of which those without a number are zeros.

        Nothing is waited for, and the cache can be donated to a step as soon as this has returned.
        """
        return self._by_rank(self._gather(cache, self._numbers(ids)), ids)

    def scatter(self, cache: Any, ids: Mapping[int, Sequence[int]], pages: Mapping[int, Any]) -> Any:
        """The cache with pages by rank, `[len(ids[rank]), b, …]` on the host. Donates the cache.

        A rank is sent its own pages, as they lie there; only fewer than `count` are copied before, to fill them up.
        """
        numbers = self._numbers(ids)
        self._nothing = self._nothing or self._make_nothing(cache)
        whole = {rank: jax.tree.map(self._filled_up, tree) for rank, tree in pages.items()}
        parts = [whole.get(rank, nothing) for rank, nothing in self._nothing.items()]
        return self._scatter(cache, self._devices.join(parts), numbers)

    @property
    def _rows(self) -> int:
        return len(self._devices.here) * self.count

    def _first(self, rank: int) -> int:
        if rank not in self._devices.here:
            raise ShardingError(f"rank {rank} is not of this process, which has {list(self._devices.here)}")
        return (rank - self._devices.here.start) * self.count

    def _numbers(self, ids: Mapping[int, Sequence[int]]) -> Any:
        numbers = np.full(self._rows, NONE, np.int32)
        for rank, each in ids.items():
            if len(each) > self.count:
                raise ShardingError(f"{len(each)} pages of rank {rank} at once; this copies {self.count}: raise that")
            numbers[self._first(rank) : self._first(rank) + len(each)] = each
        return self._devices.split(numbers)

    def _make_nothing(self, cache: Any) -> dict[int, Any]:
        zeros = jax.tree.map(lambda into: np.zeros((self.count, *into.shape[1:]), into.dtype), cache)
        return self._by_rank(self._devices.join([zeros] * len(self._devices.here)), self._devices.here)

    def _filled_up(self, pages: np.ndarray) -> np.ndarray:
        if len(pages) == self.count:
            return pages
        return np.concatenate([pages, np.zeros((self.count - len(pages), *pages.shape[1:]), pages.dtype)])

    def _by_rank(self, tree: Any, ranks: Iterable[int]) -> dict[int, Any]:
        return {rank: jax.tree.map(lambda pages, rank=rank: self._part(pages, rank), tree) for rank in ranks}

    def _part(self, pages: jax.Array, rank: int) -> jax.Array:
        if self._devices.mesh is None:
            return pages
        parts = {(shard.index[0].start or 0) // self.count: shard.data for shard in pages.addressable_shards}
        return parts[rank]
