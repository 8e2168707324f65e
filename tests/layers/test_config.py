import dataclasses
import math
from typing import Any

import jax
import pytest

from jaxserve.layers.config import Config, Experts, GroupedAttention, LatentAttention, Rope, Yarn
from jaxserve.layers.transformer import model_params
from jaxserve.parallel.errors import ConfigError
from tests.layers import published
from tests.layers.helpers import FAMILIES, raw_config

PUBLISHED = {
    "DeepSeek-V3": published.DEEPSEEK_V3,
    "DeepSeek-V2": published.DEEPSEEK_V2,
    "DeepSeek-V2-Lite": published.DEEPSEEK_V2_LITE,
    "Kimi-K2": published.KIMI_K2,
    "Qwen3-0.6B": published.QWEN3_06B,
    "Qwen3-30B-A3B": published.QWEN3_30B_A3B,
}


def count(tree: Any) -> int:
    return sum(param.size for param in jax.tree.leaves(tree))


def without(raw: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in raw.items() if key not in keys}


def spelled_as_5(raw: dict[str, Any]) -> dict[str, Any]:
    """As transformers 5 saves it."""
    scaling = dict(raw.get("rope_scaling") or {})
    rope = {"rope_theta": raw["rope_theta"], "rope_type": scaling.pop("type", "default"), **scaling}
    dtype = raw.get("torch_dtype", raw.get("dtype"))
    return without(raw, "rope_scaling", "rope_theta", "torch_dtype") | {"rope_parameters": rope, "dtype": dtype}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("DeepSeek-V3", 671_026_419_200),
        ("DeepSeek-V2", 235_741_434_880),
        ("DeepSeek-V2-Lite", 15_706_484_224),
        ("Qwen3-0.6B", 596_049_920),
        ("Qwen3-30B-A3B", 30_532_122_624),
    ],
)
def test_a_published_config_has_the_published_number_of_parameters(name, parameters):
    assert count(model_params(Config.from_hf(PUBLISHED[name]))._replace(mtp=())) == parameters


def test_kimi_k2_has_a_trillion_parameters():
    assert count(model_params(Config.from_hf(published.KIMI_K2))) == pytest.approx(1.03e12, rel=5e-3)


def test_the_files_of_deepseek_v3_hold_an_mtp_module_with_copies_of_embedding_and_head():
    cfg = Config.from_hf(published.DEEPSEEK_V3)
    assert count(model_params(cfg).mtp) == pytest.approx(11.6e9, rel=2e-3)
    assert count(model_params(cfg)) + 2 * cfg.vocab_size * cfg.width == 684_489_845_504


def test_deepseek_v3_has_the_sizes_of_the_paper():
    cfg = Config.from_hf(published.DEEPSEEK_V3)
    assert cfg.is_moe == (False,) * 3 + (True,) * 58 and cfg.layers == 61 and cfg.mtp_layers == 1
    assert (cfg.vocab_size, cfg.width, cfg.dense_width, cfg.max_positions) == (129280, 7168, 18432, 163840)
    assert cfg.experts == Experts(256, 8, 2048, 2048, "sigmoid", 8, 4, normalize=True, weight_scale=2.5)
    assert cfg.rope == Rope(64, 10000.0, interleaved=True, yarn=Yarn(40.0, 4096, 32.0, 1.0, True, magnitude=1.0))
    assert dataclasses.replace(cfg.attention, scale=0.0) == LatentAttention(128, 128, 64, 128, 512, 1536, scale=0.0)
    assert cfg.attention.scale == pytest.approx(192**-0.5 * 1.8738, rel=1e-4)
    assert (cfg.eos_ids, cfg.tied_embeddings) == ((1,), False)


def test_deepseek_v2_lite_has_the_sizes_of_the_paper():
    cfg = Config.from_hf(published.DEEPSEEK_V2_LITE)
    assert cfg.is_moe == (False,) + (True,) * 26 and cfg.mtp_layers == 0
    assert cfg.experts == Experts(64, 6, 1408, 2816, "softmax", 1, 1, normalize=False, weight_scale=1.0)
    assert dataclasses.replace(cfg.attention, scale=0.0) == LatentAttention(16, 128, 64, 128, 512, None, scale=0.0)
    assert cfg.attention.scale == pytest.approx(192**-0.5 * 1.5896, rel=1e-4)


def test_deepseek_v2_limits_groups_and_kimi_k2_has_none():
    assert Config.from_hf(published.DEEPSEEK_V2).experts == Experts(160, 6, 1536, 3072, "softmax", 8, 3, False, 16.0)
    assert Config.from_hf(published.KIMI_K2).experts == Experts(384, 8, 2048, 2048, "sigmoid", 1, 1, True, 2.827)


