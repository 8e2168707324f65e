import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxserve.checkpoints import cached, hf, store
from jaxserve.checkpoints.blocks import Blocks
from jaxserve.layers.int8 import is_int8
from jaxserve.parallel.mesh import make_mesh
from jaxserve.parallel.sharding import place, shardings
from tests.layers.helpers import GOLDEN_NAMES, GOLDENS
from tests.oracles import goldens_folder

FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}


def keep(blocks: Blocks, folder: Path, dtype: Any = jnp.float32, int8: bool = False, progress=None) -> cached.Cached:
    """A folder's weights, kept and mapped."""
    cached.fill(blocks, "name", folder, hf.open_checkpoint(folder), dtype, int8, progress)
    found = cached.find(blocks, "name", folder, dtype, int8)
    assert found
    return found


def assert_same(found: Any, expected: Any) -> None:
    """The same trees of the same bits."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@pytest.mark.parametrize(
    ("dtype", "int8"), [("float32", False), ("bfloat16", False), ("float32", True), ("bfloat16", True)]
)
@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_weights_are_those_of_the_direct_load_bit_by_bit(tmp_path, name, dtype, int8):
    """MTP modules, tied embeddings, latent and grouped attention are among them."""
    folder = GOLDENS / name
    found = keep(Blocks(tmp_path), folder, jnp.dtype(dtype), int8)
    cfg, expected = hf.load(folder, jnp.dtype(dtype), int8=int8)
    assert found.cfg == cfg
    assert_same(found.read(), expected)
    described = jax.tree.map(lambda p: (p.shape, jnp.dtype(p.dtype)), found.params())
    assert described == jax.tree.map(lambda w: (w.shape, w.dtype), expected)


@pytest.mark.parametrize("int8", [False, True])
def test_fp8_files_are_kept_as_what_is_made_of_them(write_folder, v3, tmp_path, int8):
    raw, tensors = v3
    codes, rng = {}, np.random.default_rng(0)
    for name, w in tensors.items():
        matrix = w.ndim == 2 and not any(part in name for part in ("mlp.gate.weight", "embed_tokens", "lm_head"))
        codes[name] = np.clip(100 * w, -448, 448).astype(ml_dtypes.float8_e4m3fn) if matrix else w
        if matrix:
            blocks = [-(-size // 128) for size in w.shape]
            codes[f"{name}_scale_inv"] = rng.uniform(0.005, 0.02, blocks).astype(np.float32)
    folder = write_folder(raw | FP8, codes)
    assert_same(keep(Blocks(tmp_path / "kept"), folder, int8=int8).read(), hf.load(folder, int8=int8)[1])


def test_an_mtp_module_that_the_files_lack_is_not_made_up(write_folder, v3, tmp_path):
    raw, tensors = v3
    folder = write_folder(raw, {name: w for name, w in tensors.items() if not name.startswith("model.layers.2.")})
    with pytest.warns(UserWarning, match="without multi-token prediction"):
        found = keep(Blocks(tmp_path / "kept"), folder)
    assert found.cfg.mtp_layers == 0 and found.read().mtp == ()


def test_a_checkpoint_of_our_own_is_kept_too(tmp_path):
    cfg, model = hf.load(goldens_folder() / "deepseek_v3")
    store.save(folder := tmp_path / "saved", model, goldens_folder() / "deepseek_v3")
    blocks = Blocks(tmp_path / "kept")
    cached.fill(blocks, "name", folder, store.open_store(folder), jnp.float32, True)
    found = cached.find(blocks, "name", folder, jnp.float32, True)
    assert found and found.cfg == cfg and is_int8(found.params())
    assert_same(found.read(), store.open_store(folder).read(jnp.float32, True))


def test_on_a_mesh_each_device_gets_its_part_of_what_is_mapped(tmp_path):
    folder, mesh = GOLDENS / "deepseek_v3", make_mesh(1, 4)
    found = keep(Blocks(tmp_path), folder)
    where = shardings(found.params(), mesh, {"e": "die"})
    expected = hf.load(folder, mesh=mesh, rules={"e": "die"})[1]
    placed = place(found.read(), where)
    assert jax.tree.map(lambda w: w.sharding, placed) == jax.tree.map(lambda w: w.sharding, expected)
    assert_same(placed, expected)


def test_progress_is_told_in_bytes(tmp_path):
    told: list[tuple[int, int]] = []
    found = keep(Blocks(tmp_path), GOLDENS / "qwen3", progress=lambda done, total: told.append((done, total)))
    size = sum(array.nbytes for array in found.arrays.values())
    assert told == sorted(told) and told[-1] == (size, size)


def touched(folder: Path) -> None:
    """Another file in place of the one that was there, of the same size and date."""
    path, before = folder / "model.safetensors", (folder / "model.safetensors").stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.unlink()
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def edited(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("{", "{ ", 1))


@pytest.mark.parametrize(("change", "known"), [(touched, False), (edited, False), (lambda folder: None, True)])
def test_files_that_have_changed_are_another_version(tmp_path, change, known):
    folder = tmp_path / "model"
    shutil.copytree(GOLDENS / "qwen3", folder)
    blocks = Blocks(tmp_path / "kept")
    keep(blocks, folder)
    change(folder)
    assert (cached.find(blocks, "name", folder, jnp.float32, False) is not None) == known
    if not known:
        assert_same(keep(blocks, folder).read(), hf.load(folder)[1])
        assert len(blocks.kept()) == 2


def test_a_file_of_the_hub_s_cache_is_known_by_its_checksum(tmp_path):
    """Wherever it lies: there, files are links to what is named so."""
    versions = []
    for home in ("one", "other"):
        folder = tmp_path / home / "snapshots" / "main"
        shutil.copytree(GOLDENS / "qwen3", folder)
        target = tmp_path / home / hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        shutil.move(folder / "model.safetensors", target)
        (folder / "model.safetensors").symlink_to(target)
        versions.append(cached.version_of(folder))
    assert versions[0] == versions[1] != cached.version_of(GOLDENS / "qwen3")


def test_forms_share_what_is_the_same_in_both(tmp_path):
    blocks = Blocks(tmp_path)
    one, other = (keep(blocks, GOLDENS / "qwen3", int8=int8) for int8 in (False, True))
    whole = sum({n: s for each in blocks.kept() for n, s in each.manifest.blocks.items()}.values())
    separate = sum(sum(array.nbytes for array in each.arrays.values()) for each in (one, other))
    assert whole == blocks.size() < separate - one.arrays["embed"].nbytes


def test_what_is_kept_but_does_not_fit_the_config_is_not_taken(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    shutil.copytree(GOLDENS / "qwen3", folder)
    blocks = Blocks(tmp_path / "kept")
    version = cached.version_of(folder)
    keep(blocks, folder)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"vocab_size": 97', '"vocab_size": 96'))
    monkeypatch.setattr(cached, "version_of", lambda folder: version)
    assert cached.find(blocks, "name", folder, jnp.float32, False) is None


def test_the_conversion_is_the_one_that_its_number_stands_for(tmp_path):
    """If this fails, the same files have become other weights: raise CONVERSION, and put the new digest here."""
    found = keep(Blocks(tmp_path), GOLDENS / "deepseek_v3", int8=True)
    told = [(name, array.dtype.name, array.shape, array.tobytes()) for name, array in sorted(found.arrays.items())]
    digest = hashlib.sha256(repr(told).encode()).hexdigest()
    assert (cached.CONVERSION, digest[:16]) == (1, "a92dfdda2c707b84")
