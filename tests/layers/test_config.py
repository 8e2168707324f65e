import dataclasses
import math
from typing import Any

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

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


@pytest.mark.parametrize("name", ["Qwen3ForSequenceClassification", "Qwen3Model", "Qwen3MoeForCausalLM"])
def test_an_architecture_that_is_no_causal_language_model_of_the_family_is_refused_by_name(name):
    with pytest.raises(ConfigError, match=rf"architectures = \['{name}'\].*supported: \['Qwen3ForCausalLM'\]"):
        Config.tiny("qwen3", architectures=[name])


@pytest.mark.parametrize("architectures", [None, ["DeepseekV3ForCausalLM"]])
def test_the_architecture_may_be_left_out(architectures):
    assert Config.tiny("deepseek_v3", architectures=architectures) == Config.tiny("deepseek_v3")


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
NEEDED += [
    ("qwen3_moe", key) for key in ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")
]


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
        ("deepseek_v3", {"num_experts_per_tok": 5}, "num_experts_per_tok 5 exceeds the 4"),
        ("deepseek_v2", {"n_group": 16, "topk_group": 2}, "n_group 16"),
        ("deepseek_v2_lite", {"num_experts_per_tok": 9}, "num_experts_per_tok 9 exceeds the 8"),
        ("qwen3_moe", {"num_experts_per_tok": 9}, "num_experts_per_tok 9 exceeds the 8"),
        ("qwen3", {"num_key_value_heads": 3}, "num_attention_heads = 4: .*num_key_value_heads, 3"),
        ("qwen3", {"head_dim": None, "hidden_size": 30}, "hidden_size = 30: without head_dim .*num_attention_heads, 4"),
        ("qwen3", {"head_dim": 13}, "even number of dimensions.* head_dim 13"),
        ("deepseek_v3", {"qk_rope_head_dim": 7}, "even number of dimensions.* qk_rope_head_dim 7"),
    ],
)
def test_sizes_that_contradict_each_other_are_named(family, changes, named):
    with pytest.raises(ConfigError, match=named):
        Config.tiny(family, **changes)


def test_greedy_routing_ignores_groups():
    experts = Config.tiny("deepseek_v2_lite", n_group=3, topk_group=9).experts
    assert experts is not None and (experts.groups, experts.groups_per_token) == (1, 1)


YARN = {"rope_type": "yarn", "factor": 4.0}
_AT_LEAST_1 = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads max_position_embeddings"
_AT_LEAST_1_DEEPSEEK = (
    "kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim num_experts_per_tok moe_intermediate_size n_group "
    "topk_group moe_layer_freq"
)
_AT_LEAST_0_DEEPSEEK = (
    "q_lora_rank first_k_dense_replace n_routed_experts n_shared_experts num_nextn_predict_layers eos_token_id"
)
_AT_LEAST_1_QWEN3 = (
    "num_key_value_heads head_dim decoder_sparse_step num_experts num_local_experts num_experts_per_tok "
    "moe_intermediate_size"
)
WHOLES = [("deepseek_v3", key, 1) for key in f"{_AT_LEAST_1} {_AT_LEAST_1_DEEPSEEK}".split()]
WHOLES += [("deepseek_v3", key, 0) for key in _AT_LEAST_0_DEEPSEEK.split()]
WHOLES += [("qwen3_moe", key, 1) for key in f"{_AT_LEAST_1} {_AT_LEAST_1_QWEN3}".split()]
NUMBERS = [("deepseek_v3", key, rule) for key, rule in (("rms_norm_eps", "above 0"), ("rope_theta", "above 1"))]
NUMBERS += [("deepseek_v3", "routed_scaling_factor", "above 0")]
FLAGS = [("deepseek_v3", key) for key in ("norm_topk_prob", "tie_word_embeddings", "rope_interleave")]
FLAGS += [("qwen3_moe", "norm_topk_prob"), ("qwen3_moe", "tie_word_embeddings")]


def refusal(family: str, **changes: Any) -> str:
    with pytest.raises(ConfigError) as error:
        Config.tiny(family, **changes)
    return str(error.value)


