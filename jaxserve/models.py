"""The model cache: weights in the form that the engine takes, which instances on a host share.

A user's folder is looked in by default, and only `jaxserve models prefetch` adds to it: a converted model may be as
large as its files. Whoever names a folder wants it filled.
"""

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxserve.checkpoints import cached, hf, store
from jaxserve.checkpoints.blocks import LIMIT, MANIFESTS, Blocks, Manifest
from jaxserve.checkpoints.hf import Progress
from jaxserve.checkpoints.hub import EMBEDDED, locate
from jaxserve.compilation import cache_folder
from jaxserve.folders import make_own
from jaxserve.layers.config import Config
from jaxserve.layers.transformer import Model
from jaxserve.parallel.errors import ConfigError, RequestError

OFF = "off"


class Cache(NamedTuple):
    """Where models are looked for, and whether those that aren't there are kept."""

    blocks: Blocks
    fills: bool


class Weights(NamedTuple):
    """A model's weights, described; `read` reads or maps them."""

    cfg: Config
    params: Model
    read: Callable[[Progress | None], Model]


def default_folder() -> Path:
    """Beside the programs that JAX has compiled. Raises RuntimeError if the user has no home."""
    return cache_folder() / "models"


def find_cache(model_cache: str | Path | None) -> Cache | None:
    """The cache of a folder, which is filled; by default the user's, if there is one, which isn't; None if it is off.

    Raises RequestError for a folder that can't be one.
    """
    if model_cache == OFF:
        return None
    if model_cache is not None:
        return Cache(open_cache(model_cache), fills=True)
    try:
        folder = default_folder()
        return Cache(open_cache(folder), fills=False) if folder.is_dir() else None
    except (RequestError, RuntimeError):
        return None


def open_cache(folder: str | Path | None = None, limit: int = LIMIT) -> Blocks:
    """The blocks in a folder, by default the user's, which is made if there is none."""
    try:
        path = default_folder() if folder is None else Path(folder).expanduser()
    except RuntimeError as error:
        raise RequestError(f"--model-cache: name a folder, for there is no usual one: {error}") from None
    try:
        make_own(path, MANIFESTS)
        return Blocks(path, limit)
    except OSError as error:
        raise RequestError(f"model_cache = {str(path)!r} can't be used: {error}") from None


def open_checkpoint(folder: Path) -> hf.Checkpoint | store.Store:
    """A folder that `checkpoints.store` saved, or a Hugging Face checkpoint."""
    return store.open_store(folder) if store.is_store(folder) else hf.open_checkpoint(folder)


def resolve_dtype(dtype: str, raw: Mapping[str, Any]) -> Any:
    """The dtype by its name, or what "auto" stands for on this machine."""
    if dtype == "auto":
        cpu = jax.default_backend() == "cpu"
        dtype = "float32" if cpu else raw.get("dtype") or raw.get("torch_dtype") or "bfloat16"
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"dtype {dtype!r} is not supported; supported: auto, float32, bfloat16, float16")
    return jnp.dtype(dtype)


def name_of(model: str | Path | None) -> str:
    """What a model is called in the cache: "embedded", a folder's whole path, or its name on the hub."""
    folder = EMBEDDED if model is None else Path(model).expanduser()
    if folder == EMBEDDED or (str(model) == "embedded" and not folder.is_dir()):
        return "embedded"
    return str(folder.resolve()) if folder.is_dir() else str(model)


def open_weights(model: str | Path | None, folder: Path, dtype: Any, int8: bool, cache: Cache | None) -> Weights:
    """A model's weights in a form: mapped if they are kept, else those of its folder, which are kept if they shall be.

    What was kept and is damaged is made anew, whether the cache is filled or not. If it can't be, a warning says why.
    """
    name = name_of(model)
    if cache and (found := cached.find(cache.blocks, name, folder, dtype, int8)):
        return Weights(found.cfg, found.params(), found.read)
    checkpoint = open_checkpoint(folder)
    read = partial(_read, checkpoint, dtype, int8)
    if cache and (cache.fills or cached.is_known(cache.blocks, name, folder, dtype, int8)):
        read = partial(_keep, cache.blocks, name, folder, checkpoint, dtype, int8)
    return Weights(checkpoint.cfg, checkpoint.params(dtype, int8), read)


def _read(checkpoint: Any, dtype: Any, int8: bool, progress: Progress | None) -> Model:
    return checkpoint.read(dtype=dtype, int8=int8, progress=progress)


def _keep(
    blocks: Blocks, name: str, folder: Path, checkpoint: Any, dtype: Any, int8: bool, progress: Progress | None
) -> Model:
    """Weights that are kept first, and then mapped."""
    try:
        cached.fill(blocks, name, folder, checkpoint, dtype, int8, progress)
    except OSError as error:
        warnings.warn(f"{name} can't be kept in {blocks.folder}: {error}", stacklevel=2)
    found = cached.find(blocks, name, folder, dtype, int8)
    return found.read() if found else _read(checkpoint, dtype, int8, progress)


def prefetch(model: str | Path | None, dtype: str, int8: bool, blocks: Blocks, progress: Progress) -> Manifest:
    """Keeps a model's weights, unless they are; raises RequestError if they can't be, and what reading them raises."""
    folder, name = locate(model), name_of(model)
    kind = resolve_dtype(dtype, hf.read_json(folder))
    try:
        if cached.find(blocks, name, folder, kind, int8) is None:
            cached.fill(blocks, name, folder, open_checkpoint(folder), kind, int8, progress)
    except OSError as error:
        raise RequestError(f"{name} can't be kept in {blocks.folder}: {error}") from None
    manifest = blocks.find(cached.key(name, folder, kind, int8))
    if manifest is None:
        raise RequestError(f"{name} was removed from {blocks.folder} by another process; prefetch it again")
    return manifest


def is_kept(cache: Cache | None, name: str, dtype: str, int8: bool) -> bool:
    """Whether a model was kept by this name and in this form, of whatever version."""
    forms = {each.manifest.form for each in cache.blocks.kept() if each.manifest.model == name} if cache else set()
    if not forms:
        return False
    raw = hf.read_json(locate(name, wanted=("config.json",)))
    return cached.form_of(resolve_dtype(dtype, raw), int8) in forms


def is_stale(manifest: Manifest) -> bool:
    """Whether the files that a model was made from are others now, or gone; of names on the hub nobody is asked."""
    folder = EMBEDDED if manifest.model == "embedded" else Path(manifest.model)
    return folder.is_absolute() and (not folder.is_dir() or cached.version_of(folder) != manifest.version)
