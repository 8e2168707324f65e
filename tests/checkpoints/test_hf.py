import json
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh
from safetensors.numpy import load_file

from jaxserve.checkpoints import hf
from jaxserve.checkpoints.safetensors import Tensor, open_folder
from jaxserve.layers.config import Config
from jaxserve.layers.int8 import in_int8, quantize_model
from jaxserve.layers.transformer import model_params
from jaxserve.parallel.errors import CheckpointError, ConfigError, ShardingError
from jaxserve.parallel.sharding import shardings
from tests.layers.helpers import FAMILIES, GOLDEN_NAMES, GOLDENS, Weights, f64, published, random_model, raw_config
from tests.oracles import reference

FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
GATE = "model.layers.1.mlp.experts.5.gate_proj.weight"
QUERY = "model.layers.0.self_attn.q_a_proj.weight"
MTP = "model.layers.2"


def file_tensors(folder: Path) -> Weights:
    """All tensors of a folder, as the safetensors library reads them."""
    return {name: w for file in sorted(folder.glob("*.safetensors")) for name, w in load_file(file).items()}


def assert_same(actual: Weights, expected: Weights) -> None:
    """To the bit, under the same names."""
    assert actual.keys() == expected.keys()
    for name, w in expected.items():
        assert actual[name].dtype == w.dtype, name
        np.testing.assert_array_equal(actual[name], w, err_msg=name)


def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()).reshape(2, 4), ("node", "die"))


EXPERTS_SPLIT = {"e": ("node", "die")}


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_a_published_layout_loads_to_the_values_of_its_files(name):
    cfg, model = hf.load(GOLDENS / name)
    assert cfg == Config.from_hf(json.loads((GOLDENS / name / "config.json").read_text()))
    assert_same(published(model), file_tensors(GOLDENS / name))