def test_qwen3_has_the_sizes_of_the_paper():
    dense, mixture = Config.from_hf(published.QWEN3_06B), Config.from_hf(published.QWEN3_30B_A3B)
    assert dense.attention == GroupedAttention(16, 8, 128, scale=128**-0.5)
    assert dense.rope == Rope(128, 1e6, interleaved=False)
    assert dense.tied_embeddings and dense.experts is None and not any(dense.is_moe)
    assert mixture.attention == GroupedAttention(32, 4, 128, scale=128**-0.5)
    assert mixture.experts == Experts(128, 8, 768, 0, "softmax", 1, 1, normalize=True, weight_scale=1.0)
    assert mixture.is_moe == (True,) * 48


@pytest.mark.parametrize("name", PUBLISHED)
def test_both_spellings_give_the_same_config(name):
    raw = PUBLISHED[name]
    assert Config.from_hf(spelled_as_5(raw)) == Config.from_hf(raw)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_tiny_config_that_is_hashable_and_takes_changes(family):
    cfg = Config.tiny(family)
    assert hash(cfg) == hash(Config.tiny(family))
    assert count(model_params(cfg)) < 100_000
    assert Config.tiny(family, vocab_size=11).vocab_size == 11
    assert Config.from_hf(spelled_as_5(raw_config(family))) == cfg


def test_the_number_of_experts_has_two_names():
    raw = raw_config("qwen3_moe")
    renamed = without(raw, "num_experts") | {"num_local_experts": raw["num_experts"]}
    assert Config.from_hf(renamed) == Config.from_hf(raw)


@pytest.mark.parametrize(("eos", "ids"), [(7, (7,)), ([7, 9], (7, 9)), ([], ()), (None, ()), (0, (0,))])
def test_the_end_of_text_is_a_token_several_or_none(eos, ids):
    assert Config.tiny("qwen3", eos_token_id=eos).eos_ids == ids


@pytest.mark.parametrize("rank", [0, None])
def test_no_query_rank_means_no_query_compression(rank):
    att = Config.tiny("deepseek_v3", q_lora_rank=rank).attention
    assert isinstance(att, LatentAttention) and att.query_rank is None


@pytest.mark.parametrize(
    ("family", "changes", "is_moe"),
    [
        ("deepseek_v3", {"first_k_dense_replace": 0}, (True, True, True, True)),
        ("deepseek_v3", {"first_k_dense_replace": 1, "moe_layer_freq": 2}, (False, False, True, False)),
        ("deepseek_v3", {"n_routed_experts": None}, (False,) * 4),
        ("qwen3_moe", {"decoder_sparse_step": 2}, (False, True, False, True)),
        ("qwen3_moe", {"mlp_only_layers": [0, 2]}, (False, True, False, True)),
    ],
)
def test_the_layers_with_experts_are_those_the_config_says(family, changes, is_moe):
    assert Config.tiny(family, num_hidden_layers=4, **changes).is_moe == is_moe


def test_the_width_of_a_head_defaults_to_its_share_of_the_model():
    att = Config.from_hf(without(raw_config("qwen3"), "head_dim")).attention
    assert isinstance(att, GroupedAttention) and att.head_dim == 8


@pytest.mark.parametrize(
    ("scaling", "magnitude"),
    [
        ({}, 0.1 * math.log(4) + 1),
        ({"attention_factor": 1.7}, 1.7),
        ({"mscale": 0.707, "mscale_all_dim": 0.707}, 1.0),
        ({"mscale": 1.0, "mscale_all_dim": 0.5}, (0.1 * math.log(4) + 1) / (0.05 * math.log(4) + 1)),
        ({"factor": 1.0}, 1.0),
    ],
)
def test_yarn_scales_cosine_and_sine_as_its_keys_say(scaling, magnitude):
    yarn = Config.tiny("qwen3", rope_scaling={"rope_type": "yarn", "factor": 4.0} | scaling).rope.yarn
    assert yarn is not None and yarn.magnitude == pytest.approx(magnitude)
    assert yarn.original_positions == 256  # max_position_embeddings, where nothing else is said


