import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxserve import LLM, RequestError, SamplingParams
from jaxserve.checkpoints import hf
from jaxserve.checkpoints.blocks import SMALL, Blocks
from jaxserve.models import find_cache, is_kept, is_stale, open_cache, prefetch
from tests.jaxserve.conftest import SIZE, with_few_shapes

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    """Where the user's folder would be."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "jaxserve" / "models"


def load(folder: Path, **options) -> LLM:
    llm = LLM(folder, **SIZE | options)
    with_few_shapes(llm.engine)
    return llm


def said(llm: LLM) -> list[int]:
    return llm.generate([[5, 7, 11]], GREEDY)[0].outputs[0].token_ids


def weights(llm: LLM) -> list[Any]:
    return jax.tree.leaves(llm.engine._model)  # type: ignore[attr-defined]


def reads(monkeypatch) -> list[int]:
    """Grows by one each time a checkpoint's files are read."""
    found, read = [], hf.Checkpoint.read
    monkeypatch.setattr(hf.Checkpoint, "read", lambda *given, **more: found.append(1) or read(*given, **more))
    return found


@pytest.mark.parametrize("options", [{}, {"quantization": "int8"}, {"mesh": "1x2", "quantization": "int8"}])
def test_tokens_are_the_same_with_and_without_the_cache(tiny_folder, tmp_path, monkeypatch, options):
    expected = load(tiny_folder, model_cache="off", **options)
    tokens = said(expected)
    assert said(load(tiny_folder, model_cache=tmp_path / "kept", **options)) == tokens
    counted = reads(monkeypatch)
    again = load(tiny_folder, model_cache=tmp_path / "kept", **options)
    assert counted == []
    assert said(again) == tokens
    for one, other in zip(weights(again), weights(expected), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux tells what is mapped")
def test_large_weights_are_the_mapped_bytes_themselves(tmp_path):
    """On CPU; no copy is made from the file to what programs are given."""
    for _ in range(2):
        llm = LLM(model_cache=tmp_path / "kept", **SIZE)
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    ranges = [tuple(int(end, 16) for end in line[0].split("-")) for line in maps]
    large = [w for w in weights(llm) if w.nbytes > SMALL]
    assert large and all(any(a <= w.unsafe_buffer_pointer() < b for a, b in ranges) for w in large)


def test_nothing_is_kept_unless_a_folder_is_named_or_a_model_prefetched(tiny_folder, home, monkeypatch):
    load(tiny_folder)
    assert not home.exists() and find_cache(None) is None and find_cache("off") is None
    manifest = prefetch(tiny_folder, "auto", False, open_cache(), lambda *told: None)
    assert (manifest.model, manifest.form) == (str(tiny_folder.resolve()), "float32")
    counted = reads(monkeypatch)
    assert prefetch(tiny_folder, "auto", False, open_cache(), lambda *told: None) == manifest
    load(tiny_folder)
    assert counted == []
    load(tiny_folder, quantization="int8")
    assert counted and [each.manifest for each in open_cache().kept()] == [manifest]


def test_what_is_kept_and_damaged_is_made_anew(tiny_folder, home):
    manifest = prefetch(tiny_folder, "auto", False, open_cache(), lambda *told: None)
    tokens = said(load(tiny_folder, model_cache="off"))
    for path in (home / "blocks").iterdir():
        path.chmod(0o600)
        path.write_bytes(b"")
    assert said(load(tiny_folder)) == tokens
    assert open_cache().damaged(manifest) == []


def test_a_full_disk_is_told_and_the_model_runs_all_the_same(tiny_folder, tmp_path, monkeypatch):
    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(UserWarning, match="can't be kept in .*No space left"):
        llm = load(tiny_folder, model_cache=tmp_path / "kept")
    assert said(llm) == said(load(tiny_folder, model_cache="off"))
    with pytest.raises(RequestError, match="No space left"):
        prefetch(tiny_folder, "auto", True, Blocks(tmp_path / "kept"), lambda *told: None)
    assert list((tmp_path / "kept" / "blocks").iterdir()) == []


def test_a_folder_that_others_can_write_to_is_refused_and_the_user_s_is_passed_over(tiny_folder, tmp_path, home):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(RequestError, match="can't be used: others can write to it"):
        load(tiny_folder, model_cache=tmp_path / "open")
    home.mkdir(parents=True)
    home.chmod(0o777)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find_cache(None) is None


def test_a_folder_of_other_things_is_left_as_it_is(tiny_folder, tmp_path):
    (tmp_path / "notes").touch()
    with pytest.raises(RequestError, match="it has other things in it; name an empty folder"):
        load(tiny_folder, model_cache=tmp_path)
    with pytest.raises(RequestError, match="it is a file, not a folder"):
        load(tiny_folder, model_cache=tmp_path / "notes")
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


def test_a_version_is_stale_when_its_files_are_others_or_gone(tiny_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    cache = find_cache(tmp_path / "kept")
    assert cache
    manifest = prefetch(folder, "auto", False, cache.blocks, lambda *told: None)
    assert not is_stale(manifest)
    assert is_kept(cache, str(folder.resolve()), "auto", False)
    assert not is_kept(cache, str(folder.resolve()), "auto", True)
    assert not is_kept(cache, "/etc", "auto", False) and not is_kept(None, "embedded", "auto", False)
    (folder / "model.safetensors").touch()
    assert is_stale(manifest)
    prefetch(folder, "auto", False, cache.blocks, lambda *told: None)
    assert [is_stale(each.manifest) for each in cache.blocks.kept()] == [False, True]
    shutil.rmtree(folder)
    assert is_stale(manifest)