@pytest.mark.parametrize("stored", [ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("asked", [jnp.float32, jnp.bfloat16])
def test_files_of_16_bits_load_to_the_dtype_that_is_asked_for(write_folder, v3, stored, asked):
    raw, tensors = v3
    halves = {name: w.astype(stored) for name, w in tensors.items()}
    _, model = hf.load(write_folder(raw, halves), dtype=asked)
    expected = {name: w.astype(np.float32 if "bias" in name else asked) for name, w in halves.items()}
    assert_same(published(model), expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_loads_to_the_same_bits_under_the_published_names(tmp_path, family, dtype):
    raw = raw_config(family, num_hidden_layers=2)
    cfg = Config.from_hf(raw)
    model = random_model(cfg, np.random.default_rng(1), dtype)
    hf.save(tmp_path / "new" / "folder", model, cfg, raw)
    assert_same(file_tensors(tmp_path / "new" / "folder"), published(model))
    again_cfg, again = hf.load(tmp_path / "new" / "folder", dtype)
    assert again_cfg == cfg
    assert_same(published(again), published(model))


def quantized(tensors: Weights, whole: tuple[str, ...] = ("embed_tokens", "lm_head")) -> tuple[Weights, Weights]:
    """Codes and scales of all matrices but the router's and those that stay `whole`, and the same values in float32."""
    rng, codes, twin = np.random.default_rng(2), {}, {}
    for name, w in tensors.items():
        if w.ndim < 2 or name.endswith("mlp.gate.weight") or any(part in name for part in whole):
            codes[name] = twin[name] = w
            continue
        blocks = [-(-n // 128) for n in w.shape]
        codes[name] = np.clip(100 * w, -448, 448).astype(ml_dtypes.float8_e4m3fn)
        codes[f"{name}_scale_inv"] = rng.uniform(0.005, 0.02, blocks).astype(np.float32)
        values = reference.dequantize_fp8_blocks(f64(codes[name]), codes[f"{name}_scale_inv"])
        twin[name] = values.astype(np.float32)
    return codes, twin


@pytest.fixture(scope="module")
def blocky() -> tuple[dict[str, Any], Weights, Weights]:
    """A DeepSeek-V3 whose matrices have several blocks, the last of them cut, and weights that begin amid a block."""
    sizes = {"hidden_size": 160, "kv_lora_rank": 140, "q_lora_rank": 130, "intermediate_size": 200}
    raw = raw_config("deepseek_v3", num_hidden_layers=2, num_attention_heads=8, moe_intermediate_size=136, **sizes)
    return raw, *quantized(published(random_model(Config.from_hf(raw), np.random.default_rng(3))))


def test_rules_without_a_mesh_are_refused(write_folder, v3):
    with pytest.raises(ShardingError, match=r"rules = .*need a mesh"):
        hf.load(write_folder(*v3), rules=EXPERTS_SPLIT)


def test_a_mesh_without_rules_gives_every_device_all_weights(write_folder, v3):
    _, model = hf.load(write_folder(*v3), mesh=mesh())
    assert {(leaf.sharding.num_devices, leaf.sharding.is_fully_replicated) for leaf in jax.tree.leaves(model)} == {
        (8, True)
    }


@pytest.mark.parametrize("split", [False, True])
def test_block_fp8_loads_to_codes_times_their_blocks_scale(write_folder, blocky, split):
    raw, codes, twin = blocky
    places = {"mesh": mesh(), "rules": EXPERTS_SPLIT | {"h": "die"}} if split else {}
    _, model = hf.load(write_folder(raw | FP8, codes), **places)
    assert_same(published(model), twin)


def test_fp8_without_its_scale_names_the_scale(write_folder, blocky):
    raw, codes, _ = blocky
    lacking = {name: w for name, w in codes.items() if name != f"{GATE}_scale_inv"}
    with pytest.raises(CheckpointError, match=rf"missing: {GATE}_scale_inv \(2, 2\)"):
        hf.load(write_folder(raw | FP8, lacking))


def test_fp8_of_a_vector_is_refused_by_name(write_folder, v3):
    raw, tensors = v3
    norm = {"model.norm.weight": tensors["model.norm.weight"].astype(ml_dtypes.float8_e4m3fn)}
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        hf.load(write_folder(raw | FP8, tensors | norm))


def test_loading_onto_eight_devices_gives_the_values_of_one(write_folder):
    raw = raw_config("deepseek_v3", num_hidden_layers=2, num_attention_heads=8, vocab_size=96)
    tensors = published(random_model(Config.from_hf(raw), np.random.default_rng(4)))
    rules = EXPERTS_SPLIT | {"h": "die", "u": "node"}
    cfg, model = hf.load(write_folder(raw, tensors), mesh=mesh(), rules=rules)
    assert_same(published(model), tensors)
    expected = shardings(model_params(cfg), mesh(), rules)
    for array, sharding in zip(jax.tree.leaves(model), jax.tree.leaves(expected), strict=True):
        assert array.sharding == sharding


def test_a_device_reads_its_own_experts_and_no_others(write_folder, v3, monkeypatch):
    raw, tensors = v3
    folder = write_folder(raw, tensors)
    names = {tensor.offset: name for name, tensor in open_folder(folder).items()}
    reads, read = Counter(), Tensor.read

    def counted(tensor: Tensor) -> np.ndarray:
        reads[names[tensor.offset]] += 1
        return read(tensor)

    monkeypatch.setattr(Tensor, "read", counted)
    hf.load(folder, mesh=mesh(), rules=EXPERTS_SPLIT)
    experts = [name for name in tensors if ".experts." in name]
    assert len(experts) == 2 * 8 * 3
    assert {reads[name] for name in experts} == {1}


def test_progress_ends_with_all_bytes(write_folder, v3):
    raw, tensors = v3
    calls: list[tuple[int, int]] = []
    hf.load(write_folder(raw, tensors), progress=lambda done, total: calls.append((done, total)))
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})
    assert {total for _, total in calls} == {sum(w.nbytes for w in tensors.values())}
    assert calls[-1][0] == calls[-1][1]


def test_the_mtp_module_loads_where_it_is_there(write_folder, v3):
    raw, tensors = v3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cfg, model = hf.load(write_folder(raw, tensors))
    assert cfg.mtp_layers == len(model.mtp) == 1
    np.testing.assert_array_equal(model.mtp[0].w_join, tensors[f"{MTP}.eh_proj.weight"])


@pytest.mark.parametrize("split", [False, True])
def test_an_mtp_module_that_is_announced_and_absent_is_left_out_with_a_warning(write_folder, v3, split):
    places = {"mesh": mesh(), "rules": EXPERTS_SPLIT} if split else {}
    raw, tensors = v3
    main = {name: w for name, w in tensors.items() if not name.startswith(MTP)}
    with pytest.warns(UserWarning, match=rf"announces 1 MTP layer\(s\).*no {MTP}\.\*"):
        cfg, model = hf.load(write_folder(raw, main), **places)
    assert cfg.mtp_layers == len(model.mtp) == 0
    assert_same(published(model), main)


COPIES = {f"{MTP}.embed_tokens.weight": "model.embed_tokens.weight", f"{MTP}.shared_head.head.weight": "lm_head.weight"}


def test_copies_of_embedding_and_head_in_the_mtp_module_are_accepted(write_folder, v3):
    raw, tensors = v3
    _, model = hf.load(write_folder(raw, tensors | {copy: tensors[name] for copy, name in COPIES.items()}))
    assert_same(published(model), tensors)


@pytest.fixture(scope="module")
def doubled(blocky) -> tuple[dict[str, Any], Weights, Weights]:
    """The same in FP8, embedding and head too, and copies of these two with their scales in the MTP module."""
    raw, _, twin = blocky
    codes, values = quantized(twin, whole=())
    copies = {copy + end: codes[name + end] for copy, name in COPIES.items() for end in ("", "_scale_inv")}
    return raw | FP8, codes | copies, values


def test_copies_in_fp8_are_accepted_with_their_scales(write_folder, doubled):
    raw, codes, values = doubled
    assert_same(published(hf.load(write_folder(raw, codes))[1]), values)


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("end", ["", "_scale_inv"])
def test_a_copy_in_fp8_with_other_codes_or_scales_is_refused(write_folder, doubled, copy, end):
    raw, codes, _ = doubled
    with pytest.raises(CheckpointError, match=f"{copy} differs from {COPIES[copy]}"):
        hf.load(write_folder(raw, codes | {copy + end: (2 * f64(codes[copy + end])).astype(codes[copy + end].dtype)}))


def test_a_copy_in_fp8_without_its_scale_names_the_scale(write_folder, doubled):
    raw, codes, _ = doubled
    lacking = {name: w for name, w in codes.items() if name != f"{MTP}.shared_head.head.weight_scale_inv"}
    with pytest.raises(CheckpointError, match=rf"missing: {MTP}.shared_head.head.weight_scale_inv \(1, 2\)"):
        hf.load(write_folder(raw, lacking))


@pytest.mark.parametrize("copy", COPIES)
def test_an_mtp_module_with_an_embedding_or_head_of_its_own_is_refused(write_folder, v3, copy):
    raw, tensors = v3
    other = tensors[COPIES[copy]].copy()
    other[-1, -1] += 1
    with pytest.raises(CheckpointError, match=f"{copy} differs from {COPIES[copy]}"):
        hf.load(write_folder(raw, tensors | {copy: other}))


@pytest.mark.parametrize("equal", [True, False])
def test_a_head_beside_tied_embeddings_must_equal_them(write_folder, equal):
    raw = raw_config("qwen3", num_hidden_layers=1, tie_word_embeddings=True)
    tensors = published(random_model(Config.from_hf(raw), np.random.default_rng(5)))
    assert "lm_head.weight" not in tensors
    head = tensors["model.embed_tokens.weight"] * (1 if equal else 2)
    folder = write_folder(raw, tensors | {"lm_head.weight": head})
    if equal:
        assert_same(published(hf.load(folder)[1]), tensors)
    else:
        with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
            hf.load(folder)


def test_frequencies_that_old_files_hold_are_passed_over(write_folder, v3):
    raw, tensors = v3
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    assert_same(published(hf.load(write_folder(raw, tensors | extra))[1]), tensors)


def test_all_that_is_missing_unexpected_and_misshapen_is_listed_at_once(write_folder, v3):
    raw, tensors = v3
    wrong = {name: w for name, w in tensors.items() if name != QUERY}
    wrong |= {"model.layers.9.mlp.gate.weight": np.zeros((2, 2), np.float32), GATE: tensors[GATE].T}
    with pytest.raises(CheckpointError, match="does not fit its config.json, 3 faults") as error:
        hf.load(write_folder(raw, wrong))
    assert f"missing: {QUERY} (20, 32)" in str(error.value)
    assert "unexpected: model.layers.9.mlp.gate.weight (2, 2)" in str(error.value)
    assert f"misshapen: {GATE} is (32, 14), config.json makes it (14, 32)" in str(error.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [QUERY, GATE, "model.norm.weight", "model.layers.1.mlp.gate.e_score_correction_bias"])
def test_a_value_that_is_not_finite_is_named_by_its_tensor(write_folder, v3, name, value):
    raw, tensors = v3
    broken = tensors[name].copy()
    broken.flat[-1] = value
    with pytest.raises(CheckpointError, match=rf": {name} has values that are NaN or infinite"):
        hf.load(write_folder(raw, tensors | {name: broken}))


@pytest.mark.parametrize("split", [False, True])
def test_every_expert_that_is_not_finite_is_named_and_no_other(write_folder, v3, split):
    """Spread over devices, the first part to be read that has one."""
    raw, tensors = v3
    names = [GATE.replace("5", str(i)) for i in (2, 7)]
    places = {"mesh": mesh(), "rules": EXPERTS_SPLIT} if split else {}
    named = names[0] if split else ", ".join(names)
    with pytest.raises(CheckpointError, match=rf": {named} has values"):
        hf.load(write_folder(raw, tensors | {name: np.nan * tensors[name] for name in names}), **places)


@pytest.mark.parametrize("name", [QUERY, GATE, f"{MTP}.embed_tokens.weight"])
@pytest.mark.parametrize("dtype", [np.float64, np.int64])
def test_a_dtype_that_is_not_supported_is_named_with_its_tensor(write_folder, v3, name, dtype):
    raw, tensors = v3
    stored = tensors[COPIES.get(name, name)].astype(dtype)
    with pytest.raises(
        CheckpointError, match=rf"not supported: {name} of dtype {'F' if dtype == np.float64 else 'I'}64"
    ):
        hf.load(write_folder(raw, tensors | {name: stored}))


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "fp8"},
        {"quant_method": "fp8", "weight_block_size": [64, 64]},
    ],
)
def test_another_quantization_is_refused_by_name(write_folder, v3, quantization):
    raw, tensors = v3
    with pytest.raises(ConfigError, match=f"quantization_config.*{quantization['quant_method']!r}.*not supported"):
        hf.load(write_folder(raw | {"quantization_config": quantization}, tensors))


