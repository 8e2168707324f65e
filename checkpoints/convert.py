"""A checkpoint as INT8, on disk: layer by layer, so that one is in memory, and what is done survives a stop.

out/config.json  out/model-00001-of-00009.safetensors …  out/compensation.safetensors  out/quantization_report.json
out/unfinished/    while it goes on: the plan, the states of the text, and the report of each layer that is done
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int
from safetensors.numpy import load_file, save_file

from jaxserve.checkpoints import hf
from jaxserve.checkpoints.calibrate import Calibrated, Walk, calibrate
from jaxserve.checkpoints.formats import DESCRIPTION, quantization_config
from jaxserve.checkpoints.hf import Checkpoint
from jaxserve.checkpoints.hub import check_new
from jaxserve.checkpoints.quantize import LayerReport, Parts, Step
from jaxserve.checkpoints.safetensors import COMPENSATION, INDEX, open_file
from jaxserve.checkpoints.sources import OUTPUT_BIAS, sources, to_tensors
from jaxserve.layers.int8 import is_quantized
from jaxserve.layers.transformer import Model, model_params
from jaxserve.parallel.errors import CheckpointError
from jaxserve.parallel.qarray import QArray

UNFINISHED = "unfinished"
REPORT = "quantization_report.json"

Show = Callable[[int, int], None]
"""Told the layers that are done, and how many there are."""


class Work(NamedTuple):
    """A conversion that goes on."""

    checkpoint: Checkpoint
    params: Model  # of `Param`: of what stays in float, in the dtype that it is written in
    table: Model  # of `Source`
    out: Path
    plan: Mapping[str, Any]  # what decides the result

    @property
    def unfinished(self) -> Path:
        return self.out / UNFINISHED

    @property
    def total(self) -> int:
        """Layers and MTP modules."""
        return self.checkpoint.cfg.layers + self.checkpoint.cfg.mtp_layers

    def shard(self, number: int) -> str:
        """The file of a layer; that of what is in no layer comes last."""
        return f"model-{number + 1:05}-of-{self.total + 1:05}.safetensors"


def convert(
    source: Path, out: Path, tokens_st: Int[np.ndarray, "s t"], parts: Parts, show: Show = lambda done, total: None
) -> list[LayerReport]:
    """Writes a checkpoint with INT8 weights, in the format of compressed-tensors; tells how each layer became that.

    Stopped, it goes on where it was if it is asked for the same again; once done, there is nothing to do. Raises
    CheckpointError if the folder holds something else: nothing is overwritten.
    """
    checkpoint = hf.open_checkpoint(source)
    if any(map(is_quantized, jax.tree.leaves(checkpoint.table, is_leaf=is_quantized))):
        raise CheckpointError(f"{source} is INT8 already; calibrate the model that it was made from")
    params = model_params(checkpoint.cfg, written_dtype(checkpoint.raw), biases=parts.compensation)
    work = Work(checkpoint, params, sources(checkpoint.cfg, params), out, _plan(source, tokens_st, parts))
    if (reports := _finished(work)) is not None:
        return reports
    begun = _begin(work)
    show(begun.done if begun else 0, work.total)
    for each in calibrate(checkpoint.read, checkpoint.cfg, tokens_st, parts, begun):
        _keep(work, each)
        show(each.number + 1, work.total)
    return _finish(work, source)


def written_dtype(raw: Mapping[str, Any]) -> Any:
    """That of weights that stay in float: the checkpoint's own."""
    return jnp.dtype(raw.get("dtype") or raw.get("torch_dtype") or "float32")


def _finished(work: Work) -> list[LayerReport] | None:
    """What was told of the same work, if it is done."""
    path = work.out / REPORT
    if work.unfinished.exists() or not path.exists():
        return None
    told = json.loads(path.read_text())
    same = all(told.get(name) == value for name, value in work.plan.items())
    return [_report(*layer.values()) for layer in told["layers"]] if same else None


def _plan(source: Path, tokens_st: np.ndarray, parts: Parts) -> dict[str, Any]:
    """What decides the result; the files by size and time, for they may be large."""
    stats = {path.name: path.stat() for path in sorted(source.glob("*.safetensors"))}
    files = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
    text = hashlib.sha256(np.ascontiguousarray(tokens_st).tobytes()).hexdigest()
    plan = {"model": files, "config": hf.read_json(source), "parts": parts._asdict()}
    return plan | {"text": [text, *tokens_st.shape]}


def _begin(work: Work) -> Walk | None:
    """Where the work stands: nowhere in a new folder."""
    path = work.unfinished / "plan.json"
    if path.exists():
        known = json.loads(path.read_text())
        other = [name for name, value in work.plan.items() if known.get(name) != value]
        if other:
            raise CheckpointError(
                f"{work.out} was begun with another {' and '.join(other)}; repeat it as it was, or name another folder"
            )
        return _states(work)
    only_begun = work.unfinished.is_dir() and list(work.out.iterdir()) == [work.unfinished]
    if not only_begun:
        check_new(work.out)
    work.unfinished.mkdir(parents=True, exist_ok=True)
    _write_json(path, work.plan)
    return None


