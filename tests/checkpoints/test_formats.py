"""INT8 checkpoints as others publish them: read exactly, or refused by name."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.checkpoints import hf
from jaxserve.checkpoints.formats import Format, quantization_config
from jaxserve.checkpoints.sources import sources
from jaxserve.layers.config import Config
from jaxserve.layers.int8 import in_int8, is_quantized, quantize_model
from jaxserve.layers.transformer import Model, model_params
from jaxserve.parallel.errors import CheckpointError, ConfigError
from jaxserve.parallel.qarray import dequantize
from tests.checkpoints.conftest import WriteFolder
from tests.checkpoints.int8_formats import MAKERS, Published, by_rows, compressed_tensors, model_slim, w8a8_int8
from tests.checkpoints.test_hf import EXPERTS_SPLIT, GATE, MTP, QUERY, assert_same, mesh
from tests.layers.helpers import Weights, batch_of, empty_cache, f64, page_table, published, random_model, raw_config
from tests.layers.helpers import step as run_step
from tests.oracles import reference

OUTPUT = "model.layers.1.self_attn.o_proj.weight"
KEY = "model.layers.1.self_attn.kv_b_proj.weight"
SIZES: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        "hidden_size": 160,
        "kv_lora_rank": 136,
        "q_lora_rank": 144,
        "intermediate_size": 192,
        "moe_intermediate_size": 192,
        "num_attention_heads": 12,
        "num_experts_per_tok": 8,
        "topk_group": 4,
    },
    "qwen3": {"hidden_size": 192, "intermediate_size": 320, "num_attention_heads": 6, "num_key_value_heads": 2},
}
"""Several blocks of inputs, also the output projection; the last ones cut, and heads that begin amid a block.

All experts are visited: where some are chosen, rounding may tip the choice.
"""


@pytest.fixture(scope="module", params=SIZES)
def family(request) -> tuple[dict[str, Any], Weights]:
    raw = raw_config(request.param, num_hidden_layers=2, **SIZES[request.param])
    return raw, published(random_model(Config.from_hf(raw), np.random.default_rng(0)))


def write(write_folder: WriteFolder, raw: dict[str, Any], it: Published) -> Path:
    folder = write_folder(raw | it.config, it.tensors)
    if it.description:
        (folder / "quant_model_description.json").write_text(json.dumps(it.description))
    return folder


def floats(model: Model) -> Weights:
    """A model's values, under their published names."""
    whole = lambda w: dequantize(w, jnp.float32) if is_quantized(w) else w  # noqa: E731
    return published(jax.tree.map(whole, model, is_leaf=is_quantized))


@pytest.mark.parametrize("maker", MAKERS)
def test_a_published_checkpoint_has_the_values_of_its_float_twin_and_stays_in_int8(write_folder, family, maker):
    raw, tensors = family
    it = maker(tensors)
    cfg, model = hf.load(write(write_folder, raw, it))
    assert_same(floats(model), it.floats)
    able = in_int8(model_params(cfg))
    able = able._replace(mtp=model_params(cfg).mtp) if maker is compressed_tensors else able
    jax.tree.map(lambda p, w: None if is_quantized(p) == is_quantized(w) else pytest.fail(str(p)), able, model,
                 is_leaf=is_quantized)  # fmt: skip


