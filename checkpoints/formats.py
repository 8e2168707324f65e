"""Formats of quantized checkpoints: which matrices are codes, where their scales are, and what is refused.

    compressed-tensors  llm-compressor's `int-quantized`   name.weight_scale      a scale for each row
    w8a8_int8           SGLang's, per channel              name.weight_scale      a scale for each row
    blockwise_int8      SGLang's                           name.weight_scale_inv  a scale for 128 x 128 codes
    ModelSlim           `quant_model_description.json`     name.weight_scale      a scale for each row
    fp8                 DeepSeek's (arXiv:2412.19437)      name.weight_scale_inv  a scale for 128 x 128 codes

What a config says of activations must be what our products do: INT8, symmetric, rounded when they are there. Only of
ModelSlim may they be static (`W8A8`): ours are rounded with a scale of their own, and its scale is not needed.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxserve.parallel.errors import ConfigError
from jaxserve.parallel.qarray import QArray

DESCRIPTION = "quant_model_description.json"
BLOCK = 128
_LINEAR = re.compile(r"(?:.*(?:_proj|_proj_with_mqa|\.mlp\.gate)|lm_head)$")
"""Modules that are `torch.nn.Linear` in published code, or may be."""


@dataclass(frozen=True)
class Format:
    """How a checkpoint stores matrices `module.weight` that are codes."""

    name: str = ""
    codes: str = ""  # their dtype in files; "": there are none
    suffix: str = "_scale_inv"
    block: int | None = None  # a scale is for so many rows and columns; None: for a row
    announced: Callable[[str], bool | None] = lambda module: None  # whether a module has codes; None: the files know
    offsets: bool = False  # whether there are zero points beside, all zero
    static: Callable[[str], bool] = lambda module: False  # whether activations had a scale of their own

    def scale_shapes(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """What shapes the scales of a matrix may have."""
        if self.block is None:
            return (shape[0], 1), (shape[0],)
        return ((math.ceil(shape[0] / self.block), math.ceil(shape[1] / self.block)),)

    def counts(self, inputs: tuple[int, ...]) -> tuple[int, ...]:
        """How many scales a row has along each axis of its inputs.

        In memory all blocks have one size: where `block` doesn't divide, they are finer, and some have the same scale.
        """
        width = math.prod(inputs)
        if self.block is None or width <= self.block:
            return (1,) * len(inputs)
        *heads, each = inputs
        size = math.gcd(self.block, width)
        if heads and size % each == 0:
            return (math.prod(heads) // (size // each), 1)
        return (*heads, each // math.gcd(size, each))

    def rows(self, scale: np.ndarray, shape: tuple[int, ...], count: int) -> np.ndarray:
        """The scales of a matrix as `[out, count]`, float32."""
        scale = scale.astype(np.float32)
        if self.block is None:
            return scale.reshape(-1, 1)
        columns = np.arange(count) * (shape[1] // count) // self.block
        return scale.repeat(self.block, axis=0)[: shape[0], columns]

    def dequantized(self, codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """The values of a matrix, float32."""
        scale = self.rows(scale, codes.shape, 1 if self.block is None else codes.shape[1])
        return codes.astype(np.float32) * scale

    def beside(self, name: str, rows: int) -> dict[str, tuple[int, ...]]:
        """Tensors that may lie beside a matrix of codes and are not needed, with their shapes."""
        module = name.removesuffix(".weight")
        dropped = {f"{name}_offset": (rows, 1)} if self.offsets else {}
        if self.static(module):
            dropped |= {f"{module}.{one}": (1,) for one in ("input_scale", "input_offset")}
            dropped |= {f"{module}.{one}": (rows,) for one in ("deq_scale", "quant_bias")}
        return dropped


FP8 = Format("fp8", "F8_E4M3", block=BLOCK)


def find_format(raw: Mapping[str, Any], folder: Path) -> Format:
    """The format of a folder with this `config.json`. Raises ConfigError that names the key that is not supported."""
    quantization, path = raw.get("quantization_config") or {}, folder / DESCRIPTION
    if path.exists():
        if quantization:
            raise ConfigError(f"{folder} has a quantization_config and {DESCRIPTION}; remove the one that is not true")
        return _model_slim(path)
    if not quantization:
        return Format()
    method = _object(quantization, "").get("quant_method")
    readers = {"compressed-tensors": _compressed_tensors, "w8a8_int8": _per_channel} | dict.fromkeys(
        ("blockwise_int8", "fp8"), _per_block
    )
    if not isinstance(method, str) or method not in readers:
        raise _unsupported("quant_method", method, readers)
    return readers[method](quantization, raw.get("num_hidden_layers", 0))


def _compressed_tensors(quantization: dict[str, Any], layers: int) -> Format:
    _only(quantization, "", _COMPRESSED | {"quant_method": ("compressed-tensors",), "version": None})
    sparsity = _object(quantization.get("sparsity_config") or {}, "sparsity_config").get("format", "dense")
    if sparsity != "dense":
        raise _unsupported("sparsity_config.format", sparsity, ("dense",))
    groups, ignored = quantization.get("config_groups") or {}, _patterns(quantization, "ignore")
    if not groups:
        raise ConfigError("quantization_config of 'compressed-tensors' without config_groups is not supported")
    for name, group in _object(groups, "config_groups").items():
        at = f"config_groups.{name}."
        _only(group, at, _GROUP)
        _only(group.get("weights") or {}, f"{at}weights.", _ROWS)
        _only(group.get("input_activations") or {}, f"{at}input_activations.", _TOKENS)
    targets = [target for group in groups.values() for target in _patterns(group, "targets")]

    def announced(module: str) -> bool | None:
        if _listed(module, ignored):
            return False
        if _listed(module, targets):
            return True
        # Published code knows the router and MTP modules by no such class, or not at all.
        known = "Linear" in targets and bool(_LINEAR.match(module)) and not module.endswith(".mlp.gate")
        return True if known and _layer_of(module) < layers else None

    return Format("compressed-tensors", "I8", "_scale", announced=announced)


def _per_channel(quantization: dict[str, Any], layers: int) -> Format:
    keys = {"quant_method": None, "activation_scheme": (None, "dynamic"), "is_dynamic": (None, True)}
    _only(quantization, "", keys | {"ignore": None, "packed_modules_mapping": None})
    skipped = _patterns(quantization, "ignore")
    announced = lambda module: False if _listed(module, skipped, within=True) else None  # noqa: E731
    return Format("w8a8_int8", "I8", "_scale", announced=announced)


def _per_block(quantization: dict[str, Any], layers: int) -> Format:
    method, block = quantization["quant_method"], quantization.get("weight_block_size")
    if block != [BLOCK, BLOCK]:
        raise ConfigError(
            f"quantization_config with quant_method {method!r} and weight_block_size {block} is not supported; "
            f"supported: [{BLOCK}, {BLOCK}]"
        )
    if method == "fp8":
        return FP8
    keys = {"quant_method": None, "weight_block_size": None, "activation_scheme": (None, "dynamic")}
    _only(quantization, "", keys | {"ignored_layers": None, "modules_to_not_convert": None})
    skipped = _patterns(quantization, "ignored_layers") + _patterns(quantization, "modules_to_not_convert")
    announced = lambda module: False if _listed(module, skipped, within=True) else None  # noqa: E731
    return Format(method, "I8", block=BLOCK, announced=announced)


def _model_slim(path: Path) -> Format:
    try:
        kinds = json.loads(path.read_text())
        of_tensors = {name: kind for name, kind in kinds.items() if "." in name}
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"{path} is not JSON of tensors and their kinds ({error}); fetch it again") from None
    known = ("FLOAT", "W8A8", "W8A8_DYNAMIC")
    for name, kind in of_tensors.items():
        if kind not in known:
            raise ConfigError(f"{DESCRIPTION}: {name} is {kind!r}, not supported; supported: {', '.join(known)}")
    kind_of = lambda module: of_tensors.get(f"{module}.weight", "FLOAT")  # noqa: E731
    announced, static = (lambda module: kind_of(module) != "FLOAT"), (lambda module: kind_of(module) == "W8A8")
    return Format("ModelSlim", "I8", "_scale", announced=announced, offsets=True, static=static)


_COMPRESSED = {
    "format": ("int-quantized",),
    "quantization_status": (None, "compressed", "frozen"),
    "config_groups": None,
    "ignore": None,
    "global_compression_ratio": None,
    "kv_cache_scheme": (None,),
    "sparsity_config": None,
    "transform_config": (None, {}),
}
_GROUP = {
    "targets": None,
    "weights": None,
    "input_activations": None,
    "output_activations": (None,),
    "format": (None, "int-quantized"),
}
_EITHER = {
    "num_bits": (8,),
    "type": ("int",),
    "symmetric": (True,),
    "group_size": (None, -1),
    "block_structure": (None,),
    "actorder": (None,),
    "observer": None,
    "observer_kwargs": None,
    "scale_dtype": None,
    "zp_dtype": None,
}
_ROWS = _EITHER | {"strategy": ("channel",), "dynamic": (None, False)}
_TOKENS = _EITHER | {"strategy": ("token",), "dynamic": (True,)}


def _only(found: Any, at: str, known: Mapping[str, Any]) -> None:
    """Raises ConfigError for a key that is not known, or of another value than one of those it may have."""
    for key, value in _object(found, at).items():
        if key not in known:
            raise ConfigError(f"quantization_config.{at}{key} = {value!r} is not supported; remove it if it is idle")
    for key, values in known.items():
        if values is not None and found.get(key) not in values:
            raise _unsupported(f"{at}{key}", found.get(key), values)


def _object(found: Any, at: str) -> Mapping[str, Any]:
    if not isinstance(found, Mapping):
        raise ConfigError(f"quantization_config {at} = {found!r}: it must be an object of keys")
    return found


def _patterns(found: Mapping[str, Any], key: str) -> list[str]:
    """Names of modules, or expressions."""
    patterns = found.get(key) or []
    if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ConfigError(f"quantization_config: {key} = {patterns!r} must be a list of names")
    return patterns


def _unsupported(key: str, value: Any, known: Iterable[Any]) -> ConfigError:
    return ConfigError(
        f"quantization_config.{key} = {value!r} is not supported; supported: {', '.join(map(repr, known))}"
    )


def _listed(module: str, patterns: Iterable[str], within: bool = False) -> bool:
    """Whether one of the names, or after "re:" expressions, is the module's, or a part of its name."""
    for pattern in patterns:
        if pattern.startswith("re:"):
            try:
                if re.match(pattern[3:], module):
                    return True
            except re.error as error:
                raise ConfigError(f"quantization_config: {pattern!r} is no regular expression ({error})") from None
        elif pattern == module or (within and pattern in module):
            return True
    return False


