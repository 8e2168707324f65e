"""Which tensors of published files make which weights, under Hugging Face's names: to read them, and to write them."""

import math
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from operator import mul
from typing import Any

import jax
import numpy as np

from jaxserve.layers.attention import Gqa
from jaxserve.layers.config import Config
from jaxserve.layers.mla import Mla
from jaxserve.layers.moe import Mlp, Moe
from jaxserve.layers.transformer import Layer, Model, Mtp
from jaxserve.parallel.errors import CheckpointError
from jaxserve.parallel.qarray import QArray
from jaxserve.parallel.sharding import Param

OUTPUT_BIAS = ".output_bias"
"""Of a block, beside Hugging Face's names for its weights: see `layers.transformer.Layer`."""


@dataclass(frozen=True)
class Source:
    """Which tensors of the files make a weight: the same values with its axes, cut, stacked if there are several."""

    names: tuple[str, ...]  # one, or one for each expert
    shape: tuple[int, ...]  # of each tensor
    view: tuple[int, ...]  # that shape with the weight's axes
    cut: tuple[slice, ...] = ()  # the part of the view that is the weight
    stacked: bool = False

    @property
    def inputs(self) -> tuple[int, ...]:
        """The axes of a matrix `[out, in]` that are summed over."""
        outputs = list(accumulate(self.view, mul)).index(self.shape[0]) + 1
        return self.view[outputs:]

    def scales(self, suffix: str, counts: tuple[int, ...]) -> "Scales":
        """Where the scales of a matrix are: so many along each axis of its inputs, for every row."""
        names, rows = tuple(name + suffix for name in self.names), self.view[: len(self.view) - len(self.inputs)]
        return Scales(names, (self.shape[0], math.prod(counts)), rows + counts, self.cut, self.stacked)


@dataclass(frozen=True)
class Scales(Source):
    """Which tensors have the scales of a weight; `shape` is that of one for each row and block of its inputs."""


def sources(cfg: Config, params: Model) -> Model:
    """The tree of `Source` of a model's weights, under Hugging Face's names."""
    return Model(
        embed=_weight("model.embed_tokens", params.embed),
        layers=tuple(_layer(f"model.layers.{i}", p) for i, p in enumerate(params.layers)),
        norm=_weight("model.norm", params.norm),
        head=None if params.head is None else _weight("lm_head", params.head),
        mtp=tuple(_mtp(f"model.layers.{cfg.layers + i}", p) for i, p in enumerate(params.mtp)),
    )


def _layer(at: str, p: Layer) -> Layer:
    return Layer(
        attn_norm=_weight(f"{at}.input_layernorm", p.attn_norm),
        attn=_mla(f"{at}.self_attn", p.attn) if isinstance(p.attn, Mla) else _gqa(f"{at}.self_attn", p.attn),
        ffn_norm=_weight(f"{at}.post_attention_layernorm", p.ffn_norm),
        ffn=_moe(f"{at}.mlp", p.ffn) if isinstance(p.ffn, Moe) else _mlp(f"{at}.mlp", p.ffn),
        attn_bias=_bias(f"{at}.self_attn", p.attn_bias),
        ffn_bias=_bias(f"{at}.mlp", p.ffn_bias),
    )


def _bias(at: str, p: Param | None) -> Source | None:
    return None if p is None else Source((at + OUTPUT_BIAS,), p.shape, p.shape)


def _mtp(at: str, p: Mtp) -> Mtp:
    return Mtp(
        embed_norm=_weight(f"{at}.enorm", p.embed_norm),
        hidden_norm=_weight(f"{at}.hnorm", p.hidden_norm),
        w_join=_weight(f"{at}.eh_proj", p.w_join),
        layer=_layer(at, p.layer),
        norm=_weight(f"{at}.shared_head.norm", p.norm),
    )


