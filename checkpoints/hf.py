"""Hugging Face checkpoints: a folder of `config.json` and safetensors, read leaf by leaf to where each belongs."""

import dataclasses
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from safetensors.numpy import save_file

from jaxserve.checkpoints.faults import check_tensors, not_finite
from jaxserve.checkpoints.formats import find_format, quantization_config
from jaxserve.checkpoints.safetensors import COMPENSATION, INDEX, Tensor, open_folder
from jaxserve.checkpoints.sources import OUTPUT_BIAS, Scales, Source, sources, to_tensors
from jaxserve.checkpoints.tensors import Tensors
from jaxserve.layers.config import Config
from jaxserve.layers.int8 import in_int8, is_int8, is_quantized, multiplied, quantize_like
from jaxserve.layers.transformer import Model, has_biases, model_params
from jaxserve.parallel.errors import CheckpointError, ShardingError
from jaxserve.parallel.qarray import QArray
from jaxserve.parallel.sharding import Param, Rules, place, quantized, shardings

Progress = Callable[[int, int], None]
"""Called with the bytes that are in place and those there are in all."""
ALIGNMENT = 64
"""Bytes; where arrays begin at a multiple, XLA's CPU backend uses them as they are."""
Part = Callable[[Model], Any]
"""Picks a part of a tree that is built as the model: a layer, say."""


def _all(model: Model) -> Model:
    return model


@dataclass(frozen=True)
class Checkpoint:
    """A folder that is open: its tensors fit its config, and none of their values is read yet."""

    raw: dict[str, Any]  # config.json
    cfg: Config  # of what is there
    tensors: Tensors
    table: Model  # of `Source`; of weights that are INT8 in the files and in memory, QArrays of it

    def params(self, dtype: Any = jnp.float32, int8: bool = False) -> Model:
        """The tree of `Param` of what `read` gives: INT8 as the files have it; with `int8`, all that may be."""
        params = model_params(self.cfg, dtype, biases=has_biases(self.table))
        return jax.tree.map(_described, params, in_int8(params) if int8 else params, self.table)

    def read(
        self,
        part: Part = _all,
        dtype: Any = jnp.float32,
        int8: bool = False,
        where: Model | None = None,
        progress: Progress | None = None,
    ) -> Any:
        """The weights that `part` picks of the model, as `params` describes them; `where` is the tree of shardings.

        What is rounded to INT8 is read in `dtype`, one matrix at a time. Raises CheckpointError for values that are not
        finite, and scales that can't be.
        """
        leaves, tree = jax.tree.flatten(part(self.params(dtype, int8)), is_leaf=is_quantized)
        table = tree.flatten_up_to(part(self.table))
        places = [None] * len(leaves) if where is None else tree.flatten_up_to(part(where))
        sizes = [sum(param.nbytes for param in jax.tree.leaves(leaf)) for leaf in leaves]
        weights = []
        for leaf, source, at, done in zip(leaves, table, places, accumulate(sizes), strict=True):
            weights.append(self._weight(leaf, source, at, dtype))
            if progress:
                progress(done, sum(sizes))
        return tree.unflatten(weights)

    def _weight(self, param: Any, source: Any, where: Any, dtype: Any) -> Any:
        if isinstance(source, QArray):
            return jax.tree.map(self._array, source, param, where or QArray(None, None))
        if not isinstance(param, QArray):
            return self._array(source, param, where)
        whole = dataclasses.replace(param.codes, dtype=dtype)
        rounded = quantize_like(param, self._array(source, whole, where and where.codes))
        return place(rounded, where) if where else rounded

    def _array(self, source: Source, param: Param, where: Any) -> jax.Array:
        if where is None:
            return jax.device_put(self._read(source, param, (slice(None),) * len(param.shape)))
        return jax.make_array_from_callback(param.shape, where, lambda i: self._read(source, param, i or ()))

    def _read(self, source: Source, param: Param, index: tuple[slice, ...]) -> np.ndarray:
        """The part `index` of a weight; of floats in the file, only the bytes of that part are read."""
        names, index = (source.names[index[0]], index[1:]) if source.stacked and index else (source.names, index)
        values = (self._values(source, name, param.dtype) for name in names)
        whole = _filled((each.reshape(source.view)[source.cut][index] for each in values), len(names), param.dtype)
        spoiled = [name for name, part in zip(names, whole, strict=True) if not np.isfinite(part).all()]
        if spoiled:
            raise not_finite(spoiled, param.dtype, self.tensors.folder)
        return whole if source.stacked else whole[0]

    def _values(self, source: Source, name: str, dtype: Any) -> np.ndarray:
        if isinstance(source, Scales):
            return self.tensors.scales(name, source.shape[1])
        return self.tensors.codes(name) if dtype == jnp.int8 else self.tensors.floats(name)


