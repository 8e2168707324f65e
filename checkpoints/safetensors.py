"""A folder of safetensors files as one table of tensors, read where it is mapped, without a copy."""

import json
import math
import mmap
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from jaxserve.parallel.errors import CheckpointError

DTYPES = {
    "BF16": ml_dtypes.bfloat16,
    "F16": np.float16,
    "F32": np.float32,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "I8": np.int8,
    "I32": np.int32,
}
INDEX = "model.safetensors.index.json"
COMPENSATION = "compensation.safetensors"
"""Beside the shards, and not in their index: what other engines have no place for, and need not read."""

FLOATS = ("BF16", "F16", "F32")
"""Those of weights that need no scale."""


class Tensor(NamedTuple):
    """Where a tensor lies."""

    path: Path
    dtype: str  # a key of DTYPES, or another of the format's that is not read here
    shape: tuple[int, ...]
    offset: int  # bytes from the file's start
    file: mmap.mmap

    def read(self) -> np.ndarray:
        """The values, as a view of the file: bytes are read when they are used."""
        count = math.prod(self.shape)
        return np.frombuffer(self.file, DTYPES[self.dtype], count, self.offset).reshape(self.shape)


def open_folder(folder: Path) -> dict[str, Tensor]:
    """All tensors by name: of the shards that the index lists and of COMPENSATION, or of every file without an index.

    Raises CheckpointError that names the file that is missing or damaged, or the tensor that is in two files.
    """
    tensors: dict[str, Tensor] = {}
    for path in _files(folder):
        for name, tensor in open_file(path).items():
            if name in tensors:
                raise CheckpointError(f"tensor {name} is in {tensors[name].path.name} and in {path.name} of {folder}")
            tensors[name] = tensor
    return tensors


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.exists():
        try:
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            missing = [name for name in shards if not (folder / name).exists()]
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index} is damaged ({error!r}); fetch it again") from None
        if missing:
            raise CheckpointError(f"{folder} lacks {len(missing)} of {len(shards)} shards: {', '.join(missing)}")
        return [folder / name for name in shards] + list(folder.glob(COMPENSATION))
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise CheckpointError(f"{folder} holds no *.safetensors; a Hugging Face model in that format is needed")
    return found


def open_file(path: Path) -> dict[str, Tensor]:
    """The tensors of one file; the library checks that the header is sound and the file as long as it says."""
    try:
        with safetensors.safe_open(path, "numpy"):
            pass
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or cut off ({error}); fetch it again") from None
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    start = 8 + int.from_bytes(mapped[:8], "little")
    header = json.loads(mapped[8:start])
    header.pop("__metadata__", None)
    return {
        name: Tensor(path, entry["dtype"], tuple(entry["shape"]), start + entry["data_offsets"][0], mapped)
        for name, entry in header.items()
    }
