"""What a model is, read from a Hugging Face `config.json` and nothing else.

Supported: DeepSeek-V2, V2-Lite, V3, R1 and Kimi-K2 (latent attention, mixture of experts), Qwen3 and Qwen3-MoE.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jaxserve.layers.keys import Keys
from jaxserve.parallel.errors import ConfigError


@dataclass(frozen=True)
class Yarn:
    """YaRN (arXiv:2309.00071): frequencies interpolated by `factor` where a wavelength exceeds the trained context."""

    factor: float
    original_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True  # round the ramp's ends to whole dimensions
    magnitude: float = 1.0  # multiplies cos and sin, so the logits by its square


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of `dim` dimensions, in pairs (0, 1), (2, 3), … if `interleaved`, else (0, dim/2), (1, …), …"""

    dim: int
    theta: float
    interleaved: bool
    yarn: Yarn | None = None


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1)."""

    heads: int  # h
    nope_dim: int  # n
    rope_dim: int  # r
    value_dim: int  # v
    kv_rank: int  # c
    query_rank: int | None  # q; None: the query is not compressed
    scale: float  # of the logits


@dataclass(frozen=True)
class GroupedAttention:
    """Grouped-query attention with RMS-normed queries and keys (Qwen3, arXiv:2505.09388)."""

    heads: int  # h
    kv_heads: int  # g
    head_dim: int  # n
    scale: float  # of the logits


@dataclass(frozen=True)
class Experts:
    """A mixture of experts and its router.

    `sigmoid` is DeepSeek-V3's router: a bias that only selects, groups scored by their two best experts.
    `softmax` is V2's and Qwen3's: no bias, groups scored by their best expert.
    """

    count: int  # e
    per_token: int  # k
    width: int  # f
    shared_width: int  # f of the expert that every token visits; 0: none
    router: Literal["sigmoid", "softmax"]
    groups: int
    groups_per_token: int
    normalize: bool  # the chosen weights sum to one
    weight_scale: float


@dataclass(frozen=True)
class Config:
    """A model, without arrays, mesh or files: what changes from one deployment to another is passed, not stored."""

    model_type: str
    vocab_size: int  # u
    width: int  # d
    dense_width: int  # f of the dense layers
    is_moe: tuple[bool, ...]  # l
    attention: LatentAttention | GroupedAttention
    experts: Experts | None
    rope: Rope
    norm_eps: float
    max_positions: int
    tied_embeddings: bool
    mtp_layers: int = 0
    eos_ids: tuple[int, ...] = ()

    @property
    def layers(self) -> int:
        return len(self.is_moe)

    @property
    def mixtures(self) -> int:
        """How many layers have experts, those of MTP modules too."""
        return len(self.mixture_layers)

    @property
    def mixture_layers(self) -> tuple[int, ...]:
        """The numbers of those layers; as in checkpoints, MTP modules follow the last layer."""
        modules = range(self.layers, self.layers + self.mtp_layers) if self.experts else ()
        return (*(number for number, moe in enumerate(self.is_moe) if moe), *modules)

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> "Config":
        """Reads the content of `config.json`, in the spelling of transformers 4 or 5.

        Raises ConfigError that names the key that is missing, of a wrong value, contradictory or not supported.
        """
        kind = raw.get("model_type")
        if not isinstance(kind, str) or kind not in _FAMILIES:
            raise ConfigError(
                f"model_type {kind!r} (architectures {raw.get('architectures')}) is not supported; "
                f"supported: {', '.join(sorted(_FAMILIES))}"
            )
        keys, (read, architecture) = Keys(raw, f"model_type {kind!r}"), _FAMILIES[kind]
        keys.only("architectures", [architecture])
        for key, supported in _ONLY.items():
            keys.only(key, supported)
        return read(keys)

    @classmethod
    def tiny(cls, family: str, **changes: Any) -> "Config":
        """A model of a few thousand parameters for tests; `changes` are keys of `config.json`."""
        return cls.from_hf(TINY[family] | changes)


def _deepseek(keys: Keys) -> Config:
    n, r = keys.whole("qk_nope_head_dim"), keys.whole("qk_rope_head_dim")
    rope, yarn_scale = _rope(keys, "qk_rope_head_dim", r, interleaved=keys.flag("rope_interleave", default=True))
    attention = LatentAttention(
        heads=keys.whole("num_attention_heads"),
        nope_dim=n,
        rope_dim=r,
        value_dim=keys.whole("v_head_dim"),
        kv_rank=keys.whole("kv_lora_rank"),
        query_rank=keys.whole("q_lora_rank", default=0, at_least=0) or None,
        scale=(n + r) ** -0.5 * yarn_scale,
    )
    first, every = keys.whole("first_k_dense_replace", at_least=0), keys.whole("moe_layer_freq", default=1)
    mixed = keys.whole("n_routed_experts", default=0, at_least=0) > 0
    is_moe = tuple(mixed and i >= first and i % every == 0 for i in range(_layers(keys)))
    return _config(
        keys,
        attention=attention,
        rope=rope,
        is_moe=is_moe,
        experts=_deepseek_experts(keys) if any(is_moe) else None,
        mtp_layers=keys.whole("num_nextn_predict_layers", default=0, at_least=0, at_most=_MOST_LAYERS),
    )


def _deepseek_experts(keys: Keys) -> Experts:
    default = ("sigmoid", "noaux_tc") if keys.raw["model_type"] != "deepseek_v2" else ("softmax", "greedy")
    method = (keys.get("scoring_func", default[0]), keys.get("topk_method", default[1]))
    if method not in _DEEPSEEK_ROUTERS:
        raise ConfigError(
            f"config.json: scoring_func {method[0]!r} with topk_method {method[1]!r} is not supported; "
            f"supported: {', '.join(f'{s} with {t}' for s, t in _DEEPSEEK_ROUTERS)}"
        )
    grouped = method[1] != "greedy"
    normalize = keys.flag("norm_topk_prob")
    if normalize and method[0] == "softmax":  # published implementations disagree on what it means
        raise keys.wrong("norm_topk_prob", "it is not supported with scoring_func 'softmax'; supported: False")
    width = keys.whole("moe_intermediate_size")
    experts = Experts(
        count=keys.whole("n_routed_experts"),
        per_token=keys.whole("num_experts_per_tok"),
        width=width,
        shared_width=width * keys.whole("n_shared_experts", default=0, at_least=0),
        router=method[0],
        groups=keys.whole("n_group") if grouped else 1,
        groups_per_token=keys.whole("topk_group") if grouped else 1,
        normalize=normalize,
        weight_scale=keys.number("routed_scaling_factor"),
    )
    return _checked(experts)


def _qwen3(keys: Keys) -> Config:
    heads, kv_heads = keys.whole("num_attention_heads"), keys.whole("num_key_value_heads")
    if heads % kv_heads:
        raise keys.wrong("num_attention_heads", f"it must be a multiple of num_key_value_heads, {kv_heads}")
    width = keys.whole("hidden_size")
    if "head_dim" not in keys and width % heads:
        raise keys.wrong("hidden_size", f"without head_dim it must be a multiple of num_attention_heads, {heads}")
    head_dim = keys.whole("head_dim", default=width // heads)
    rope, _ = _rope(keys, "head_dim", head_dim, interleaved=False)
    is_moe = (False,) * _layers(keys)
    if keys.raw["model_type"] == "qwen3_moe":
        every, dense = keys.whole("decoder_sparse_step", default=1), keys.wholes("mlp_only_layers")
        is_moe = tuple(i not in dense and (i + 1) % every == 0 for i in range(len(is_moe)))
    return _config(
        keys,
        attention=GroupedAttention(heads, kv_heads, head_dim, head_dim**-0.5),
        rope=rope,
        is_moe=is_moe,
        experts=_qwen3_experts(keys) if any(is_moe) else None,
    )


def _qwen3_experts(keys: Keys) -> Experts:
    experts = Experts(
        count=keys.whole("num_local_experts" if "num_local_experts" in keys else "num_experts"),
        per_token=keys.whole("num_experts_per_tok"),
        width=keys.whole("moe_intermediate_size"),
        shared_width=0,
        router="softmax",
        groups=1,
        groups_per_token=1,
        normalize=keys.flag("norm_topk_prob"),
        weight_scale=1.0,
    )
    return _checked(experts)


def _config(keys: Keys, is_moe: tuple[bool, ...], **parts: Any) -> Config:
    if keys.get("layer_types", ["full_attention"] * len(is_moe)) != ["full_attention"] * len(is_moe):
        raise keys.wrong("layer_types", f"supported: 'full_attention' for each of the {len(is_moe)} layers")
    return Config(
        model_type=keys.raw["model_type"],
        vocab_size=keys.whole("vocab_size"),
        width=keys.whole("hidden_size"),
        dense_width=keys.whole("intermediate_size"),
        is_moe=is_moe,
        norm_eps=keys.number("rms_norm_eps"),
        max_positions=keys.whole("max_position_embeddings"),
        tied_embeddings=keys.flag("tie_word_embeddings", default=False),
        eos_ids=keys.wholes("eos_token_id", or_one=True),
        **parts,
    )


def _layers(keys: Keys) -> int:
    return keys.whole("num_hidden_layers", at_most=_MOST_LAYERS)


def _checked(experts: Experts) -> Experts:
    """Refuses a router that could not choose: every number it divides or limits by must fit."""
    count, groups, limit, chosen = experts.count, experts.groups, experts.groups_per_token, experts.per_token
    if count % groups or limit > groups:
        raise ConfigError(f"{count} experts cannot be split into n_group {groups} of which topk_group {limit} are used")
    choice = count // groups * limit
    if chosen > choice:
        raise ConfigError(f"num_experts_per_tok {chosen} exceeds the {choice} experts a token may choose from")
    return experts


def _rope(keys: Keys, key: str, dim: int, interleaved: bool) -> tuple[Rope, float]:
    """The rotary embedding, and the factor YaRN puts on latent attention's logits (DeepSeek's `mscale_all_dim`)."""
    if dim % 2:
        raise ConfigError(f"the rotary embedding needs an even number of dimensions, config.json has {key} {dim}")
    kind, scaling = _scaling(keys)
    theta = (scaling if "rope_theta" in scaling else keys).number("rope_theta", above=1.0)
    if kind == "default":
        return Rope(dim, theta, interleaved), 1.0
    yarn = _yarn(scaling, positions=keys.whole("max_position_embeddings"))
    all_dim = scaling.number("mscale_all_dim", default=0.0, at_least=0.0)
    return Rope(dim, theta, interleaved, yarn), _yarn_magnitude(yarn.factor, all_dim) ** 2


def _scaling(keys: Keys) -> tuple[str, Keys]:
    """The type and the keys of `rope_parameters` (transformers 5) or `rope_scaling` (4)."""
    new, old = keys.inner("rope_parameters", "YaRN"), keys.inner("rope_scaling", "YaRN")
    if new.raw and old.raw and new.raw != old.raw:
        raise keys.wrong("rope_parameters", f"rope_scaling is not the same, {old.raw}; keep the one that holds")
    scaling = new if new.raw else old
    for key in ("rope_type", "type"):
        scaling.only(key, "default", "yarn")
    scaling.only("partial_rotary_factor", 1)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    for key in scaling.raw:
        if key in scaling and key not in _ROPE_KEYS[kind]:
            raise scaling.wrong(key, f"no key of rope_type {kind!r}; supported: {', '.join(_ROPE_KEYS[kind])}")
    return kind, scaling


def _yarn(scaling: Keys, positions: int) -> Yarn:
    factor = scaling.number("factor", at_least=1.0)
    fast, slow = scaling.number("beta_fast", default=32.0), scaling.number("beta_slow", default=1.0)
    if fast < slow:
        raise scaling.wrong("beta_fast", f"it must be {slow:g} or more, as beta_slow is")
    positions = scaling.whole("original_max_position_embeddings", default=positions)
    truncate = scaling.flag("truncate", default=True)
    return Yarn(factor, positions, fast, slow, truncate, magnitude=_cos_sin_magnitude(scaling, factor))


def _cos_sin_magnitude(scaling: Keys, factor: float) -> float:
    """YaRN's attention factor (arXiv:2309.00071, section 3.4), or DeepSeek's ratio of its two `mscale`."""
    if "attention_factor" in scaling:
        return scaling.number("attention_factor")
    mscale, all_dim = (scaling.number(key, default=0.0, at_least=0.0) for key in ("mscale", "mscale_all_dim"))
    if bool(mscale) != bool(all_dim) and mscale != 1:  # published implementations disagree on what it means
        raise scaling.wrong("mscale", f"with mscale_all_dim {all_dim:g} it is not supported; give both or neither")
    if mscale and all_dim:
        return _yarn_magnitude(factor, mscale) / _yarn_magnitude(factor, all_dim)
    return _yarn_magnitude(factor, 1.0)


def _yarn_magnitude(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


_MOST_LAYERS = 10_000  # no model has as many, and a typing error shall not fill the memory

_PLAIN = "rope_type type rope_theta partial_rotary_factor"
_YARN = "factor original_max_position_embeddings attention_factor beta_fast beta_slow mscale mscale_all_dim truncate"
_ROPE_KEYS = {"default": _PLAIN.split(), "yarn": f"{_PLAIN} {_YARN}".split()}
"""Keys of `rope_parameters`, by its `rope_type`."""

_ONLY: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1,
    "pretraining_tp": 1,
}
"""Keys that change what a model computes, with the value for which it is computed here."""

_DEEPSEEK_ROUTERS = (("sigmoid", "noaux_tc"), ("softmax", "greedy"), ("softmax", "group_limited_greedy"))

_FAMILIES = {
    "deepseek_v2": (_deepseek, "DeepseekV2ForCausalLM"),
    "deepseek_v3": (_deepseek, "DeepseekV3ForCausalLM"),
    "kimi_k2": (_deepseek, "DeepseekV3ForCausalLM"),
    "qwen3": (_qwen3, "Qwen3ForCausalLM"),
    "qwen3_moe": (_qwen3, "Qwen3MoeForCausalLM"),
}
"""How each `model_type` is read, and the one of its `architectures` that is a causal language model."""

_TINY_COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "dtype": "float32",
}
_TINY_DEEPSEEK = _TINY_COMMON | {
    "kv_lora_rank": 16,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 14,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}
_TINY_QWEN = _TINY_COMMON | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12}
TINY: dict[str, dict[str, Any]] = {
    "deepseek_v2": _TINY_DEEPSEEK
    | {"model_type": "deepseek_v2", "topk_method": "group_limited_greedy", "norm_topk_prob": False},
    "deepseek_v2_lite": _TINY_DEEPSEEK
    | {"model_type": "deepseek_v2", "q_lora_rank": None, "norm_topk_prob": False, "n_shared_experts": 2},
    "deepseek_v3": _TINY_DEEPSEEK | {"model_type": "deepseek_v3", "num_nextn_predict_layers": 1},
    "qwen3": _TINY_QWEN | {"model_type": "qwen3"},
    "qwen3_moe": _TINY_QWEN
    | {
        "model_type": "qwen3_moe",
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 14,
        "norm_topk_prob": True,
    },
}