def test_a_folder_without_config_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=rf"{tmp_path.name} has no config\.json"):
        hf.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"<html>", b"[]", b"null", b'"text"'])
def test_a_config_that_is_not_a_json_object_is_named(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json is not JSON"):
        hf.load(tmp_path)


@pytest.mark.parametrize("damage", ["half", "garbage", "gone", "index"])
def test_damaged_files_are_named(write_folder, v3, damage):
    folder = write_folder(*v3)
    path = folder / "model.safetensors"
    content = path.read_bytes()
    if damage == "index":
        path = folder / "model.safetensors.index.json"
        path.write_text("{")
    elif damage == "gone":
        path.unlink()
        path = folder
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "half" else b"garbage" * 99)
    with pytest.raises(CheckpointError, match=path.name):
        hf.load(folder)


PARTS = {
    "embedding": lambda model: (model.embed, model.norm, model.head),
    "layer": lambda model: model.layers[1],
    "module": lambda model: model.mtp[0],
    "experts": lambda model: model.layers[1].ffn.experts,
}


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_the_model_is_read_alone_as_it_is_among_all(write_folder, v3, part, int8):
    folder = write_folder(*v3)
    checkpoint = hf.open_checkpoint(folder)
    found = checkpoint.read(PARTS[part], jnp.bfloat16, int8)
    _, model = hf.load(folder, jnp.bfloat16, int8=int8)
    jax.tree.map(np.testing.assert_array_equal, found, PARTS[part](model))
    described = jax.tree.map(lambda p: (p.shape, p.dtype), PARTS[part](checkpoint.params(jnp.bfloat16, int8)))
    assert described == jax.tree.map(lambda w: (w.shape, w.dtype), found)


