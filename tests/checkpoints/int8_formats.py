"""Tiny checkpoints in the published INT8 formats, made of floats by NumPy alone, each from its publisher's layout.

Each maker gives what `config.json` gains, the tensors, and the floats that they stand for.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

Weights = dict[str, np.ndarray]

MATRIX = re.compile(r".*(_proj|_proj_with_mqa)\.weight$")
"""What publishers quantize: not the embedding, the head, the router, norms."""


class Published(NamedTuple):
    """A checkpoint, and what it stands for."""

    config: dict[str, Any]  # keys of config.json
    tensors: Weights
    floats: Weights
    description: dict[str, str] | None = None  # quant_model_description.json


def by_rows(w: np.ndarray, dtype: Any = np.float32) -> tuple[np.ndarray, np.ndarray]:
    """Codes, and a scale for each row, `[out, 1]`."""
    scale = (np.abs(w).max(axis=1, keepdims=True) / 127).astype(dtype)
    return _codes(w, scale.astype(np.float32)), scale


def by_blocks(w: np.ndarray, size: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """Codes, and a scale for each block; the last of a row or column may be cut."""
    out, width = (-(-n // size) for n in w.shape)
    scale = np.zeros((out, width), np.float32)
    codes = np.zeros(w.shape, np.int8)
    for i in range(out):
        for j in range(width):
            at = np.s_[i * size : (i + 1) * size, j * size : (j + 1) * size]
            scale[i, j] = np.abs(w[at]).max() / 127
            codes[at] = _codes(w[at], scale[i, j])
    return codes, scale


def block_values(codes: np.ndarray, scale: np.ndarray, size: int = 128) -> np.ndarray:
    """What codes of blocks stand for."""
    values = np.zeros(codes.shape, np.float32)
    for (i, j), one in np.ndenumerate(scale):
        at = np.s_[i * size : (i + 1) * size, j * size : (j + 1) * size]
        values[at] = codes[at] * one
    return values


def _codes(w: np.ndarray, scale: Any) -> np.ndarray:
    return np.clip(np.round(w / scale), -127, 127).astype(np.int8)


def _rows(tensors: Weights, chosen: Callable[[str], Any], dtype: Any) -> tuple[Weights, Weights]:
    found, floats = dict(tensors), dict(tensors)
    for name, w in tensors.items():
        if chosen(name):
            found[name], found[f"{name}_scale"] = by_rows(w, dtype)
            floats[name] = found[name] * found[f"{name}_scale"].astype(np.float32)
    return found, floats


def compressed_tensors(tensors: Weights) -> Published:
    """llm-compressor's W8A8: `int-quantized`, a BF16 scale a row. Its models have no MTP modules, so those stay."""
    modules = tuple(name.removesuffix("eh_proj.weight") for name in tensors if name.endswith("eh_proj.weight"))
    chosen = lambda name: MATRIX.match(name) and not name.startswith(modules)  # noqa: E731
    found, floats = _rows(tensors, chosen, ml_dtypes.bfloat16)
    each: dict[str, Any] = {"num_bits": 8, "type": "int", "symmetric": True, "group_size": None, "actorder": None}
    each |= {"block_structure": None, "observer_kwargs": {}}
    group = {
        "targets": ["Linear"],
        "weights": each | {"strategy": "channel", "dynamic": False, "observer": "minmax"},
        "input_activations": each | {"strategy": "token", "dynamic": True, "observer": None},
        "output_activations": None,
    }
    config = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        "kv_cache_scheme": None,
        "sparsity_config": {"format": "dense", "ignore": []},
        "quantization_status": "compressed",
        "global_compression_ratio": 1.5,
    }
    return Published({"quantization_config": config}, found, floats)


def w8a8_int8(tensors: Weights) -> Published:
    """SGLang's per-channel format, as of meituan/DeepSeek-R1-Channel-INT8."""
    found, floats = _rows(tensors, MATRIX.match, np.float32)
    return Published(
        {"quantization_config": {"activation_scheme": "dynamic", "quant_method": "w8a8_int8"}}, found, floats
    )


def blockwise_int8(tensors: Weights) -> Published:
    """SGLang's format of 128 x 128 blocks, as of meituan/DeepSeek-R1-Block-INT8."""
    found, floats = dict(tensors), dict(tensors)
    for name in filter(MATRIX.match, tensors):
        found[name], found[f"{name}_scale_inv"] = by_blocks(tensors[name])
        floats[name] = block_values(found[name], found[f"{name}_scale_inv"])
    config = {"activation_scheme": "dynamic", "quant_method": "blockwise_int8", "weight_block_size": [128, 128]}
    return Published({"quantization_config": config}, found, floats)


def model_slim(tensors: Weights) -> Published:
    """vllm-ascend's: what each tensor is says a file. Attention has static activations, with a zero point."""
    found, floats = _rows(tensors, MATRIX.match, np.float32)
    kinds = dict.fromkeys(found, "FLOAT")
    rng = np.random.default_rng(7)
    for name in filter(MATRIX.match, tensors):
        static, module = "self_attn" in name and "kv_b" not in name, name.removesuffix(".weight")
        beside = {f"{name}_offset": np.zeros_like(found[f"{name}_scale"])}
        if static:
            offset, scale = rng.integers(-20, 20), np.float32(rng.uniform(0.01, 0.1))
            sums = found[name].sum(axis=1, dtype=np.int64)
            beside[f"{module}.input_scale"] = np.array([scale])
            beside[f"{module}.input_offset"] = np.array([offset], np.float32)
            beside[f"{module}.quant_bias"] = (-offset * sums).astype(np.int32)
            beside[f"{module}.deq_scale"] = (found[f"{name}_scale"][:, 0] * scale).view(np.int32).astype(np.int64)
        found |= beside
        kinds |= dict.fromkeys([name, f"{name}_scale", *beside], "W8A8" if static else "W8A8_DYNAMIC")
    described = {"model_quant_type": "W8A8_DYNAMIC", "version": "1.0.0", "group_size": 0}
    return Published({}, found, floats, described | kinds)


MAKERS = (compressed_tensors, w8a8_int8, blockwise_int8, model_slim)
