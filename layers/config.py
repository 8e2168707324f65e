"""What a model is, read from a Hugging Face `config.json` and nothing else.

Supported: DeepSeek-V2, V2-Lite, V3, R1 and Kimi-K2 (latent attention, mixture of experts), Qwen3 and Qwen3-MoE.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

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

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> "Config":
        """Reads the content of `config.json`, in the spelling of transformers 4 or 5.

        Raises ConfigError that names the key that is missing, contradictory or not supported.
        """
        kind = raw.get("model_type")
        if kind not in _FAMILIES:
            raise ConfigError(
                f"model_type {kind!r} (architectures {raw.get('architectures')}) is not supported; "
                f"supported: {', '.join(sorted(_FAMILIES))}"
            )
        _refuse_unsupported(raw)
        try:
            return _FAMILIES[kind](raw)
        except KeyError as error:
            raise ConfigError(f"config.json lacks {error.args[0]!r}, which model_type {kind!r} needs") from None
        except TypeError as error:
            raise ConfigError(f"config.json has a value of the wrong type: {error}") from None

    @classmethod
    def tiny(cls, family: str, **changes: Any) -> "Config":
        """A model of a few thousand parameters for tests; `changes` are keys of `config.json`."""
        return cls.from_hf(TINY[family] | changes)


def _deepseek(raw: Mapping[str, Any]) -> Config:
    n, r, heads = raw["qk_nope_head_dim"], raw["qk_rope_head_dim"], raw["num_attention_heads"]
    rope, yarn_scale = _rope(raw, r, interleaved=raw.get("rope_interleave", True))
    attention = LatentAttention(
        heads=heads,
        nope_dim=n,
        rope_dim=r,
        value_dim=raw["v_head_dim"],
        kv_rank=raw["kv_lora_rank"],
        query_rank=raw.get("q_lora_rank") or None,
        scale=(n + r) ** -0.5 * yarn_scale,
    )
    layers, first, every = raw["num_hidden_layers"], raw["first_k_dense_replace"], raw.get("moe_layer_freq", 1)
    is_moe = tuple(i >= first and i % every == 0 and bool(raw.get("n_routed_experts")) for i in range(layers))
    return _config(
        raw,
        attention=attention,
        rope=rope,
        is_moe=is_moe,
        experts=_deepseek_experts(raw) if any(is_moe) else None,
        mtp_layers=raw.get("num_nextn_predict_layers") or 0,
    )


def _deepseek_experts(raw: Mapping[str, Any]) -> Experts:
    default = ("sigmoid", "noaux_tc") if raw["model_type"] != "deepseek_v2" else ("softmax", "greedy")
    method = (raw.get("scoring_func", default[0]), raw.get("topk_method", default[1]))
    if method not in _DEEPSEEK_ROUTERS:
        raise ConfigError(
            f"scoring_func {method[0]!r} with topk_method {method[1]!r} is not supported; "
            f"supported: {', '.join(f'{s} with {t}' for s, t in _DEEPSEEK_ROUTERS)}"
        )
    grouped = method[1] != "greedy"
    normalize = bool(raw["norm_topk_prob"])
    if normalize and method[0] == "softmax":  # published implementations disagree on what it means
        raise ConfigError("norm_topk_prob = True with scoring_func 'softmax' is not supported; supported: False")
    experts = Experts(
        count=raw["n_routed_experts"],
        per_token=raw["num_experts_per_tok"],
        width=raw["moe_intermediate_size"],
        shared_width=raw["moe_intermediate_size"] * (raw.get("n_shared_experts") or 0),
        router=method[0],
        groups=raw["n_group"] if grouped else 1,
        groups_per_token=raw["topk_group"] if grouped else 1,
        normalize=normalize,
        weight_scale=float(raw["routed_scaling_factor"]),
    )
    return _checked(experts)


def _qwen3(raw: Mapping[str, Any]) -> Config:
    heads = raw["num_attention_heads"]
    head_dim = raw.get("head_dim") or raw["hidden_size"] // heads
    rope, _ = _rope(raw, head_dim, interleaved=False)
    attention = GroupedAttention(heads, raw["num_key_value_heads"], head_dim, head_dim**-0.5)
    if heads % attention.kv_heads:
        raise ConfigError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {attention.kv_heads}")
    layers, experts = raw["num_hidden_layers"], None
    is_moe = (False,) * layers
    if raw["model_type"] == "qwen3_moe":
        every, dense = raw.get("decoder_sparse_step", 1), raw.get("mlp_only_layers") or []
        is_moe = tuple(i not in dense and (i + 1) % every == 0 for i in range(layers))
        experts = _checked(
            Experts(
                count=raw["num_local_experts"] if "num_local_experts" in raw else raw["num_experts"],
                per_token=raw["num_experts_per_tok"],
                width=raw["moe_intermediate_size"],
                shared_width=0,
                router="softmax",
                groups=1,
                groups_per_token=1,
                normalize=bool(raw["norm_topk_prob"]),
                weight_scale=1.0,
            )
        )
    return _config(raw, attention=attention, rope=rope, is_moe=is_moe, experts=experts)


def _config(raw: Mapping[str, Any], **parts: Any) -> Config:
    eos = raw.get("eos_token_id")
    return Config(
        model_type=raw["model_type"],
        vocab_size=raw["vocab_size"],
        width=raw["hidden_size"],
        dense_width=raw["intermediate_size"],
        norm_eps=raw["rms_norm_eps"],
        max_positions=raw["max_position_embeddings"],
        tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
        eos_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        **parts,
    )


def _checked(experts: Experts) -> Experts:
    """Refuses a router that could not choose: every number it divides or limits by must fit."""
    count, groups, limit, chosen = experts.count, experts.groups, experts.groups_per_token, experts.per_token
    if count % groups or not 1 <= limit <= groups:
        raise ConfigError(f"{count} experts cannot be split into n_group {groups} of which topk_group {limit} are used")
    if not 1 <= chosen <= count // groups * limit:
        raise ConfigError(
            f"num_experts_per_tok {chosen} exceeds the {count // groups * limit} experts a token may choose from"
        )
    return experts


def _rope(raw: Mapping[str, Any], dim: int, interleaved: bool) -> tuple[Rope, float]:
    """The rotary embedding, and the factor YaRN puts on latent attention's logits (DeepSeek's `mscale_all_dim`)."""
    if dim % 2:
        raise ConfigError(f"the rotary embedding needs an even number of dimensions, config.json has {dim}")
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = float(scaling.get("rope_theta") or raw["rope_theta"])
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if scaling.get("partial_rotary_factor", 1) != 1:
        raise ConfigError(
            f"partial_rotary_factor = {scaling['partial_rotary_factor']!r} is not supported; supported: 1"
        )
    if kind == "default":
        return Rope(dim, theta, interleaved), 1.0
    if kind != "yarn":
        raise ConfigError(f"rope_scaling type {kind!r} is not supported; supported: default, yarn")
    all_dim = scaling.get("mscale_all_dim") or 0.0
    yarn = Yarn(
        factor=float(scaling["factor"]),
        original_positions=scaling.get("original_max_position_embeddings") or raw["max_position_embeddings"],
        beta_fast=float(scaling.get("beta_fast") or 32.0),
        beta_slow=float(scaling.get("beta_slow") or 1.0),
        truncate=scaling.get("truncate", True),
        magnitude=_cos_sin_magnitude(scaling),
    )
    return Rope(dim, theta, interleaved, yarn), _yarn_magnitude(float(scaling["factor"]), all_dim) ** 2


def _cos_sin_magnitude(scaling: Mapping[str, Any]) -> float:
    """YaRN's attention factor (arXiv:2309.00071, section 3.4), or DeepSeek's ratio of its two `mscale`."""
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    factor, mscale, all_dim = float(scaling["factor"]), scaling.get("mscale"), scaling.get("mscale_all_dim")
    if mscale and all_dim:
        return _yarn_magnitude(factor, mscale) / _yarn_magnitude(factor, all_dim)
    return _yarn_magnitude(factor, 1.0)


def _yarn_magnitude(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    for key, allowed in _ONLY.items():
        if key in raw and raw[key] not in allowed:
            raise ConfigError(f"{key} = {raw[key]!r} is not supported; supported: {', '.join(map(repr, allowed))}")
    for key, value in raw.items():
        if key.endswith(_NUMBERS) and not isinstance(value, int | float | None):
            raise ConfigError(f"{key} = {value!r} is not a number")
    kinds = set(raw.get("layer_types") or ()) - {"full_attention"}
    if kinds:
        raise ConfigError(f"layer_types {sorted(kinds)} are not supported; supported: 'full_attention'")


_NUMBERS = (
    "_size",
    "_dim",
    "_rank",
    "_heads",
    "hidden_layers",
    "_experts",
    "_tok",
    "_eps",
    "_factor",
    "_theta",
    "_embeddings",
)
"""Endings of keys that hold numbers; `tie_word_embeddings` ends so too, and a bool is an int."""

_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
    "partial_rotary_factor": (1, None),
    "pretraining_tp": (1, None),
}
"""Keys that change what a model computes, with the values for which it is computed here."""

_DEEPSEEK_ROUTERS = (("sigmoid", "noaux_tc"), ("softmax", "greedy"), ("softmax", "group_limited_greedy"))

_FAMILIES = {
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
    "kimi_k2": _deepseek,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3,
}

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