def _layer_of(module: str) -> int:
    found = re.search(r"\.layers\.(\d+)\.", module)
    return int(found[1]) if found else -1


def quantization_config(table: Any, weights: Any) -> dict[str, Any]:
    """The `quantization_config` of weights, or of their `Param`, that `to_tensors` writes: compressed-tensors.

    `table` is their tree of `Source`. What is float is named in `ignore`, by an expression where that is so in all
    layers.
    """
    quantized = lambda leaf: isinstance(leaf, QArray)  # noqa: E731
    leaves, tree = jax.tree.flatten(table)
    is_codes: dict[str, bool] = {"lm_head": False}  # tied to the embedding, it has no tensor
    for source, weight in zip(leaves, tree.flatten_up_to(weights), strict=True):
        modules = [name.removesuffix(".weight") for name in source.names]
        is_codes |= {module: quantized(weight) for module in modules if _LINEAR.match(module)}
    scheme = {"num_bits": 8, "type": "int", "symmetric": True, "group_size": None, "actorder": None}
    group = {
        "targets": ["Linear"],
        "weights": scheme | {"strategy": "channel", "dynamic": False, "observer": "minmax"},
        "input_activations": scheme | {"strategy": "token", "dynamic": True, "observer": None},
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "version": "0.9.0",
        "config_groups": {"group_0": group},
        "ignore": _names(is_codes),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _names(is_codes: Mapping[str, bool]) -> list[str]:
    """The modules that have no codes; a single expression for those of all layers, if they are all."""
    kinds = {module: re.sub(r"\\\.\d+", r"\\.\\d+", re.escape(module)) for module in is_codes}
    mixed = {kinds[module] for module, codes in is_codes.items() if codes}
    whole = {module: f"re:{kinds[module]}$" if "\\d" in kinds[module] else module for module in is_codes}
    names = [module if kinds[module] in mixed else whole[module] for module, codes in is_codes.items() if not codes]
    return list(dict.fromkeys(names))
