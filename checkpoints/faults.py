"""What can be wrong with the tensors of a checkpoint, all of it at once: whoever repairs one wants to do it once."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.checkpoints.safetensors import FLOATS
from jaxserve.checkpoints.sources import Source
from jaxserve.checkpoints.tensors import Tensors
from jaxserve.parallel.errors import CheckpointError

Shapes = dict[str, tuple[int, ...]]


def check_tensors(tensors: Tensors, table: Any, copies: dict[str, str]) -> None:
    """Raises CheckpointError unless there is what the table of `Source` needs, and nothing else but some `copies`."""
    stacks = jax.tree.leaves(table)
    expected = {name: source.shape for source in stacks for name in source.names}
    expected |= {copy: expected[original] for copy, original in copies.items() if copy in tensors.table}
    present = {name: shape for name, shape in expected.items() if name in tensors.table}
    others = [fault for name in present if (fault := _unreadable(tensors, name))]
    others += [fault for name, shape in present.items() if len(shape) == 2 and (fault := _otherwise(tensors, name))]
    others += [fault for source in stacks if (fault := _in_part(tensors, source))]
    for name, shape in present.items():
        if len(shape) == 2:
            beside, faults = _beside(tensors, name, shape)
            expected |= beside
            others += faults
    found = {name: t.shape for name, t in tensors.table.items() if not name.endswith("rotary_emb.inv_freq")}
    check_shapes(found, expected, tensors.folder, others)


def check_shapes(found: Shapes, expected: Shapes, folder: Path, others: Sequence[str] = ()) -> None:
    """Raises CheckpointError with everything that is wrong, `others` too."""
    faults = [f"missing: {name} {shape}" for name, shape in expected.items() if name not in found]
    faults += [f"unexpected: {name} {shape}" for name, shape in found.items() if name not in expected]
    faults += [
        f"misshapen: {name} is {found[name]}, config.json makes it {shape}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    faults += others
    if faults:
        raise CheckpointError(f"{folder} does not fit its config.json, {len(faults)} faults:\n  " + "\n  ".join(faults))


def not_finite(names: Iterable[str], dtype: Any, folder: Path) -> CheckpointError:
    """What to raise for weights with values that are no numbers to compute with."""
    return CheckpointError(
        f"{folder}: {', '.join(names)} has values that are NaN or infinite in {jnp.dtype(dtype)}; "
        "fetch or save it again, or load it in a wider dtype"
    )


def _beside(tensors: Tensors, name: str, shape: tuple[int, ...]) -> tuple[Shapes, list[str]]:
    """What must or may lie beside a matrix of codes, and what is wrong with the dtype of its scales."""
    form = tensors.format_of(name)
    if form is None:
        return {}, []
    scale, shapes = name + form.suffix, form.scale_shapes(shape)
    dropped = {one: shape for one, shape in form.beside(name, shape[0]).items() if one in tensors.table}
    there = tensors.table.get(scale)
    if there is None:
        return dropped | {scale: shapes[0]}, []
    faults = [] if there.dtype in FLOATS else [f"not supported: {scale} of dtype {there.dtype}"]
    return dropped | {scale: there.shape if there.shape in shapes else shapes[0]}, faults


def _unreadable(tensors: Tensors, name: str) -> str:
    """Why a tensor's values can't be read, or nothing."""
    tensor, form = tensors.table[name], tensors.format_of(name)
    if form is None and tensor.dtype not in FLOATS:
        if tensor.dtype == "I8":
            return f"not supported: {name} of dtype I8, and no format that says what its scales are"
        return f"not supported: {name} of dtype {tensor.dtype}; supported: {', '.join(FLOATS)}, and formats of INT8"
    if form and len(tensor.shape) != 2:
        return f"not supported: {name} of dtype {tensor.dtype} and shape {tensor.shape}; only matrices have scales"
    return ""


def _otherwise(tensors: Tensors, name: str) -> str:
    """How a matrix is stored if that is not what its format says, or nothing."""
    announced, dtype = tensors.format.announced(name.removesuffix(".weight")), tensors.table[name].dtype
    if announced is None or announced == (dtype == tensors.format.codes):
        return ""
    said = f"{tensors.format.codes} codes" if announced else "floats"
    return f"not as announced: {name} of dtype {dtype}; {tensors.format.name} says that it has {said}"


def _in_part(tensors: Tensors, source: Source) -> str:
    """Which experts of a matrix are codes, if not all are, or nothing."""
    there = [name for name in source.names if name in tensors.table]
    codes = [name for name in there if tensors.table[name].dtype == "I8"]
    if len(codes) in (0, len(there)):
        return ""
    floats = [name for name in there if name not in codes]
    return f"INT8 in part: {len(codes)} experts are, {', '.join(floats)} not; all must be, or none"