def _filled(parts: Iterator[np.ndarray], count: int, dtype: Any) -> np.ndarray:
    """So many parts of one shape in one array, each written once, where JAX can take it over without a copy."""
    first, dtype = next(parts), np.dtype(dtype)
    size = count * first.size * dtype.itemsize
    room = np.empty(size + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    whole = room[start : start + size].view(dtype).reshape(count, *first.shape)
    for number, part in enumerate(chain([first], parts)):
        whole[number] = part
    return whole


def open_checkpoint(folder: Path) -> Checkpoint:
    """Opens a folder and checks its tensors, by the files' headers.

    An MTP module that the config announces and the files lack is left out, with a warning. Raises ConfigError, or
    CheckpointError with all tensors that are missing, unexpected, misshapen or stored otherwise than announced.
    """
    raw = read_json(folder)
    tensors = Tensors(folder, open_folder(folder), find_format(raw, folder))
    cfg = _without_absent_mtp(Config.from_hf(raw), tensors.table, folder)
    params = model_params(cfg, biases=any(name.endswith(OUTPUT_BIAS) for name in tensors.table))
    table = sources(cfg, params)
    check_tensors(tensors, table, _copies(cfg))
    _check_copies(tensors, cfg)
    stored = lambda able, source: _stored(tensors, source) if is_quantized(able) else source  # noqa: E731
    return Checkpoint(raw, cfg, tensors, jax.tree.map(stored, multiplied(params), table, is_leaf=is_quantized))


def _stored(tensors: Tensors, source: Source) -> Source | QArray:
    """Where a matrix is, or if it is INT8 in the files, its codes and scales."""
    form = tensors.format
    if tensors.table[source.names[0]].dtype != "I8":
        return source
    return QArray(source, source.scales("", form.counts(source.inputs)))


def _described(param: Param, wanted: Any, source: Any) -> Any:
    if not isinstance(source, QArray):
        return wanted
    axes = len(source.codes.inputs)
    return quantized(param, (*param.shape[:-axes], *source.scale.view[-axes:]))


def load(
    folder: Path,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
    progress: Progress | None = None,
    int8: bool = False,
) -> tuple[Config, Model]:
    """Reads a checkpoint, floats converted to `dtype`, and puts each weight where `rules` want it on `mesh`.

    Without rules every device has all weights, without a mesh one device does. Matrices that are INT8 in the files stay
    so; with `int8`, all that may be are rounded. Raises as `open_checkpoint` and `Checkpoint.read` do.
    """
    checkpoint = open_checkpoint(folder)
    where = placement(checkpoint.params(dtype, int8), mesh, rules)
    return checkpoint.cfg, checkpoint.read(dtype=dtype, int8=int8, where=where, progress=progress)


def placement(params: Model, mesh: Mesh | None, rules: Rules | None) -> Model | None:
    """The tree of shardings of weights; None without a mesh. Raises ShardingError where the rules can't be kept."""
    if mesh is None and rules:
        raise ShardingError(f"rules = {dict(rules)} need a mesh whose axes they name; give mesh too")
    return None if mesh is None else shardings(params, mesh, rules or {})


def save(folder: Path, model: Model, cfg: Config, raw: dict[str, Any]) -> None:
    """Writes `config.json` and `model.safetensors` as Hugging Face publishes them, in the weights' dtypes.

    INT8 weights become those of compressed-tensors, which other engines read. Raises CheckpointError for scales of
    blocks, which it can't express.
    """
    table = sources(cfg, model_params(cfg, biases=has_biases(model)))
    tensors = to_tensors(table, model)
    biases = {name: tensors.pop(name) for name in list(tensors) if name.endswith(OUTPUT_BIAS)}
    said = {"quantization_config": quantization_config(table, model)} if is_int8(model) else {}
    kept = {key: value for key, value in raw.items() if key != "quantization_config"}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for stale in (COMPENSATION, INDEX):
        (folder / stale).unlink(missing_ok=True)
    if biases:
        save_file(biases, folder / COMPENSATION)
        places = dict.fromkeys(tensors, "model.safetensors")
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}, indent=1) + "\n")
    (folder / "config.json").write_text(json.dumps(kept | said, indent=2) + "\n")


def read_json(folder: Path) -> dict[str, Any]:
    """The content of the folder's `config.json`."""
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no config.json; a Hugging Face model folder is needed") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}); fetch it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not JSON of a model's keys, but a {type(content).__name__}; fetch it again")
    return content


def _without_absent_mtp(cfg: Config, tensors: dict[str, Tensor], folder: Path) -> Config:
    prefixes = tuple(f"model.layers.{cfg.layers + i}." for i in range(cfg.mtp_layers))
    if not prefixes or any(name.startswith(prefixes) for name in tensors):
        return cfg
    warnings.warn(
        f"config.json announces {cfg.mtp_layers} MTP layer(s), but {folder} has no {prefixes[0]}*; "
        "the model is loaded without multi-token prediction",
        stacklevel=4,
    )
    return dataclasses.replace(cfg, mtp_layers=0)


def _copies(cfg: Config) -> dict[str, str]:
    """Tensors that files may hold a second time, and what each must equal."""
    head = "model.embed_tokens.weight" if cfg.tied_embeddings else "lm_head.weight"
    copies = {"lm_head.weight": head} if cfg.tied_embeddings else {}
    for i in range(cfg.layers, cfg.layers + cfg.mtp_layers):
        copies[f"model.layers.{i}.embed_tokens.weight"] = "model.embed_tokens.weight"
        copies[f"model.layers.{i}.shared_head.head.weight"] = head
    return copies


def _check_copies(tensors: Tensors, cfg: Config) -> None:
    """An MTP module's own embedding or head is not supported, so it must be the model's; likewise a tied head."""
    for name, original in _copies(cfg).items():
        if name in tensors.table and not np.array_equal(tensors.floats(name), tensors.floats(original)):
            raise CheckpointError(f"{name} differs from {original}; a model in which they differ is not supported")
