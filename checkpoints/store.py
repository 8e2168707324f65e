"""Checkpoints of our own: weights saved with orbax as they are in memory, the config and the tokenizer beside them.

    folder/config.json  folder/tokenizer.json …  folder/weights.json  folder/weights/

They restore onto any number of devices: each reads the parts that belong to it.
"""

import json
import shutil
from itertools import accumulate
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, SingleDeviceSharding

from jaxserve.checkpoints.faults import check_shapes, not_finite
from jaxserve.checkpoints.hf import Progress, placement, read_json
from jaxserve.layers.config import Config
from jaxserve.layers.transformer import Model, model_params
from jaxserve.parallel.errors import CheckpointError
from jaxserve.parallel.sharding import Rules, abstract

WEIGHTS = "weights"
MANIFEST = "weights.json"
"""Beside the weights: the size of each of their files, so that one that is gone or cut off is named."""


def is_store(folder: Path) -> bool:
    """Whether the folder was written by `save`."""
    return (folder / MANIFEST).is_file()


def save(folder: Path, model: Model, beside: Path) -> None:
    """Saves weights, and copies the config and all that is not weights from the folder `beside`.

    Raises CheckpointError if the folder is a file or holds something: nothing is overwritten.
    """
    import orbax.checkpoint as ocp  # slow to import, and not needed to serve what others saved

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        what = "is not empty" if folder.is_dir() else "is a file"
        raise CheckpointError(f"{folder} exists and {what}; name another folder")
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


def restore(
    folder: Path, dtype: Any, mesh: Mesh | None = None, rules: Rules | None = None, progress: Progress | None = None
) -> tuple[Config, Model]:
    """Reads what `save` wrote, converted to `dtype` and put where `rules` want it on `mesh`, as `hf.load` does.

    Raises CheckpointError if files are missing or damaged, are not those of the config, or hold what is not finite.
    """
    cfg = Config.from_hf(read_json(folder))
    params = model_params(cfg, dtype)
    here = SingleDeviceSharding(jax.local_devices()[0])
    where = placement(params, mesh, rules) or jax.tree.map(lambda _: here, params)
    _check_files(folder)
    try:
        model = _read(folder, abstract(params, where), progress)
    except CheckpointError:
        raise
    except Exception as error:  # orbax and its storage raise many kinds for a file that is gone or damaged
        raise CheckpointError(
            f"{folder / WEIGHTS} can't be read, save it again ({type(error).__name__}: {error})"
        ) from error
    spoiled = [name for name, leaf in _named(model).items() if not _is_finite(leaf)]
    if spoiled:
        raise not_finite(spoiled, dtype, folder)
    return cfg, model


def _read(folder: Path, wanted: Model, progress: Progress | None) -> Model:
    """Reads layer by layer, so that there is progress to tell, and at last what is in no layer."""
    import orbax.checkpoint as ocp

    weights = folder.absolute() / WEIGHTS
    hollow = jax.tree.map(lambda _: ocp.PLACEHOLDER, wanted)
    alone = [(*hollow.layers[:i], layer, *hollow.layers[i + 1 :]) for i, layer in enumerate(wanted.layers)]
    parts = [hollow._replace(layers=layers) for layers in alone] + [wanted._replace(layers=hollow.layers)]
    sizes = [_nbytes(layer) for layer in (*wanted.layers, wanted._replace(layers=()))]
    found = []
    with ocp.PyTreeCheckpointer() as checkpointer:
        check_shapes(_shapes(checkpointer.metadata(weights).item_metadata.tree), _shapes(wanted), folder)
        for part, done in zip(parts, accumulate(sizes), strict=True):
            how = ocp.args.PyTreeRestore(part, restore_args=ocp.checkpoint_utils.construct_restore_args(part))
            found.append(checkpointer.restore(weights, args=how))
            if progress:
                progress(done, sum(sizes))
    return found[-1]._replace(layers=tuple(part.layers[i] for i, part in enumerate(found[:-1])))


@jax.jit
def _is_finite(leaf: jax.Array) -> jax.Array:
    return jnp.isfinite(leaf).all()


def _nbytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


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


def _named(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(leaf.shape) for name, leaf in _named(tree).items()}
