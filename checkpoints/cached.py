"""Weights in the form that the engine takes, kept as blocks: what was converted once is mapped from then on.

Blocks hold the tree of one device, whatever mesh it is for: each instance takes from it what belongs to its devices.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.checkpoints.blocks import Blocks, key_of
from jaxserve.checkpoints.formats import DESCRIPTION
from jaxserve.checkpoints.hf import Checkpoint, Progress, read_json
from jaxserve.checkpoints.safetensors import INDEX
from jaxserve.checkpoints.store import MANIFEST, WEIGHTS, Store
from jaxserve.layers.config import Config
from jaxserve.layers.transformer import Model, model_params
from jaxserve.parallel.sharding import quantized

CONVERSION = 1
"""Goes up with every change of the code by which the same files become other weights; a test sees to it."""


def version_of(folder: Path) -> str:
    """A digest of the files that weights are made from, and of the conversion.

    Small files count by content, large ones by size and by the times of their last change; that of the inode (ctime)
    can't be set, so a file put in place of another is seen even if it has its size and date. In the hub's cache files
    are links to files that are named by their checksum, which counts instead.
    """
    small = [folder / name for name in ("config.json", INDEX, DESCRIPTION, MANIFEST)]
    large = sorted([*folder.glob("*.safetensors"), *(path for path in (folder / WEIGHTS).rglob("*") if path.is_file())])
    told: list[Any] = [CONVERSION]
    told += [(path.name, path.read_bytes()) for path in small if path.is_file()]
    told += [(path.relative_to(folder).as_posix(), *_identity(path)) for path in large]
    return hashlib.sha256(repr(told).encode()).hexdigest()


def _identity(path: Path) -> tuple[Any, ...]:
    target = path.resolve()
    if path.is_symlink() and re.fullmatch("[0-9a-f]{64}", target.name):
        return (target.name,)
    found = target.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def form_of(dtype: Any, int8: bool) -> str:
    """The form that weights are read in, in words; platforms may round otherwise."""
    platform = jax.default_backend()
    return ", ".join([str(jnp.dtype(dtype)), *(["int8"] if int8 else []), *([platform] if platform != "cpu" else [])])


@dataclass(frozen=True)
class Cached:
    """A model whose weights are kept, and mapped. `hf.Checkpoint` has the same methods, for any form."""

    cfg: Config
    arrays: Mapping[str, np.ndarray]
    tree: Model  # of `Param`

    def params(self) -> Model:
        """The tree of `Param` of what `read` gives."""
        return self.tree

    def read(self, progress: Progress | None = None) -> Model:
        """The weights; on CPU they are the mapped bytes."""
        weights = jax.tree.map_with_path(lambda path, _: jax.device_put(self.arrays[_name(path)]), self.tree)
        if progress:
            size = sum(array.nbytes for array in self.arrays.values())
            progress(size, size)
        return weights


def key(model: str, folder: Path, dtype: Any, int8: bool) -> str:
    """By which the weights of a folder are kept."""
    return key_of(model, version_of(folder), form_of(dtype, int8))


def is_known(blocks: Blocks, model: str, folder: Path, dtype: Any, int8: bool) -> bool:
    """Whether the weights of a folder were kept, damaged or not."""
    return blocks.find(key(model, folder, dtype, int8)) is not None


def find(blocks: Blocks, model: str, folder: Path, dtype: Any, int8: bool) -> Cached | None:
    """The weights of a folder in a form, if they are kept and whole."""
    arrays = blocks.load(key(model, folder, dtype, int8))
    if arrays is None:
        return None
    cfg = _config(folder, arrays)
    tree = _described(model_params(cfg, dtype, biases="layers.0.attn_bias" in arrays), arrays)
    expected = {_name(path): (p.shape, jnp.dtype(p.dtype)) for path, p in jax.tree_util.tree_leaves_with_path(tree)}
    fits = expected == {name: (array.shape, array.dtype) for name, array in arrays.items()}
    return Cached(cfg, arrays, tree) if fits else None


def _config(folder: Path, arrays: Mapping[str, np.ndarray]) -> Config:
    """Of what is there: files may lack an MTP module that is announced."""
    modules = {name.split(".")[1] for name in arrays if name.startswith("mtp.")}
    return replace(Config.from_hf(read_json(folder)), mtp_layers=len(modules))


def _described(params: Model, arrays: Mapping[str, np.ndarray]) -> Model:
    def one(path: Any, param: Any) -> Any:
        scale = arrays.get(f"{_name(path)}.scale")
        return param if scale is None or scale.ndim != len(param.shape) else quantized(param, scale.shape)

    return jax.tree.map_with_path(one, params)


def fill(
    blocks: Blocks, model: str, folder: Path, checkpoint: Checkpoint | Store, dtype: Any, int8: bool,
    progress: Progress | None = None,
) -> None:  # fmt: skip
    """Converts a checkpoint and keeps it, if no other process does that meanwhile; a layer at a time is in memory.

    Raises OSError if there is no room for it, or the disk fails, and what reading the checkpoint raises.
    """
    version, form = version_of(folder), form_of(dtype, int8)
    size = sum(param.nbytes for param in jax.tree.leaves(checkpoint.params(dtype, int8)))
    blocks.make_room(size)
    with blocks.filling(where := key_of(model, version, form)):
        if blocks.load(where) is None:
            blocks.keep(model, version, form, _told(_arrays(checkpoint, dtype, int8), size, progress))


def _arrays(checkpoint: Checkpoint | Store, dtype: Any, int8: bool) -> Iterator[tuple[str, np.ndarray]]:
    """All weights by their names."""
    for weights in _parts(checkpoint, dtype, int8):
        for path, leaf in jax.tree_util.tree_leaves_with_path(weights):
            yield _name(path), np.asarray(leaf)


def _parts(checkpoint: Checkpoint | Store, dtype: Any, int8: bool) -> Iterator[Model]:
    """The tree of weights in parts: None stands where the others are."""
    if isinstance(checkpoint, Store):
        yield checkpoint.read(dtype, int8)
        return
    for number in range(checkpoint.cfg.layers):
        yield checkpoint.read(_only("layers", number), dtype, int8)
    for number in range(checkpoint.cfg.mtp_layers):
        yield checkpoint.read(_only("mtp", number), dtype, int8)
    yield checkpoint.read(lambda model: model._replace(layers=(), mtp=()), dtype, int8)


def _only(field: str, number: int) -> Callable[[Model], Model]:
    def pick(model: Model) -> Model:
        alone = tuple(each if i == number else None for i, each in enumerate(getattr(model, field)))
        return Model(None, (), None, None, ())._replace(**{field: alone})

    return pick


def _told(
    arrays: Iterator[tuple[str, np.ndarray]], size: int, progress: Progress | None
) -> Iterator[tuple[str, np.ndarray]]:
    """The same, while progress is told of what is written."""
    done = 0
    for name, values in arrays:
        yield name, values
        done += values.nbytes
        if progress:
            progress(done, size)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
