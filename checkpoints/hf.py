"""Hugging Face checkpoints: a folder of `config.json` and safetensors, read leaf by leaf to where each belongs."""

import dataclasses
import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from safetensors.numpy import save_file

from jaxserve.checkpoints.safetensors import DTYPES, Tensor, open_folder
from jaxserve.layers.attention import Gqa
from jaxserve.layers.config import Config
from jaxserve.layers.mla import Mla
from jaxserve.layers.moe import Mlp, Moe
from jaxserve.layers.transformer import Layer, Model, Mtp, model_params
from jaxserve.parallel.errors import CheckpointError, ConfigError, ShardingError
from jaxserve.parallel.sharding import Param, Rules, shardings

Tensors = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]
Progress = Callable[[int, int], None]
"""Called with the bytes that are in place and those there are in all."""


@dataclass(frozen=True)
class Source:
    """Which tensors of the files make a weight: the same values with its axes, cut, stacked if there are several."""

    names: tuple[str, ...]  # one, or one for each expert
    shape: tuple[int, ...]  # of each tensor
    view: tuple[int, ...]  # that shape with the weight's axes
    cut: tuple[slice, ...] = ()  # the part of the view that is the weight
    stacked: bool = False


def read_json(folder: Path) -> dict[str, Any]:
    """The content of the folder's `config.json`."""
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no config.json; a Hugging Face model folder is needed") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}); fetch it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not JSON of a model's keys, but a {type(content).__name__}; fetch it again")
    return content


def load(
    folder: Path,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
    progress: Progress | None = None,
) -> tuple[Config, Model]:
    """Reads a checkpoint, each weight converted to `dtype` and put where `rules` want it on `mesh`.

    Without rules every device has all weights, without a mesh one device does. An MTP module that the config announces
    and the files lack is left out, with a warning.

    Raises ConfigError, or CheckpointError with all tensors that are missing, unexpected, misshapen or not finite.
    """
    cfg, tensors = _open(folder)
    params = model_params(cfg, dtype)
    table = sources(cfg, params)
    _check_tensors(tensors, table, cfg, folder)
    _check_copies(tensors, cfg)
    return cfg, _read_all(tensors, table, params, placement(params, mesh, rules), progress)


def placement(params: Model, mesh: Mesh | None, rules: Rules | None) -> Model | None:
    """The tree of shardings of weights; None without a mesh. Raises ShardingError where the rules can't be kept."""
    if mesh is None and rules:
        raise ShardingError(f"rules = {dict(rules)} need a mesh whose axes they name; give mesh too")
    return None if mesh is None else shardings(params, mesh, rules or {})


def save(folder: Path, model: Model, cfg: Config, raw: dict[str, Any]) -> None:
    """Writes `config.json` and `model.safetensors` as Hugging Face publishes them, in the weights' dtypes."""
    tensors: dict[str, np.ndarray] = {}
    table = jax.tree.leaves(sources(cfg, model_params(cfg)))
    for source, leaf in zip(table, jax.tree.leaves(model), strict=True):
        for name, value in zip(source.names, np.asarray(leaf) if source.stacked else [np.asarray(leaf)], strict=True):
            tensor = tensors.setdefault(name, np.zeros(source.shape, value.dtype))
            tensor.reshape(source.view)[source.cut] = value
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")


def _open(folder: Path) -> tuple[Config, Tensors]:
    """The config of what is there, and the files' tensors."""
    raw = read_json(folder)
    cfg, tensors = Config.from_hf(raw), open_folder(folder)
    _check_quantization(raw, cfg)
    return _without_absent_mtp(cfg, tensors, folder), tensors


def _read_all(tensors: Tensors, table: Model, params: Model, where: Model | None, progress: Progress | None) -> Model:
    leaves, tree = jax.tree.flatten(params)
    places = [None] * len(leaves) if where is None else tree.flatten_up_to(where)
    sizes = [param.nbytes for param in leaves]
    arrays = []
    for param, source, place, done in zip(leaves, tree.flatten_up_to(table), places, accumulate(sizes), strict=True):
        arrays.append(_place(tensors, source, param, place))
        if progress:
            progress(done, sum(sizes))
    return tree.unflatten(arrays)


def _place(tensors: Tensors, source: Source, param: Param, place: Any) -> jax.Array:
    if place is None:
        return jnp.asarray(_read(tensors, source, param.dtype, (slice(None),) * len(param.shape)))
    return jax.make_array_from_callback(param.shape, place, lambda i: _read(tensors, source, param.dtype, i or ()))


def _read(tensors: Tensors, source: Source, dtype: Any, index: tuple[slice, ...]) -> np.ndarray:
    """The part `index` of a weight; of the file, only the bytes of that part are read, but for FP8."""
    names, index = (source.names[index[0]], index[1:]) if source.stacked and index else (source.names, index)
    parts = [_values(tensors, name).reshape(source.view)[source.cut][index].astype(dtype) for name in names]
    spoiled = [name for name, part in zip(names, parts, strict=True) if not np.isfinite(part).all()]
    if spoiled:
        raise not_finite(spoiled, dtype, tensors[spoiled[0]].path.parent)
    return np.stack(parts) if source.stacked else np.ascontiguousarray(parts[0])