@pytest.mark.parametrize("maker", MAKERS)
def test_its_logits_are_those_of_the_twin_but_for_rounded_activations(write_folder, family, maker):
    raw, tensors = family
    it = maker(tensors)
    cfg, model = hf.load(write(write_folder, raw, it))
    tokens = np.random.default_rng(1).integers(0, cfg.vocab_size, 9)
    found, _ = run_step(model, batch_of([tokens], page_table(1, 2), tile=16), empty_cache(cfg, 2, 8), cfg)
    expected = reference.logits(raw, {name: f64(w) for name, w in it.floats.items()}, tokens.tolist())
    error = np.linalg.norm(f64(found)[0, :9] - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < 0.05


def test_it_loads_onto_eight_devices_with_its_scales(write_folder, family):
    raw, tensors = family
    for maker in MAKERS:
        it = maker(tensors)
        _, model = hf.load(write(write_folder, raw, it), mesh=mesh(), rules=EXPERTS_SPLIT | {"h": "node"})
        assert_same(floats(model), it.floats)


@given(heads=st.sampled_from([1, 2, 3, 12, 16, 128]), each=st.integers(1, 600))
def test_blocks_in_memory_have_one_size_and_lie_each_in_one_of_the_file(heads, each):
    inputs = (heads, each) if heads > 1 else (each,)
    counts, width = Format(block=128).counts(inputs), math.prod(inputs)
    assert not any(n % count for n, count in zip(inputs, counts, strict=True))
    size = width // math.prod(counts)
    assert math.prod(counts) == 1 and width <= 128 or 128 % size == 0
    head, value = np.divmod(np.arange(width), each)
    along = [i // (n // count) for i, n, count in zip((head, value)[-len(inputs) :], inputs, counts, strict=True)]
    assert np.array_equal(np.ravel_multi_index(along, counts), np.arange(width) // size)


@pytest.fixture(scope="module")
def v3_int8(v3) -> Callable[[Callable[[Weights], Published]], tuple[dict[str, Any], Published]]:
    return lambda maker: (v3[0], maker(v3[1]))


def changed(it: Published, **tensors: Any) -> Published:
    """With other tensors; None removes one."""
    found = {name: w for name, w in (it.tensors | tensors).items() if w is not None}
    return it._replace(tensors=found)


SCALE = f"{GATE}_scale"
BROKEN: dict[str, tuple[Any, dict[str, Any], str]] = {
    "missing": (w8a8_int8, {SCALE: lambda w: None}, rf"missing: {SCALE} \(\d+, 1\)"),
    "misshapen": (w8a8_int8, {SCALE: lambda w: w[:-1]}, rf"misshapen: {SCALE} is \(\d+, 1\)"),
    "NaN": (w8a8_int8, {SCALE: lambda w: w * np.nan}, rf"{SCALE} has scales that are NaN, infinite or negative"),
    "infinite": (w8a8_int8, {SCALE: lambda w: w / 0}, rf"{SCALE} has scales that are NaN, infinite or negative"),
    "negative": (w8a8_int8, {SCALE: lambda w: -w}, rf"{SCALE} has scales that are NaN, infinite or negative"),
    "integers": (w8a8_int8, {SCALE: lambda w: w.astype(np.int8)}, rf"not supported: {SCALE} of dtype I8"),
    "absorbed": (w8a8_int8, {f"{KEY}_scale": lambda w: -w}, rf"{KEY}_scale has scales that are NaN"),
    "float": (w8a8_int8, {QUERY: lambda w: w.astype(np.float32)}, rf"unexpected: {QUERY}_scale"),
    "in part": (w8a8_int8, {GATE: lambda w: w.astype(np.float32), SCALE: lambda w: None},
                rf"INT8 in part: 7 experts are, {GATE} not"),
    "ignored": (compressed_tensors, {"lm_head.weight": lambda w: w.astype(np.int8)},
                r"not as announced: lm_head.weight of dtype I8; compressed-tensors says that it has floats"),
    "announced": (compressed_tensors, {QUERY: lambda w: w.astype(np.float16), f"{QUERY}_scale": lambda w: None},
                  rf"not as announced: {QUERY} of dtype F16; compressed-tensors says that it has I8 codes"),
    "described": (model_slim, {"model.embed_tokens.weight": lambda w: w.astype(np.int8)},
                  r"not as announced: model.embed_tokens.weight of dtype I8; ModelSlim says that it has floats"),
    "offset": (model_slim, {f"{GATE}_offset": lambda w: w + 1}, rf"{GATE}_offset is not zero: asymmetric"),
    "bias": (model_slim, {QUERY.replace("weight", "quant_bias"): lambda w: w + 3}, r"quant_bias holds more than"),
    "4 bits": (w8a8_int8, {QUERY: lambda w: w.astype(np.int32)}, rf"not supported: {QUERY} of dtype I32"),
    "vector": (w8a8_int8, {"model.norm.weight": lambda w: w.astype(np.int8)}, r"model.norm.weight.* only matrices"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_tensor_that_is_wrong_is_named(write_folder, v3_int8, case):
    maker, changes, message = BROKEN[case]
    raw, it = v3_int8(maker)
    with np.errstate(divide="ignore"):
        it = changed(it, **{name: change(it.tensors[name]) for name, change in changes.items()})
    with pytest.raises(CheckpointError, match=message):
        hf.load(write(write_folder, raw, it))


def test_codes_without_a_format_are_refused_by_name(write_folder, v3_int8):
    raw, it = v3_int8(w8a8_int8)
    with pytest.raises(CheckpointError, match=rf"not supported: {QUERY} of dtype I8, and no format"):
        hf.load(write(write_folder, raw, it._replace(config={})))


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight"])
def test_a_head_stays_in_int8_and_an_embedding_becomes_float(write_folder, v3_int8, name):
    raw, it = v3_int8(w8a8_int8)
    codes, scale = by_rows(it.tensors[name])
    _, model = hf.load(write(write_folder, raw, changed(it, **{name: codes, f"{name}_scale": scale[:, 0]})))
    assert_same(floats(model), it.floats | {name: codes * scale})
    assert is_quantized(model.head) == (name == "lm_head.weight") and not is_quantized(model.embed)


GROUP = ("config_groups", "group_0")
REFUSED: dict[str, tuple[Any, tuple[str, ...], Any]] = {
    "format": (compressed_tensors, ("format",), "pack-quantized"),
    "bits": (compressed_tensors, (*GROUP, "weights", "num_bits"), 4),
    "type": (compressed_tensors, (*GROUP, "weights", "type"), "float"),
    "asymmetric": (compressed_tensors, (*GROUP, "weights", "symmetric"), False),
    "group": (compressed_tensors, (*GROUP, "weights", "strategy"), "group"),
    "actorder": (compressed_tensors, (*GROUP, "weights", "actorder"), "static"),
    "static": (compressed_tensors, (*GROUP, "input_activations", "dynamic"), False),
    "weights alone": (compressed_tensors, (*GROUP, "input_activations"), None),
    "outputs": (compressed_tensors, (*GROUP, "output_activations"), {"num_bits": 8}),
    "cache": (compressed_tensors, ("kv_cache_scheme",), {"num_bits": 8}),
    "sparse": (compressed_tensors, ("sparsity_config",), {"format": "sparse-24"}),
    "rotated": (compressed_tensors, ("transform_config",), {"config_groups": {}}),
    "no groups": (compressed_tensors, ("config_groups",), {}),
    "pattern": (compressed_tensors, ("ignore",), ["re:("]),
    "no list": (compressed_tensors, ("ignore",), "lm_head"),
    "no object": (compressed_tensors, GROUP, ["Linear"]),
    "unknown": (w8a8_int8, ("bits",), 4),
    "static rows": (w8a8_int8, ("activation_scheme",), "static"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_supported_of_a_format_is_named_by_its_key(write_folder, v3_int8, case):
    maker, path, value = REFUSED[case]
    raw, it = v3_int8(maker)
    config = json.loads(json.dumps(it.config))
    place = config["quantization_config"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ConfigError, match=rf"quantization_config.*({path[-1]}|re:\()"):
        hf.load(write(write_folder, raw, it._replace(config=config)))


def test_another_kind_of_modelslim_and_two_formats_at_once_are_refused(write_folder, v3_int8):
    raw, it = v3_int8(model_slim)
    with pytest.raises(ConfigError, match=rf"quant_model_description.json: {GATE} is 'W4A8_DYNAMIC'"):
        hf.load(write(write_folder, raw, it._replace(description=it.description | {GATE: "W4A8_DYNAMIC"})))
    with pytest.raises(ConfigError, match=r"has a quantization_config and quant_model_description.json"):
        hf.load(write(write_folder, raw | v3_int8(w8a8_int8)[1].config, it))


def test_what_a_format_leaves_out_by_name_or_expression_may_be_float(write_folder, v3_int8):
    raw, it = v3_int8(compressed_tensors)
    names = [name for name in it.tensors if "layers.1." in name and f"{name}_scale" in it.tensors]
    config = json.loads(json.dumps(it.config))
    config["quantization_config"]["ignore"] += [names[0].removesuffix(".weight"), r"re:model\.layers\.1\..*"]
    floating = changed(it, **{name: it.floats[name] for name in names}, **{f"{name}_scale": None for name in names})
    _, model = hf.load(write(write_folder, raw, floating._replace(config=config)))
    assert_same(floats(model), it.floats)
    assert is_quantized(model.layers[0].attn.w_o) and not is_quantized(model.layers[1].attn.w_o)


def test_rounding_at_load_leaves_what_is_int8_and_rounds_the_rest(write_folder, v3_int8):
    """The MTP module of a checkpoint that has it in floats."""
    raw, it = v3_int8(compressed_tensors)
    folder = write(write_folder, raw, it)
    cfg, model = hf.load(folder)
    expected = quantize_model(model, in_int8(model_params(cfg)))
    rounded = hf.load(folder, int8=True)[1]
    jax.tree.map(np.testing.assert_array_equal, rounded, expected)
    assert is_quantized(rounded.mtp[0].w_join) and not is_quantized(model.mtp[0].w_join)
    assert rounded.layers[0].attn.w_o.scale.dtype == jnp.float32


def test_a_model_of_which_a_layer_is_float_is_written_and_comes_back(tmp_path, v3):
    raw, cfg = v3[0], Config.from_hf(v3[0])
    whole = random_model(cfg, np.random.default_rng(0))
    model = quantize_model(whole, in_int8(model_params(cfg)))._replace(norm=whole.norm)
    model = model._replace(layers=(whole.layers[0], *model.layers[1:]))
    hf.save(tmp_path, model, cfg, raw | {"quantization_config": {"quant_method": "fp8"}})
    jax.tree.map(np.testing.assert_array_equal, hf.load(tmp_path)[1], model)
    said = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert {"lm_head", QUERY.removesuffix(".weight"), r"re:model\.layers\.\d+\.mlp\.gate$"} <= set(said["ignore"])


def test_the_written_config_can_be_made_of_descriptions_alone(v3):
    cfg = Config.from_hf(v3[0])
    params = model_params(cfg)
    model = quantize_model(random_model(cfg, np.random.default_rng(0)), in_int8(params))
    table = sources(cfg, params)
    assert quantization_config(table, in_int8(params)) == quantization_config(table, model)


def test_an_mtp_module_in_int8_is_read_too(write_folder, v3_int8):
    raw, it = v3_int8(w8a8_int8)
    assert f"{MTP}.eh_proj.weight_scale" in it.tensors
    assert is_quantized(hf.load(write(write_folder, raw, it))[1].mtp[0].w_join)
