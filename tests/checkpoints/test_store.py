import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from jaxserve.checkpoints import hf, store
from jaxserve.layers.int8 import in_int8, is_quantized, quantize_model
from jaxserve.layers.transformer import model_params
from jaxserve.parallel.errors import CheckpointError, ShardingError
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
    restored_cfg, restored = store.restore(folder, jnp.float32, mesh(count), RULES)
    assert restored_cfg == cfg
    assert restored.layers[1].ffn.experts.w_up.sharding.num_devices == count
    jax.tree.map(np.testing.assert_array_equal, restored, model)


def test_what_was_saved_on_four_devices_restores_on_one(saved, tmp_path):
    folder, _, model = saved
    spread = store.restore(folder, jnp.float32, mesh(4), RULES)[1]
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


def test_a_file_in_the_folder_s_place_is_left_alone(saved, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="file exists and is a file"):
        store.save(tmp_path / "file", saved[2], saved[0])
    assert (tmp_path / "file").read_text() == "mine"


def test_rules_without_a_mesh_are_refused(saved):
    with pytest.raises(ShardingError, match=r"rules = .*need a mesh"):
        store.restore(saved[0], jnp.float32, rules=RULES)


def test_progress_rises_layer_by_layer_to_all_bytes(saved):
    calls: list[tuple[int, int]] = []
    _, model = store.restore(saved[0], jnp.bfloat16, progress=lambda done, total: calls.append((done, total)))
    done = [so_far for so_far, _ in calls]
    assert len(calls) > len(model.layers) and done == sorted(set(done))
    assert {total for _, total in calls} == {done[-1]} == {sum(leaf.nbytes for leaf in jax.tree.leaves(model))}


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("count", [1, 4])
def test_weights_that_are_not_finite_are_named(saved, tmp_path, value, count):
    folder, _, model = saved
    first, *others = model.layers
    broken = model._replace(layers=(first._replace(attn_norm=first.attn_norm.at[-1].set(value)), *others))
    store.save(tmp_path / "broken", broken, folder)
    with pytest.raises(CheckpointError, match=r": layers\.0\.attn_norm has values that are NaN or infinite in float32"):
        store.restore(tmp_path / "broken", jnp.float32, mesh(count), RULES)


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


@pytest.fixture(scope="module")
def saved_int8(saved, tmp_path_factory):
    """A model whose matrices are INT8, but for those of the first layer."""
    folder, cfg, whole = saved
    model = quantize_model(whole, in_int8(model_params(cfg)))
    model = model._replace(layers=(whole.layers[0], *model.layers[1:]))
    place = tmp_path_factory.mktemp("int8") / NAME
    store.save(place, model, folder)
    return place, cfg, model


@pytest.mark.parametrize("count", [None, 4])
def test_what_is_int8_is_restored_as_it_is_and_where_it_belongs(saved_int8, count):
    folder, _, model = saved_int8
    restored = store.restore(folder, jnp.float32, *((mesh(count), RULES) if count else ()))[1]
    jax.tree.map(np.testing.assert_array_equal, restored, model)
    params = store.open_store(folder).params()
    assert [p.nbytes for p in jax.tree.leaves(params)] == [w.nbytes for w in jax.tree.leaves(model)]
    assert restored.layers[1].ffn.experts.w_up.scale.sharding.num_devices == (count or 1)


@pytest.mark.parametrize("count", [None, 4])
def test_restoring_rounds_what_is_not_int8_yet_if_asked_to(saved_int8, count):
    folder, cfg, model = saved_int8
    restored = store.restore(folder, jnp.float32, *((mesh(count), RULES) if count else ()), int8=True)[1]
    jax.tree.map(np.testing.assert_array_equal, restored, quantize_model(model, in_int8(model_params(cfg))))
    assert is_quantized(restored.layers[0].attn.w_o) and not is_quantized(model.layers[0].attn.w_o)


def test_nothing_beside_the_weights_says_of_what_kind_they_are(saved, tmp_path):
    folder, cfg, model = saved
    other = tmp_path / "other"
    other.mkdir()
    raw = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "w8a8_int8"}}
    (other / "config.json").write_text(json.dumps(raw))
    (other / "quant_model_description.json").write_text("{}")
    store.save(tmp_path / "again", model, other)
    assert not (tmp_path / "again" / "quant_model_description.json").exists()
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())


def test_scales_that_do_not_divide_the_codes_are_refused(saved_int8, tmp_path):
    folder, _, model = saved_int8
    attn = model.layers[1].attn
    broken = attn._replace(w_dkv=attn.w_dkv._replace(scale=jnp.ones((5, 1))))
    layers = (model.layers[0], model.layers[1]._replace(attn=broken), *model.layers[2:])
    store.save(tmp_path / "broken", model._replace(layers=layers), folder)
    with pytest.raises(CheckpointError, match=r"layers\.1\.attn\.w_dkv\.scale \(5, 1\)"):
        store.restore(tmp_path / "broken", jnp.float32)