def not_finite(names: list[str], dtype: Any, folder: Path) -> CheckpointError:
    """What to raise for weights with values that are no numbers to compute with."""
    return CheckpointError(
        f"{folder}: {', '.join(names)} has values that are NaN or infinite in {jnp.dtype(dtype)}; "
        "fetch or save it again, or load it in a wider dtype"
    )


def _values(tensors: Tensors, name: str) -> np.ndarray:
    """A tensor's values; of block-quantized FP8, the codes times their block's scale, in float32."""
    tensor = tensors[name]
    if tensor.dtype != "F8_E4M3":
        return tensor.read()
    return dequantize_blocks(tensor.read(), tensors[name + "_scale_inv"].read())


def dequantize_blocks(codes: np.ndarray, scale: np.ndarray, block: int = 128) -> np.ndarray:
    """float32 values of codes `[out, in]` with a scale a block of 128 x 128 (arXiv:2412.19437, section 3.3.2)."""
    rows, columns = codes.shape
    spread = scale.astype(np.float32).repeat(block, axis=0)[:rows].repeat(block, axis=1)[:, :columns]
    return codes.astype(np.float32) * spread


def _check_quantization(raw: dict[str, Any], cfg: Config) -> None:
    quantization = raw.get("quantization_config") or {}
    if not quantization:
        return
    method, block = quantization.get("quant_method"), quantization.get("weight_block_size")
    if method != "fp8" or block != [128, 128]:
        raise ConfigError(
            f"quantization_config with quant_method {method!r} and weight_block_size {block} is not supported; "
            "supported: 'fp8' with [128, 128]"
        )


def _without_absent_mtp(cfg: Config, tensors: Tensors, folder: Path) -> Config:
    prefixes = tuple(f"model.layers.{cfg.layers + i}." for i in range(cfg.mtp_layers))
    if not prefixes or any(name.startswith(prefixes) for name in tensors):
        return cfg
    warnings.warn(
        f"config.json announces {cfg.mtp_layers} MTP layer(s), but {folder} has no {prefixes[0]}*; "
        "the model is loaded without multi-token prediction",
        stacklevel=4,
    )
    return dataclasses.replace(cfg, mtp_layers=0)


def _check_tensors(tensors: Tensors, table: Model, cfg: Config, folder: Path) -> None:
    expected = {name: source.shape for source in jax.tree.leaves(table) for name in source.names}
    expected |= {copy: expected[original] for copy, original in _copies(cfg).items() if copy in tensors}
    for name, shape in list(expected.items()):
        if name in tensors and tensors[name].dtype == "F8_E4M3" and len(shape) == 2:
            expected[name + "_scale_inv"] = (math.ceil(shape[0] / 128), math.ceil(shape[1] / 128))
    found = {name: t.shape for name, t in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    unreadable = [_unreadable(name, tensors[name]) for name in expected if name in tensors]
    check_shapes(found, expected, folder, [fault for fault in unreadable if fault])


def check_shapes(found: Shapes, expected: Shapes, folder: Path, others: Sequence[str] = ()) -> None:
    """Lists everything that is wrong at once, `others` too: whoever repairs a checkpoint wants to do it once."""
    faults = [f"missing: {name} {shape}" for name, shape in expected.items() if name not in found]
    faults += [f"unexpected: {name} {shape}" for name, shape in found.items() if name not in expected]
    faults += [
        f"misshapen: {name} is {found[name]}, config.json makes it {shape}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    faults += others
    if faults:
        raise CheckpointError(f"{folder} does not fit its config.json, {len(faults)} faults:\n  " + "\n  ".join(faults))


def _unreadable(name: str, tensor: Tensor) -> str:
    """Why a tensor's values can't be read, or nothing."""
    if tensor.dtype not in DTYPES:
        return f"not supported: {name} of dtype {tensor.dtype}; supported: {', '.join(DTYPES)}"
    if tensor.dtype == "F8_E4M3" and len(tensor.shape) != 2:
        return f"not supported: {name} of dtype F8_E4M3 and shape {tensor.shape}; only matrices have scales of blocks"
    return ""


def _copies(cfg: Config) -> dict[str, str]:
    """Tensors that files may hold a second time, and what each must equal."""
    head = "model.embed_tokens.weight" if cfg.tied_embeddings else "lm_head.weight"
    copies = {"lm_head.weight": head} if cfg.tied_embeddings else {}
    for i in range(cfg.layers, cfg.layers + cfg.mtp_layers):
        copies[f"model.layers.{i}.embed_tokens.weight"] = "model.embed_tokens.weight"
        copies[f"model.layers.{i}.shared_head.head.weight"] = head
    return copies


def _check_copies(tensors: Tensors, cfg: Config) -> None:
    """An MTP module's own embedding or head is not supported, so it must be the model's; likewise a tied head."""
    for name, original in _copies(cfg).items():
        if name in tensors and not np.array_equal(_values(tensors, name), _values(tensors, original)):
            raise CheckpointError(f"{name} differs from {original}; a model in which they differ is not supported")


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
    )


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