@pytest.mark.parametrize("kind", ["llama", "qwen3_next", None])
def test_an_unknown_architecture_is_named_with_those_that_are_known(kind):
    with pytest.raises(ConfigError, match=rf"model_type {kind!r} .*SomeForCausalLM.*supported: .*deepseek_v3.*qwen3"):
        Config.from_hf({"model_type": kind, "architectures": ["SomeForCausalLM"]})


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("qwen3", "hidden_act", "gelu"),
        ("qwen3", "attention_bias", True),
        ("qwen3", "mlp_bias", True),
        ("qwen3", "use_sliding_window", True),
        ("qwen3", "layer_types", ["full_attention", "sliding_attention", "full_attention"]),
        ("qwen3", "partial_rotary_factor", 0.5),
        ("deepseek_v3", "pretraining_tp", 2),
        ("deepseek_v3", "hidden_act", "relu"),
        ("deepseek_v2", "norm_topk_prob", True),
        ("deepseek_v3", "scoring_func", "softmax"),
        ("deepseek_v3", "topk_method", "group_limited_greedy"),
        ("deepseek_v2", "scoring_func", "sigmoid"),
        ("deepseek_v2", "topk_method", "noaux_tc"),
    ],
)
def test_an_option_that_would_change_the_result_is_refused_by_name(family, key, value):
    with pytest.raises(ConfigError) as error:
        Config.tiny(family, **{key: value})
    wrong = "sliding_attention" if isinstance(value, list) else str(value)
    assert key in str(error.value) and wrong in str(error.value) and "supported: " in str(error.value)


@pytest.mark.parametrize("key", ["type", "rope_type"])
@pytest.mark.parametrize("kind", ["linear", "dynamic", "llama3", "longrope"])
@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
def test_another_scaling_of_positions_is_refused_by_name(spelling, kind, key):
    with pytest.raises(ConfigError, match=f"rope.*{kind}.*supported: default, yarn"):
        Config.tiny("qwen3", **{spelling: {key: kind, "factor": 2.0, "rope_theta": 1e4}})


_COMMON = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads rms_norm_eps "
    "max_position_embeddings rope_theta"
)
_DEEPSEEK = (
    "kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim first_k_dense_replace num_experts_per_tok "
    "moe_intermediate_size n_group topk_group norm_topk_prob routed_scaling_factor"
)
NEEDED = [(family, key) for family in ("deepseek_v2", "deepseek_v3") for key in f"{_COMMON} {_DEEPSEEK}".split()]
NEEDED += [(family, key) for family in ("qwen3", "qwen3_moe") for key in f"{_COMMON} num_key_value_heads".split()]
NEEDED += [("qwen3_moe", key) for key in ("num_experts", "num_experts_per_tok", "moe_intermediate_size")]


@pytest.mark.parametrize(("family", "key"), NEEDED)
def test_a_missing_key_is_named(family, key):
    with pytest.raises(ConfigError, match=rf"lacks '{key}', which model_type '{family}' needs"):
        Config.from_hf(without(raw_config(family), key))


def test_yarn_without_its_factor_is_named():
    with pytest.raises(ConfigError, match="lacks 'factor'"):
        Config.tiny("qwen3", rope_scaling={"rope_type": "yarn"})


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("deepseek_v3", {"n_group": 3}, "8 experts .*n_group 3"),
        ("deepseek_v3", {"topk_group": 5}, "n_group 4 .*topk_group 5"),
        ("deepseek_v3", {"topk_group": 0}, "topk_group 0"),
        ("deepseek_v3", {"num_experts_per_tok": 5}, "num_experts_per_tok 5 exceeds the 4"),
        ("deepseek_v3", {"num_experts_per_tok": 0}, "num_experts_per_tok 0"),
        ("deepseek_v2", {"n_group": 16, "topk_group": 2}, "n_group 16"),
        ("deepseek_v2_lite", {"num_experts_per_tok": 9}, "num_experts_per_tok 9 exceeds the 8"),
        ("qwen3_moe", {"num_experts_per_tok": 9}, "num_experts_per_tok 9 exceeds the 8"),
        ("qwen3", {"num_key_value_heads": 3}, "num_attention_heads 4 .*num_key_value_heads 3"),
        ("qwen3", {"head_dim": 13}, "even number of dimensions.* 13"),
        ("deepseek_v3", {"qk_rope_head_dim": 7}, "even number of dimensions.* 7"),
    ],
)
def test_sizes_that_contradict_each_other_are_named(family, changes, named):
    with pytest.raises(ConfigError, match=named):
        Config.tiny(family, **changes)


def test_greedy_routing_ignores_groups():
    experts = Config.tiny("deepseek_v2_lite", n_group=3, topk_group=9).experts
    assert experts is not None and (experts.groups, experts.groups_per_token) == (1, 1)