def bad_numbers(rule: str) -> list[Any]:
    low = float(rule.replace("above", "").replace("or more", ""))
    return [low if "above" in rule else low - 0.5, -1, "2.0", True, [2.0], {}, math.nan, -math.inf]


@pytest.mark.parametrize(("family", "key", "least"), WHOLES)
def test_what_is_not_a_whole_number_of_the_range_is_refused_by_name(family, key, least):
    for value in (least - 1, -7, 2.5, 8.0, "8", True, {}, math.nan, math.inf):
        rule = f"it must be a whole number, {least} or more"
        assert refusal(family, **{key: value}) == f"config.json: {key} = {value!r}: {rule}"
    assert f"{key} = {2**31}: it must be at most" in refusal(family, **{key: 2**31})


@pytest.mark.parametrize(("family", "key", "rule"), NUMBERS)
def test_what_is_not_a_number_of_the_range_is_refused_by_name(family, key, rule):
    for value in bad_numbers(rule):
        assert refusal(family, **{key: value}) == f"config.json: {key} = {value!r}: it must be a number, {rule}"
    for value in (math.inf, 10**400):
        assert f"{key} = {value!r}: it must be at most" in refusal(family, **{key: value})


@pytest.mark.parametrize(("family", "key"), FLAGS)
def test_what_is_neither_true_nor_false_is_refused_by_name(family, key):
    for value in (0, 1, "true", [], math.nan):
        assert refusal(family, **{key: value}) == f"config.json: {key} = {value!r}: it must be true or false"


@pytest.mark.parametrize(("family", "key"), NEEDED)
def test_null_does_not_stand_for_a_key_that_is_needed(family, key):
    assert f"config.json: {key} = None: it must be " in refusal(family, **{key: None})


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    ("key", "rule"),
    [
        ("factor", "1 or more"),
        ("beta_fast", "above 0"),
        ("beta_slow", "above 0"),
        ("mscale", "0 or more"),
        ("mscale_all_dim", "0 or more"),
        ("attention_factor", "above 0"),
        ("rope_theta", "above 1"),
    ],
)
def test_a_number_of_yarn_out_of_its_range_is_refused_by_name(spelling, key, rule):
    for value in bad_numbers(rule):
        told = refusal("qwen3", **{spelling: YARN | {key: value}})
        assert told == f"config.json, {spelling}: {key} = {value!r}: it must be a number, {rule}"


