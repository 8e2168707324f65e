"""Checkpoints of our own: weights saved with orbax as they are in memory, the config and the tokenizer beside them.

    folder/config.json  folder/tokenizer.json …  folder/weights.json  folder/weights/

They restore onto any number of devices: each reads the parts that belong to it.
"""

import json
import shutil
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, SingleDeviceSharding

from jaxserve.checkpoints.faults import Shapes, check_shapes, not_finite
from jaxserve.checkpoints.formats import DESCRIPTION
from jaxserve.checkpoints.hf import Progress, placement, read_json
from jaxserve.checkpoints.hub import check_new
from jaxserve.layers.config import Config
from jaxserve.layers.int8 import in_int8, is_quantized, quantize_model
from jaxserve.layers.transformer import Model, model_params
from jaxserve.parallel.errors import CheckpointError
from jaxserve.parallel.sharding import Param, Rules, abstract, place, quantized

WEIGHTS = "weights"
MANIFEST = "weights.json"
"""Beside the weights: the size of each of their files, so that one that is gone or cut off is named."""
_FOREIGN = {MANIFEST, DESCRIPTION}
"""What would say something else of the weights than their own tree does."""


def is_store(folder: Path) -> bool:
    """Whether the folder was written by `save`."""
    return (folder / MANIFEST).is_file()


def save(folder: Path, model: Model, beside: Path) -> None:
    """Saves weights, and copies the config and all that is not weights from the folder `beside`.

    Raises CheckpointError if the folder is a file or holds something: nothing is overwritten.
    """
    import orbax.checkpoint as ocp  # slow to import, and not needed to serve what others saved

    check_new(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for path in beside.iterdir():
        if path.suffix in {".json", ".jinja"} and path.name not in _FOREIGN and not path.name.endswith(".index.json"):
            shutil.copy(path, folder)
    (folder / "config.json").write_text(json.dumps(_as_saved(read_json(beside), model), indent=2) + "\n")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute() / WEIGHTS, model)
    (folder / MANIFEST).write_text(json.dumps(_sizes(folder / WEIGHTS), indent=1) + "\n")


def _as_saved(raw: dict[str, Any], model: Model) -> dict[str, Any]:
    """The config of what is in memory: its tree says what is INT8; an MTP module that was absent is not announced."""
    kept = {key: value for key, value in raw.items() if key != "quantization_config"}
    return kept | ({"num_nextn_predict_layers": len(model.mtp)} if "num_nextn_predict_layers" in raw else {})


@dataclass(frozen=True)
class Store:
    """A folder that is open; none of its values is read yet. `hf.Checkpoint` has the same methods."""

    folder: Path
    cfg: Config
    shapes: Shapes  # of what was saved

    def params(self, dtype: Any = jnp.float32, int8: bool = False) -> Model:
        """The tree of `Param` of what `read` gives: INT8 as it was saved; with `int8`, all that may be."""

        def one(path: Any, param: Param, wanted: Any) -> Any:
            scale = self.shapes.get(f"{_name(path)}.scale", ())
            fits = len(scale) == len(param.shape) and not any(n % m for n, m in zip(param.shape, scale, strict=True))
            return quantized(param, scale) if fits else wanted

        params = model_params(self.cfg, dtype, biases="layers.0.attn_bias" in self.shapes)
        return jax.tree.map_with_path(one, params, in_int8(params) if int8 else params)

    def read(
        self, dtype: Any = jnp.float32, int8: bool = False, where: Any = None, progress: Progress | None = None
    ) -> Model:
        """The weights as `params` describes them; `where` is the tree of shardings.

        Raises CheckpointError if files are damaged, are not those of the config, or hold what is not finite.
        """
        here = SingleDeviceSharding(jax.local_devices()[0])
        wanted = self.params(dtype, int8)
        where = where or jax.tree.map(lambda _: here, wanted)
        try:
            model = self._read(self.params(dtype), wanted, where, progress)
        except CheckpointError:
            raise
        except Exception as error:  # orbax and its storage raise many kinds for a file that is gone or damaged
            raise _unreadable(self.folder, error) from error
        spoiled = [name for name, leaf in _named(model).items() if not _is_finite(leaf)]
        if spoiled:
            raise not_finite(spoiled, dtype, self.folder)
        return model

    def _read(self, stored: Model, wanted: Model, where: Model, progress: Progress | None) -> Model:
        """Reads layer by layer, so that there is progress to tell, and at last what is in no layer."""
        import orbax.checkpoint as ocp

        whole = lambda p, at: at.codes if is_quantized(at) and not is_quantized(p) else at  # noqa: E731
        saved = abstract(stored, jax.tree.map(whole, stored, where, is_leaf=is_quantized))
        check_shapes(self.shapes, _shapes(saved), self.folder)
        hollow = jax.tree.map(lambda _: ocp.PLACEHOLDER, saved)
        alone = [(*hollow.layers[:i], layer, *hollow.layers[i + 1 :]) for i, layer in enumerate(saved.layers)]
        parts = [hollow._replace(layers=layers) for layers in alone] + [saved._replace(layers=hollow.layers)]
        sizes = [_nbytes(layer) for layer in (*wanted.layers, wanted._replace(layers=()))]
        found = []
        with ocp.PyTreeCheckpointer() as checkpointer:
            for i, (part, done) in enumerate(zip(parts, accumulate(sizes), strict=True)):
                how = ocp.args.PyTreeRestore(part, restore_args=ocp.checkpoint_utils.construct_restore_args(part))
                own = lambda tree, i=i: tree.layers[i] if i < len(tree.layers) else tree._replace(layers=())  # noqa: E731
                weights = own(checkpointer.restore(self.folder.absolute() / WEIGHTS, args=how))
                found.append(place(quantize_model(weights, own(wanted)), own(where)))
                if progress:
                    progress(done, sum(sizes))
        return found[-1]._replace(layers=tuple(found[:-1]))


def open_store(folder: Path) -> Store:
    """Opens what `save` wrote. Raises CheckpointError if files are gone, cut off or damaged."""
    import orbax.checkpoint as ocp

    cfg = Config.from_hf(read_json(folder))
    _check_files(folder)
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            shapes = _shapes(checkpointer.metadata(folder.absolute() / WEIGHTS).item_metadata.tree)
    except Exception as error:
        raise _unreadable(folder, error) from error
    return Store(folder, cfg, shapes)


def restore(
    folder: Path,
    dtype: Any,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
    progress: Progress | None = None,
    int8: bool = False,
) -> tuple[Config, Model]:
    """Reads what `save` wrote, floats converted to `dtype`, and puts it where `rules` want it, as `hf.load` does."""
    store = open_store(folder)
    where = placement(store.params(dtype, int8), mesh, rules)
    return store.cfg, store.read(dtype, int8, where, progress)


def _unreadable(folder: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{folder / WEIGHTS} can't be read, save it again ({type(error).__name__}: {error})")


@jax.jit
def _is_finite(leaf: jax.Array) -> jax.Array:
    return jnp.isfinite(leaf).all()


def _nbytes(params: Any) -> int:
    return sum(param.nbytes for param in jax.tree.leaves(params))


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
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(leaf.shape) for name, leaf in _named(tree).items()}
