import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxserve.checkpoints.safetensors import DTYPES, open_file, open_folder
from jaxserve.parallel.errors import CheckpointError

INDEX = "model.safetensors.index.json"
TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array([1.5, -2.0], ml_dtypes.bfloat16)}


def shards(folder: Path) -> Path:
    """A folder with each tensor in a file of its own, and the index."""
    for name, tensor in TENSORS.items():
        save_file({name: tensor}, folder / f"{name}.safetensors", {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"weight_map": {name: f"{name}.safetensors" for name in TENSORS}}))
    return folder


@pytest.mark.parametrize(("name", "dtype"), DTYPES.items())
def test_values_of_every_dtype_are_read_as_they_were_written(tmp_path, name, dtype):
    values = np.array([[0, 1, -2], [3, 4, -5]]).astype(dtype)
    save_file({"first": np.zeros(3, np.float32), "w": values}, tmp_path / "m.safetensors")
    tensor = open_file(tmp_path / "m.safetensors")["w"]
    assert (tensor.dtype, tensor.shape) == (name, (2, 3))
    assert tensor.read().dtype == dtype
    np.testing.assert_array_equal(tensor.read(), values)


def test_scalars_and_empty_tensors_are_read(tmp_path):
    save_file({"one": np.array(7.0, np.float32), "none": np.zeros((0, 3), np.float32)}, tmp_path / "m.safetensors")
    tensors = open_file(tmp_path / "m.safetensors")
    assert tensors["one"].read() == 7.0 and tensors["none"].read().shape == (0, 3)


def test_reading_copies_nothing(tmp_path):
    save_file(TENSORS, tmp_path / "m.safetensors")
    values = open_file(tmp_path / "m.safetensors")["a"].read()
    assert not values.flags.owndata and not values.flags.writeable


def test_a_dtype_that_is_not_read_here_is_listed_all_the_same(tmp_path):
    save_file({"w": np.zeros(2, np.float64)}, tmp_path / "m.safetensors")
    assert open_file(tmp_path / "m.safetensors")["w"].dtype == "F64"


def test_the_shards_of_the_index_make_one_table(tmp_path):
    tensors = open_folder(shards(tmp_path))
    assert tensors.keys() == TENSORS.keys()
    for name, expected in TENSORS.items():
        np.testing.assert_array_equal(tensors[name].read(), expected)


def test_files_that_the_index_does_not_list_are_left_alone(tmp_path):
    save_file({"other": np.zeros(2, np.float32)}, shards(tmp_path) / "consolidated.safetensors")
    assert open_folder(tmp_path).keys() == TENSORS.keys()


def test_without_an_index_every_file_counts(tmp_path):
    (shards(tmp_path) / INDEX).unlink()
    assert open_folder(tmp_path).keys() == TENSORS.keys()


def test_a_tensor_in_two_files_is_named_with_both(tmp_path):
    (shards(tmp_path) / INDEX).unlink()
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "z.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor a is in a\.safetensors and in z\.safetensors"):
        open_folder(tmp_path)


def test_shards_that_are_missing_are_named(tmp_path):
    (shards(tmp_path) / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks 1 of 2 shards: b\.safetensors"):
        open_folder(tmp_path)


def test_a_folder_without_weights_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=rf"{tmp_path.name} holds no \*\.safetensors"):
        open_folder(tmp_path)


@pytest.mark.parametrize("content", ["{", "", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', "\0\xff"])
def test_a_damaged_index_is_named(tmp_path, content):
    (shards(tmp_path) / INDEX).write_text(content, encoding="latin-1")
    with pytest.raises(CheckpointError, match=rf"{INDEX} is damaged"):
        open_folder(tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 60, 0.5, -1])
def test_a_file_that_is_cut_off_is_named(tmp_path, kept):
    path = shards(tmp_path) / "a.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    with pytest.raises(CheckpointError, match=r"a\.safetensors is damaged or cut off"):
        open_folder(tmp_path)


@pytest.mark.parametrize("garbage", [b"garbage", b"<html>" * 100, bytes(64), (5).to_bytes(8, "little") + b"[1,2]"])
def test_a_file_of_something_else_is_named(tmp_path, garbage):
    (shards(tmp_path) / "b.safetensors").write_bytes(garbage)
    with pytest.raises(CheckpointError, match=r"b\.safetensors is damaged or cut off"):
        open_folder(tmp_path)