def _states(work: Work) -> Walk | None:
    """The text as it left the last layer that is done."""
    path = work.unfinished / "states.npz"
    if not path.exists():
        return None
    with np.load(path) as found:
        return Walk(int(found["done"]), jnp.asarray(found["states"]))


def _keep(work: Work, each: Calibrated) -> None:
    """Writes a layer, its report, and then the states behind it: what counts as done."""
    layers = work.checkpoint.cfg.layers
    place = lambda model: model.layers[each.number] if each.number < layers else model.mtp[each.number - layers]  # noqa: E731
    tensors = to_tensors(place(work.table), _in_dtype(place(work.params), each.part))
    biases = {name: tensors.pop(name) for name in list(tensors) if name.endswith(OUTPUT_BIAS)}
    _write(work.out / work.shard(each.number), partial(save_file, tensors, metadata={"format": "pt"}))
    _write(work.unfinished / f"biases-{each.number}.safetensors", partial(save_file, biases))
    steps = {block: dict(steps) for block, steps in each.report.steps.items()}
    _write_json(work.unfinished / f"report-{each.number}.json", each.report._replace(steps=steps)._asdict())
    states = {"done": np.int64(each.number + 1), "states": np.asarray(each.states_td)}
    _write(work.unfinished / "states.npz", lambda path: _save_arrays(path, states))


def _in_dtype(params: Any, weights: Any) -> Any:
    """Weights that stayed in float, as they are written."""
    one = lambda w, p: w if is_quantized(w) else w.astype(p.dtype)  # noqa: E731
    return jax.tree.map(one, weights, params, is_leaf=is_quantized)


def _write(path: Path, how: Callable[[Path], Any]) -> None:
    """A file that is there whole or not at all."""
    part = path.with_name(path.name + ".part")
    how(part)
    os.replace(part, path)


def _write_json(path: Path, content: Any) -> None:
    _write(path, lambda part: part.write_text(json.dumps(content, indent=1) + "\n"))


def _save_arrays(path: Path, arrays: dict[str, Any]) -> None:
    with path.open("wb") as file:  # by its name, NumPy would add an ending
        np.savez(file, **arrays)


def _finish(work: Work, source: Path) -> list[LayerReport]:
    """Writes what is in no layer, and what says where all is; then the work is done."""
    rest = lambda model: model._replace(layers=(), mtp=())  # noqa: E731
    floats = _in_dtype(rest(work.params), work.checkpoint.read(rest))
    tensors = to_tensors(rest(work.table), floats)
    _write(work.out / work.shard(work.total), partial(save_file, tensors, metadata={"format": "pt"}))
    biases = {}
    for number in range(work.total):
        biases |= load_file(work.unfinished / f"biases-{number}.safetensors")
    if biases:
        _write(work.out / COMPENSATION, partial(save_file, biases))
    layers = [json.loads((work.unfinished / f"report-{number}.json").read_text()) for number in range(work.total)]
    _describe(work, source)
    _write_json(work.out / REPORT, {**work.plan, "layers": layers})
    os.replace(work.unfinished, done := work.out / ".done")  # at once, so that it is never half there
    shutil.rmtree(done)
    return [_report(*layer.values()) for layer in layers]


def _describe(work: Work, source: Path) -> None:
    """Writes the index and the config, and copies the tokenizer and what else is no weights."""
    shards = [work.out / work.shard(number) for number in range(work.total + 1)]
    places = {name: path.name for path in shards for name in open_file(path)}
    _write_json(work.out / INDEX, {"metadata": {}, "weight_map": places})
    for path in source.iterdir():
        known = path.name in (DESCRIPTION, INDEX) or (work.out / path.name).exists()
        if path.suffix in {".json", ".jinja"} and not known:
            _write(work.out / path.name, partial(shutil.copy, path))
    is_codes = lambda each: QArray(each, each) if each.names[0] + "_scale" in places else each  # noqa: E731
    config = quantization_config(work.table, jax.tree.map(is_codes, work.table))
    raw = {key: value for key, value in work.checkpoint.raw.items() if key != "quantization_config"}
    _write_json(work.out / "config.json", raw | {"quantization_config": config})


def _report(steps: Mapping[str, Mapping[str, float]], kept: list[str], starved: list[int]) -> LayerReport:
    """What was JSON."""
    lost = {block: [Step(*each) for each in parts.items()] for block, parts in steps.items()}
    return LayerReport(lost, tuple(kept), tuple(starved))
