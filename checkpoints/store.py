"""Checkpoints of our own: weights saved with orbax as they are in memory, the config and the tokenizer beside them.

    folder/config.json  folder/tokenizer.json …  folder/weights.json  folder/weights/

They restore onto any number of devices: each reads the parts that belong to it.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxserve.checkpoints.hf import read_json
from jaxserve.layers.config import Config
from jaxserve.layers.transformer import Model, model_params
from jaxserve.parallel.errors import CheckpointError
from jaxserve.parallel.sharding import abstract

WEIGHTS = "weights"
MANIFEST = "weights.json"
"""Beside the weights: the size of each of their files, so that one that is gone or cut off is named."""


def is_store(folder: Path) -> bool:
    """Whether the folder was written by `save`."""
    return (folder / MANIFEST).is_file()


def save(folder: Path, model: Model, beside: Path) -> None:
    """Saves weights, and copies the config and all that is not weights from the folder `beside`.

    Raises CheckpointError if the folder exists and holds something: nothing is overwritten.
    """
    if folder.exists() and any(folder.iterdir()):
        raise CheckpointError(f"{folder} exists and is not empty; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    for path in beside.iterdir():
        if path.suffix in {".json", ".jinja"} and path.name != MANIFEST and not path.name.endswith(".index.json"):
            shutil.copy(path, folder)
    (folder / "config.json").write_text(json.dumps(_as_saved(read_json(beside), model), indent=2) + "\n")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute() / WEIGHTS, model)
    (folder / MANIFEST).write_text(json.dumps(_sizes(folder / WEIGHTS), indent=1) + "\n")


def _as_saved(raw: dict[str, Any], model: Model) -> dict[str, Any]:
    """The config of what is in memory: FP8 codes are values by now, an MTP module that was absent is not announced."""
    kept = {key: value for key, value in raw.items() if key != "quantization_config"}
    return kept | ({"num_nextn_predict_layers": len(model.mtp)} if "num_nextn_predict_layers" in raw else {})


def restore(folder: Path, dtype: Any, placement: Any = None) -> tuple[Config, Model]:
    """Reads what `save` wrote, converted to `dtype`; `placement` is a tree of shardings, by default one device.

    Raises CheckpointError if files are missing or damaged, or are not those of the config.
    """
    cfg = Config.from_hf(read_json(folder))
    params = model_params(cfg, dtype)
    if placement is None:
        placement = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), params)
    weights = folder.absolute() / WEIGHTS
    _check_files(folder)
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            stored = _shapes(checkpointer.metadata(weights).item_metadata.tree)
            _check_shapes(stored, _shapes(params), folder)
            return cfg, checkpointer.restore(weights, abstract(params, placement))
        except CheckpointError:
            raise
        except Exception as error:  # orbax and its storage raise many kinds for a file that is gone or damaged
            raise CheckpointError(
                f"{weights} can't be read, save it again ({type(error).__name__}: {error})"
            ) from error


def _sizes(weights: Path) -> dict[str, int]:
    files = sorted(path for path in weights.rglob("*") if path.is_file())
    return {path.relative_to(weights).as_posix(): path.stat().st_size for path in files}


def _check_files(folder: Path) -> None:
    try:
        wanted = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / MANIFEST} can't be read ({error}); save the checkpoint again") from None
    there = _sizes(folder / WEIGHTS)
    faults = [name for name, size in wanted.items() if there.get(name) != size]
    if faults:
        raise CheckpointError(f"{folder / WEIGHTS}: {', '.join(faults)} gone or cut off; save the checkpoint again")


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape) for path, leaf in leaves}


def _check_shapes(stored: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]], folder: Path) -> None:
    faults = [f"missing: {name} {shape}" for name, shape in wanted.items() if name not in stored]
    faults += [f"unexpected: {name} {shape}" for name, shape in stored.items() if name not in wanted]
    faults += [
        f"misshapen: {name} is {stored[name]}, config.json makes it {shape}"
        for name, shape in wanted.items()
        if stored.get(name, shape) != shape
    ]
    if faults:
        raise CheckpointError(f"{folder} does not fit its config.json, {len(faults)} faults:\n  " + "\n  ".join(faults))
