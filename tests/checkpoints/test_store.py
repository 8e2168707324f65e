import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from jaxserve.checkpoints import hf, store
from jaxserve.layers.transformer import model_params
from jaxserve.parallel.errors import CheckpointError
from jaxserve.parallel.sharding import shardings
from tests.oracles import goldens_folder

NAME = "deepseek_v3"
RULES = {"e": "die"}


def mesh(count: int) -> Mesh:
    return jax.make_mesh(
        (1, count), ("node", "die"), axis_types=(AxisType.Explicit,) * 2, devices=jax.devices()[:count]
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    cfg, model = hf.load(goldens_folder() / NAME)
    folder = tmp_path_factory.mktemp("saved") / NAME
    store.save(folder, model, goldens_folder() / NAME)
    return folder, cfg, model


@pytest.mark.parametrize("count", [1, 2, 4])
def test_what_was_saved_on_one_device_restores_on_others_with_the_same_values(saved, count):
    folder, cfg, model = saved
    placement = shardings(model_params(cfg), mesh(count), RULES)
    restored_cfg, restored = store.restore(folder, jnp.float32, placement)
    assert restored_cfg == cfg
    assert restored.layers[1].ffn.experts.w_up.sharding.num_devices == count
    jax.tree.map(np.testing.assert_array_equal, restored, model)


def test_what_was_saved_on_four_devices_restores_on_one(saved, tmp_path):
    folder, cfg, model = saved
    spread = store.restore(folder, jnp.float32, shardings(model_params(cfg), mesh(4), RULES))[1]
    store.save(tmp_path / "again", spread, folder)
    jax.tree.map(np.testing.assert_array_equal, store.restore(tmp_path / "again", jnp.float32)[1], model)


def test_restoring_converts_the_dtype(saved):
    folder, _, model = saved
    restored = store.restore(folder, jnp.bfloat16)[1]
    np.testing.assert_array_equal(restored.embed, model.embed.astype(jnp.bfloat16))


def test_nothing_is_overwritten(saved):
    folder, _, model = saved
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        store.save(folder, model, goldens_folder() / NAME)


def test_weights_that_do_not_fit_the_config_are_refused(saved, tmp_path):
    folder, _, model = saved
    store.save(tmp_path / "x", model, folder)
    config = (tmp_path / "x" / "config.json").read_text()
    (tmp_path / "x" / "config.json").write_text(config.replace('"kv_lora_rank": ', '"kv_lora_rank": 1'))
    with pytest.raises(
        CheckpointError, match=r"misshapen: layers.0.attn.w_dkv is \(16, 48\), config.json makes it \(116, 48\)"
    ):
        store.restore(tmp_path / "x", jnp.float32)


@pytest.mark.parametrize("harm", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-5])])
def test_a_file_that_is_gone_or_cut_off_is_named(saved, tmp_path, harm):
    folder, _, model = saved
    store.save(tmp_path / "y", model, folder)
    victim = max((tmp_path / "y" / "weights").rglob("*"), key=lambda path: path.stat().st_size)
    harm(victim)
    with pytest.raises(CheckpointError, match=rf"{victim.name} gone or cut off"):
        store.restore(tmp_path / "y", jnp.float32)


def test_a_folder_without_its_list_of_files_is_named(saved, tmp_path):
    folder, _, model = saved
    store.save(tmp_path / "z", model, folder)
    (tmp_path / "z" / "weights.json").unlink()
    with pytest.raises(CheckpointError, match="weights.json can't be read"):
        store.restore(tmp_path / "z", jnp.float32)