@pytest.mark.parametrize("split", [False, True])
def test_matrices_are_rounded_while_they_are_read_as_they_are_afterwards(write_folder, blocky, split):
    """Also those that are FP8 in the files."""
    raw, codes, _ = blocky
    folder, places = write_folder(raw | FP8, codes), {"mesh": mesh(), "rules": EXPERTS_SPLIT} if split else {}
    cfg, model = hf.load(folder)
    rounded = hf.load(folder, int8=True, **places)[1]
    expected = quantize_model(model, in_int8(model_params(cfg)))
    jax.tree.map(np.testing.assert_array_equal, rounded, expected)
    if split:
        assert rounded.layers[1].ffn.experts.w_up.scale.addressable_shards[0].data.shape[0] == 1


def test_never_more_than_one_matrix_is_float_while_they_are_rounded(write_folder, v3):
    """When one is in place, so are the bytes that progress tells, and no others."""
    folder, before, alive = write_folder(*v3), sum(array.nbytes for array in jax.live_arrays()), []
    count = lambda done, _: alive.append(sum(array.nbytes for array in jax.live_arrays()) - before - done)  # noqa: E731
    hf.load(folder, int8=True, progress=count)
    assert len(alive) > 40 and max(alive) < 256  # a few constants


@pytest.mark.parametrize("family", FAMILIES)
def test_an_int8_model_is_written_for_other_engines_and_comes_back(tmp_path, family):
    raw = raw_config(family, num_hidden_layers=2)
    cfg = Config.from_hf(raw)
    model = quantize_model(random_model(cfg, np.random.default_rng(1)), in_int8(model_params(cfg)))
    hf.save(tmp_path, model, cfg, raw)
    again_cfg, again = hf.load(tmp_path)
    assert again_cfg == cfg
    jax.tree.map(np.testing.assert_array_equal, again, model)
    written = file_tensors(tmp_path)
    codes = {name for name, w in written.items() if w.dtype == np.int8}
    assert {f"{name}_scale" for name in codes} == {name for name in written if name.endswith("_scale")}
    for name in codes:
        assert written[f"{name}_scale"].shape == (len(written[name]), 1)
        assert written[f"{name}_scale"].dtype == np.float32


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8])
@pytest.mark.parametrize("count", [1, 3])
def test_arrays_are_read_into_where_jax_uses_them(count, dtype):
    parts = list(np.random.default_rng(0).integers(-9, 9, (count, 5, 7)))
    whole = hf._filled(iter(parts), count, dtype)
    assert whole.dtype == dtype
    np.testing.assert_array_equal(whole.astype(np.int64), parts)
    assert jax.device_put(whole).unsafe_buffer_pointer() == whole.ctypes.data