def _mla(at: str, p: Mla) -> Mla:
    (h, n, c), v, r = p.w_uk.shape, p.w_uv.shape[1], p.w_kr.shape[0]
    down = partial(Source, (f"{at}.kv_a_proj_with_mqa.weight",), (c + r, p.w_kr.shape[1]), (c + r, p.w_kr.shape[1]))
    up = partial(Source, (f"{at}.kv_b_proj.weight",), (h * (n + v), c), (h, n + v, c))
    return Mla(
        w_dq=None if p.w_dq is None else _weight(f"{at}.q_a_proj", p.w_dq),
        q_norm=None if p.q_norm is None else _weight(f"{at}.q_a_layernorm", p.q_norm),
        w_uq=_weight(f"{at}.q_proj" if p.w_dq is None else f"{at}.q_b_proj", p.w_uq, outputs=2),
        w_dkv=down((slice(0, c),)),
        w_kr=down((slice(c, c + r),)),
        kv_norm=_weight(f"{at}.kv_a_layernorm", p.kv_norm),
        w_uk=up((slice(None), slice(0, n))),
        w_uv=up((slice(None), slice(n, n + v))),
        w_o=_weight(f"{at}.o_proj", p.w_o),
    )


def _gqa(at: str, p: Gqa) -> Gqa:
    return Gqa(
        w_q=_weight(f"{at}.q_proj", p.w_q, outputs=2),
        w_k=_weight(f"{at}.k_proj", p.w_k, outputs=2),
        w_v=_weight(f"{at}.v_proj", p.w_v, outputs=2),
        w_o=_weight(f"{at}.o_proj", p.w_o),
        q_norm=_weight(f"{at}.q_norm", p.q_norm),
        k_norm=_weight(f"{at}.k_norm", p.k_norm),
    )


def _mlp(at: str, p: Mlp) -> Mlp:
    names = ("gate_proj", "up_proj", "down_proj")
    return Mlp(*(_weight(f"{at}.{name}", w) for name, w in zip(names, p, strict=True)))


def _moe(at: str, p: Moe) -> Moe:
    def stack(name: str, w: Param) -> Source:
        names = tuple(f"{at}.experts.{i}.{name}.weight" for i in range(w.shape[0]))
        return Source(names, w.shape[1:], w.shape[1:], stacked=True)

    bias = None if p.bias is None else Source((f"{at}.gate.e_score_correction_bias",), p.bias.shape, p.bias.shape)
    return Moe(
        w_router=_weight(f"{at}.gate", p.w_router),
        bias=bias,
        experts=Mlp(
            stack("gate_proj", p.experts.w_gate), stack("up_proj", p.experts.w_up), stack("down_proj", p.experts.w_down)
        ),
        shared=None if p.shared is None else _mlp(f"{at}.shared_experts", p.shared),
    )


def _weight(name: str, param: Param, outputs: int = 1) -> Source:
    """A tensor `name.weight`: a vector, or a matrix `[out, in]` where the weight's first `outputs` axes are the out."""
    shape = param.shape
    flat = shape if len(shape) == 1 else (math.prod(shape[:outputs]), math.prod(shape[outputs:]))
    return Source((f"{name}.weight",), flat, shape)


def to_tensors(table: Any, weights: Any) -> dict[str, np.ndarray]:
    """The tensors that make these weights, for a part of a model and the same part of its table of `Source`.

    INT8 weights are codes `[out, in]` and scales `[out, 1]`, as compressed-tensors has them. Raises CheckpointError for
    scales of blocks, and for a tensor of which only a part is INT8.
    """
    tensors: dict[str, np.ndarray] = {}
    leaves, tree = jax.tree.flatten(table)
    for source, weight in zip(leaves, tree.flatten_up_to(weights), strict=True):
        if isinstance(weight, QArray):
            _check_rows(source, weight)
            _fill(tensors, source.scales("_scale", (1,) * len(source.inputs)), weight.scale)
            weight = weight.codes
        _fill(tensors, source, weight)
    return tensors


def _check_rows(source: Source, weight: QArray) -> None:
    axes = len(source.inputs)
    if math.prod(weight.scale.shape[-axes:]) != 1:
        raise CheckpointError(
            f"{source.names[0]} has scales of shape {weight.scale.shape}, for blocks of its inputs; in int-quantized "
            "files a row has one. Save it with checkpoints.store"
        )


def _fill(tensors: dict[str, np.ndarray], source: Source, weight: Any) -> None:
    """Puts a weight where it belongs in its tensors, which others may share."""
    values = np.asarray(weight)
    for name, value in zip(source.names, values if source.stacked else [values], strict=True):
        tensor = tensors.setdefault(name, np.zeros(source.shape, value.dtype))
        if tensor.dtype != value.dtype:
            raise CheckpointError(f"{name} would be {tensor.dtype} in one part and {value.dtype} in another")
        tensor.reshape(source.view)[source.cut] = value
