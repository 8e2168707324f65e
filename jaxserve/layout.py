"""A page of the cache as bytes: of each array its part of the page, one after another."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxserve.parallel.devices import empty


class PageLayout:
    """How the pages of one kind of cache lie in bytes."""

    def __init__(self, cache: Any):
        """`cache` is a tree of arrays `[p, b, …]`, or of what describes them."""
        leaves, self._tree = jax.tree.flatten(cache)
        self._parts = [(tuple(leaf.shape[1:]), np.dtype(leaf.dtype)) for leaf in leaves]
        self._sizes = [int(np.prod(shape)) * dtype.itemsize for shape, dtype in self._parts]
        self.page_bytes = sum(self._sizes)

    def like(self, count: int) -> Any:
        """What so many pages are: a tree of `jax.ShapeDtypeStruct`, `[count, b, …]`."""
        return self._tree.unflatten(jax.ShapeDtypeStruct((count, *shape), dtype) for shape, dtype in self._parts)

    def pack(self, pages: Any, index: int) -> memoryview:
        """A copy of one of the pages of a tree of NumPy arrays `[k, b, …]`."""
        packed, at = np.empty(self.page_bytes, np.uint8), 0
        for leaf, size in zip(jax.tree.leaves(pages), self._sizes, strict=True):
            packed[at : at + size] = np.ascontiguousarray(leaf[index]).reshape(-1).view(np.uint8)
            at += size
        return memoryview(packed)

    def unpack(self, values: Sequence[memoryview]) -> Any:
        """Pages by their bytes, a tree of NumPy arrays `[k, b, …]`. A ValueError if one has another size."""
        arrays = [empty((len(values), *shape), dtype) for shape, dtype in self._parts]
        for index, value in enumerate(values):
            if len(value) != self.page_bytes:
                raise ValueError(f"a page has {len(value)} bytes; here it has {self.page_bytes}")
            at = 0
            for array, size in zip(arrays, self._sizes, strict=True):
                array[index].reshape(-1).view(np.uint8)[:] = np.frombuffer(value[at : at + size], np.uint8)
                at += size
        return self._tree.unflatten(arrays)