@pytest.mark.parametrize(
    ("family", "changes", "told"),
    [
        ("qwen3", {"eos_token_id": [1, True]}, "eos_token_id = True: it must be a whole number, 0 or more"),
        ("qwen3", {"eos_token_id": [[1]]}, "eos_token_id = [1]: it must be a whole number, 0 or more"),
        ("qwen3_moe", {"mlp_only_layers": 1}, "mlp_only_layers = 1: it must be a list of whole numbers"),
        ("qwen3_moe", {"mlp_only_layers": "01"}, "mlp_only_layers = '01': it must be a list of whole numbers"),
        ("qwen3_moe", {"mlp_only_layers": [-1]}, "mlp_only_layers = -1: it must be a whole number, 0 or more"),
        ("deepseek_v3", {"num_hidden_layers": 10**6}, "num_hidden_layers = 1000000: it must be at most 10000"),
        ("qwen3", {"hidden_act": ["silu"]}, "hidden_act = ['silu']: it is not supported; supported: silu"),
        ("qwen3", {"architectures": "Qwen3ForCausalLM"}, "architectures = 'Qwen3ForCausalLM': it is not supported"),
        ("qwen3", {"architectures": []}, "architectures = []: it is not supported"),
        ("deepseek_v3", {"scoring_func": ["sigmoid"]}, "scoring_func ['sigmoid'] with topk_method 'noaux_tc' is not"),
        ("qwen3", {"layer_types": "full_attention"}, "layer_types = 'full_attention': supported: 'full_attention' for"),
        ("qwen3", {"layer_types": ["full_attention"]}, "layer_types = ['full_attention']: supported: 'full_attention'"),
        ("qwen3", {"layer_types": [{}, 1, None]}, "layer_types = [{}, 1, None]: supported: 'full_attention' for each"),
        ("qwen3", {"layer_types": 3}, "layer_types = 3: supported: 'full_attention' for each of the 3 layers"),
        ("qwen3", {"rope_scaling": "yarn"}, "rope_scaling = 'yarn': it must be an object"),
        ("qwen3", {"rope_scaling": []}, "rope_scaling = []: it must be an object"),
        ("qwen3", {"rope_scaling": {"factor": 4.0}}, "rope_scaling: factor = 4.0: no key of rope_type 'default'"),
        (
            "qwen3",
            {"rope_scaling": YARN | {"attn_factor": 2}},
            "attn_factor = 2: no key of rope_type 'yarn'",
        ),
        ("qwen3", {"rope_scaling": YARN | {"truncate": 0}}, "rope_scaling: truncate = 0: it must be true or false"),
        ("qwen3", {"rope_scaling": {"rope_type": ["yarn"]}}, "rope_type = ['yarn']: it is not supported; supported"),
        ("qwen3", {"rope_scaling": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5: it is not supported"),
        (
            "qwen3",
            {"rope_scaling": YARN | {"original_max_position_embeddings": 0}},
            "original_max_position_embeddings = 0: it must be a whole number, 1 or more",
        ),
        (
            "qwen3",
            {"rope_scaling": YARN | {"beta_fast": 0.5}},
            "beta_fast = 0.5: it must be 1 or more, as beta_slow",
        ),
        ("qwen3", {"rope_scaling": YARN | {"mscale": 0.7}}, "mscale = 0.7: with mscale_all_dim 0 it is not supported"),
        ("qwen3", {"rope_scaling": YARN, "rope_parameters": {"rope_theta": 1e4}}, "rope_scaling is not the same"),
    ],
)
def test_a_value_that_cannot_be_meant_is_refused_by_name(family, changes, told):
    assert told in refusal(family, **changes)


def test_an_unhashable_model_type_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"model_type \['qwen3'\] .* is not supported; supported: "):
        Config.from_hf({"model_type": ["qwen3"]})


READ = sorted({key for family in FAMILIES for key in raw_config(family)} | {key for _, key, _ in WHOLES + NUMBERS})
READ += "model_type architectures layer_types hidden_act attention_bias pretraining_tp use_sliding_window".split()
READ += "eos_token_id mlp_only_layers scoring_func topk_method rope_interleave rope_scaling rope_parameters".split()
READ_OF_ROPE = "rope_type type rope_theta partial_rotary_factor factor original_max_position_embeddings".split()
READ_OF_ROPE += "attention_factor beta_fast beta_slow mscale mscale_all_dim truncate another".split()
_SCALARS = st.none() | st.booleans() | st.integers(-2, 9) | st.integers() | st.floats() | st.text(max_size=3)
JUNK = _SCALARS | st.lists(_SCALARS, max_size=3) | st.dictionaries(st.sampled_from(READ_OF_ROPE), _SCALARS, max_size=3)


@given(st.sampled_from(FAMILIES), st.sampled_from(READ), JUNK)
def test_any_value_of_any_key_gives_a_config_or_is_refused_on_purpose(family, key, value):
    check_junk(family, {key: value}, key)


@given(st.sampled_from(FAMILIES), st.sampled_from(READ_OF_ROPE), JUNK)
def test_any_value_of_any_key_of_yarn_gives_a_config_or_is_refused_on_purpose(family, key, value):
    check_junk(family, {"rope_scaling": YARN | {key: value}}, key)


def check_junk(family: str, changes: dict[str, Any], key: str) -> None:
    try:
        cfg = Config.tiny(family, **changes)
    except ConfigError as error:
        contradictions = ("experts cannot be split", "experts a token may choose from")  # of several keys
        assert any(named in str(error) for named in (key, *contradictions))
    else:
        assert 0 < cfg.attention.scale < math.inf and {cfg} == {cfg}
        assert cfg.rope.yarn is None or 0 < cfg.rope.yarn.magnitude < math.inf
