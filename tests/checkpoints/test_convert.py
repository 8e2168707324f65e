import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxserve.checkpoints import convert as subject
from jaxserve.checkpoints import hf
from jaxserve.checkpoints.calibrate import calibrate_model
from jaxserve.checkpoints.convert import convert
from jaxserve.checkpoints.quantize import Parts
from jaxserve.layers.int8 import is_quantized
from jaxserve.layers.transformer import forward, logits
from jaxserve.parallel.errors import CheckpointError
from tests.layers.helpers import batch_of, empty_cache, page_table, random_tokens

NONE = Parts(*(False,) * len(Parts._fields))
BIASES = NONE._replace(compensation=True)


@pytest.fixture
def folder(write_folder, v3) -> Path:
    raw, tensors = v3
    found = write_folder(raw, tensors)
    (found / "tokenizer.json").write_text("{}")
    return found


def tokens(folder: Path, seed: int = 0) -> np.ndarray:
    cfg = hf.open_checkpoint(folder).cfg
    return random_tokens(cfg, np.random.default_rng(seed), 4 * 17).reshape(4, 17)


def stop_after_one(done: int, total: int) -> None:
    """Ends the work when a layer is done."""
    if done == 1:
        raise KeyboardInterrupt


def same(one, other) -> bool:
    pairs = zip(*map(jax.tree.leaves, (one, other)), strict=True)
    return jax.tree.structure(one) == jax.tree.structure(other) and all(np.array_equal(*pair) for pair in pairs)


@pytest.mark.parametrize("parts", [NONE, BIASES])
def test_what_is_written_is_what_calibration_gives(folder, tmp_path, parts):
    reports = convert(folder, tmp_path / "out", tokens(folder), parts)
    cfg, model = hf.load(folder)
    expected, told = calibrate_model(model, cfg, tokens(folder), parts)
    assert same(hf.load(tmp_path / "out")[1], expected)
    assert reports == told
    assert not (tmp_path / "out" / "unfinished").exists()


def test_other_engines_find_only_what_the_format_has(folder, tmp_path):
    convert(folder, out := tmp_path / "out", tokens(folder), BIASES)
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index.values()) == {f"model-{i:05}-of-00004.safetensors" for i in range(1, 5)}
    assert not any("bias" in name and "correction" not in name for name in index)
    biases = load_file(out / "compensation.safetensors")
    assert set(biases) == {f"model.layers.{i}.{at}.output_bias" for i in range(3) for at in ("self_attn", "mlp")}
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["format"] == "int-quantized"
    assert (out / "tokenizer.json").exists()
    assert index["model.layers.1.mlp.experts.0.up_proj.weight_scale"]


def test_work_that_was_stopped_goes_on_where_it_was(folder, tmp_path, monkeypatch):
    convert(folder, tmp_path / "whole", tokens(folder), NONE)
    shown = []

    def stop(done: int, total: int) -> None:
        shown.append((done, total))
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(folder, tmp_path / "out", tokens(folder), NONE, stop)
    with pytest.raises(CheckpointError):
        hf.load(tmp_path / "out")
    again = []
    real = subject.calibrate
    monkeypatch.setattr(
        subject, "calibrate", lambda *given: (again.append(each.number) or each for each in real(*given))
    )
    reports = convert(folder, tmp_path / "out", tokens(folder), NONE, lambda done, total: shown.append((done, total)))
    assert again == [2]
    assert shown == [(0, 3), (1, 3), (2, 3), (2, 3), (3, 3)]
    assert same(hf.load(tmp_path / "out")[1], hf.load(tmp_path / "whole")[1])
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert len(reports) == 3


def test_unfinished_work_is_not_mixed_with_other(folder, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        convert(folder, tmp_path / "out", tokens(folder), NONE, stop_after_one)
    with pytest.raises(CheckpointError, match="was begun with another parts and text"):
        convert(folder, tmp_path / "out", tokens(folder, seed=1), BIASES)


def test_nothing_is_overwritten(folder, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists and is not empty; name another folder"):
        convert(folder, tmp_path, tokens(folder), NONE)
    with pytest.raises(CheckpointError, match="exists and is a file"):
        convert(folder, tmp_path / "mine.txt", tokens(folder), NONE)


def test_the_report_tells_what_each_part_did(folder, tmp_path):
    reports = convert(folder, tmp_path / "out", tokens(folder), BIASES)
    told = json.loads((tmp_path / "out" / "quantization_report.json").read_text())
    assert told["parts"] == BIASES._asdict()
    assert [layer["steps"]["attn"] for layer in told["layers"]] == [dict(each.steps["attn"]) for each in reports]


def test_biases_are_added_when_the_model_runs(folder, tmp_path):
    """Without them the same codes give other scores."""
    convert(folder, tmp_path / "out", tokens(folder), BIASES)
    cfg, model = hf.load(tmp_path / "out")
    bare = model._replace(layers=tuple(p._replace(attn_bias=None, ffn_bias=None) for p in model.layers))
    assert any(is_quantized(leaf) for leaf in jax.tree.leaves(bare, is_leaf=is_quantized))
    batch = batch_of([tokens(folder)[0]], page_table(1, 3))
    found, without = (
        logits(each, forward(each, batch, empty_cache(cfg, 3, 8), cfg).hidden_td) for each in (model, bare)
    )
    assert 0 < np.abs(found - without).max() < 0.1 * np.abs(found).max()


@pytest.mark.parametrize("after", range(1, 20, 2))
def test_work_that_is_killed_between_any_two_writes_goes_on(folder, tmp_path, monkeypatch, after):
    """Every file comes to its place by `os.replace`, so that is where a kill can make a difference."""
    convert(folder, tmp_path / "whole", tokens(folder), NONE)
    left = [after]
    real = os.replace

    def replace(*paths) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        real(*paths)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        convert(folder, tmp_path / "out", tokens(folder), NONE)
    monkeypatch.setattr(os, "replace", real)
    reports = convert(folder, tmp_path / "out", tokens(folder), NONE)
    whole, out = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("whole", "out"))
    assert whole == out
    assert convert(folder, tmp_path / "out", tokens(folder), NONE) == reports  # there is nothing left to do


def test_a_source_that_has_changed_is_another_model(folder, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        convert(folder, tmp_path / "out", tokens(folder), NONE, stop_after_one)
    os.utime(folder / "model.safetensors", (1, 1))
    with pytest.raises(CheckpointError, match="was begun with another model"):
        convert(folder, tmp_path / "out", tokens(folder), NONE)


def test_a_model_that_is_int8_already_is_refused(folder, tmp_path):
    convert(folder, tmp_path / "out", tokens(folder), NONE)
    with pytest.raises(CheckpointError, match="is INT8 already"):
        convert(tmp_path / "out", tmp_path / "again", tokens(folder), NONE)
    assert not (tmp_path / "again").exists()


def test_a_folder_with_something_beside_unfinished_work_is_left_alone(folder, tmp_path):
    (tmp_path / "out" / "unfinished").mkdir(parents=True)
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is not empty"):
        convert(folder, tmp_path / "out", tokens(folder), NONE)
