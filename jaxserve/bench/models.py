"""The models that benchmarks measure: standard ones with random weights, or any folder's.

The codes of a standard model's matrices are drawn by a seed, and are the same in each of its forms: INT8 is codes and
scales, floats are their products. So forms can be compared, and large INT8 models are there in seconds.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from jaxserve.checkpoints import hf
from jaxserve.checkpoints.hub import EMBEDDED, check_new, locate
from jaxserve.layers.config import Config
from jaxserve.layers.int8 import is_int8, is_quantized, multiplied
from jaxserve.layers.transformer import Model, model_params
from jaxserve.llm import check_vocabulary, resolve_dtype
from jaxserve.models import open_checkpoint
from jaxserve.parallel.errors import RequestError
from jaxserve.parallel.qarray import BOUND, QArray
from jaxserve.parallel.sharding import CODES_STD, Param
from jaxserve.tokenizer import Tokenizer

Form = Literal["int8", "bfloat16", "float32"]
Progress = Callable[[int, int], None]
"""Called with the bytes that are in place and those there are in all."""

_COMMON: dict[str, Any] = {
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_DEEPSEEK = _COMMON | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "n_group": 1,
    "topk_group": 1,
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "rope_theta": 10000.0,
}

MODELS: dict[str, dict[str, Any]] = {
    "bench-1b": _DEEPSEEK
    | {
        "vocab_size": 32_000,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "moe_intermediate_size": 512,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    },
    "bench-dense": _COMMON
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 32_000,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rope_theta": 1_000_000.0,
    },
    "bench-v2-lite": _DEEPSEEK
    | {
        "vocab_size": 102_400,
        "hidden_size": 2048,
        "intermediate_size": 10_944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
    },
}
"""By name, the content of each one's `config.json`."""


class Subject(NamedTuple):
    """A model to measure."""

    name: str
    form: Form
    cfg: Config
    params: Model  # of `Param`
    model: Model
    tokenizer: Tokenizer

    @property
    def bytes(self) -> int:
        """Of all weights."""
        return sum(p.nbytes for p in jax.tree.leaves(self.params))

    def about(self) -> dict[str, Any]:
        """What it is, as JSON."""
        return {
            "name": self.name,
            "form": self.form,
            "dtype": jnp.dtype(self.params.norm.dtype).name,
            "bytes": self.bytes,
        }


def load(name: str, form: Form = "int8", dtype: str = "auto", progress: Progress | None = None) -> Subject:
    """A standard model, the embedded one, a folder or a name on the hub, in a form.

    `dtype` is that of activations and of what isn't INT8, in the form `int8`; "auto": float32 on CPU, else bfloat16.
    Raises RequestError for a form that a folder can't have; else what `LLM` raises.
    """
    kind = jnp.dtype(_floats(dtype) if form == "int8" else form)
    if name in MODELS:
        return random(name, MODELS[name], form, kind, progress)
    folder = locate(name)
    checkpoint, tokenizer = open_checkpoint(folder), Tokenizer.from_folder(folder)
    params = checkpoint.params(kind, form == "int8")
    check_vocabulary(tokenizer, checkpoint.cfg, folder)
    if form != "int8" and is_int8(params):
        raise RequestError(f"--form {form}: {name} is INT8 in its files; leave --form out")
    weights = checkpoint.read(dtype=kind, int8=form == "int8", progress=progress)
    return Subject(name, form, checkpoint.cfg, params, weights, tokenizer)


def random(name: str, raw: dict[str, Any], form: Form, dtype: Any, progress: Progress | None = None) -> Subject:
    """A model with random weights, of what stands in its `config.json`; `dtype` is that of what isn't INT8."""
    cfg = Config.from_hf(raw)
    params = describe(cfg, form, jnp.dtype(dtype))
    return Subject(name, form, cfg, params, draw(params, progress=progress), padded_tokenizer(cfg.vocab_size))


def _floats(dtype: str) -> Any:
    return resolve_dtype(dtype, {"dtype": "bfloat16"})


def describe(cfg: Config, form: Form, dtype: Any) -> Model:
    """The tree of `Param` of a standard model; in the form `int8` the head is INT8 too, and the rest has this dtype."""
    return multiplied(model_params(cfg, dtype)) if form == "int8" else model_params(cfg, jnp.dtype(form))


def draw(params: Any, seed: int = 0, progress: Progress | None = None) -> Any:
    """The tree of random weights of a tree of `Param`, with its standard deviations; forms of one seed agree."""
    leaves, tree = jax.tree.flatten(params, is_leaf=is_quantized)
    sizes, weights = [sum(p.nbytes for p in jax.tree.leaves(leaf)) for leaf in leaves], []
    for number, leaf in enumerate(leaves):
        weights.append(_weight(leaf, np.random.default_rng([seed, number])))
        if progress:
            progress(sum(sizes[: number + 1]), sum(sizes))
    return tree.unflatten(weights)


def _weight(p: Param | QArray, rng: np.random.Generator) -> Any:
    if isinstance(p, QArray):
        scale = p.scale.mean * CODES_STD / _SPREAD
        return QArray(jnp.asarray(_codes(p.shape, rng)), jnp.full(p.scale.shape, scale, p.scale.dtype))
    if p.std == 0:
        return jnp.full(p.shape, p.mean, p.dtype)
    dtype = jnp.dtype(p.dtype)
    values = (np.arange(256, dtype=np.uint8).view(np.int8) * (p.std / _SPREAD)).astype(dtype)
    bits = values.view(f"u{dtype.itemsize}")[_codes(p.shape, rng).view(np.uint8)]  # NumPy looks up integers faster
    return jnp.asarray(bits.view(dtype))


_SPREAD = float(np.maximum(np.arange(-BOUND - 1, BOUND + 1), -BOUND).std())
"""The standard deviation of the codes that are drawn: all are equally probable."""


def _codes(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Of whole bytes, which NumPy draws ten times faster than any narrower range; -128 is none of our codes."""
    codes = rng.integers(-BOUND - 1, BOUND, shape, np.int8, endpoint=True)
    return np.maximum(codes, -BOUND, out=codes)


def padded_tokenizer(vocabulary: int) -> Tokenizer:
    """The embedded model's tokenizer with as many tokens: those that it lacks stand for nothing that is written."""
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(_padded(vocabulary))), eos_ids=(1,))


def _padded(vocabulary: int) -> dict[str, Any]:
    content = json.loads((EMBEDDED / "tokenizer.json").read_text())
    known = content["model"]["vocab"]
    known |= {f"extra{number}": number for number in range(len(known), vocabulary)}
    return content


def save(folder: Path, name: str, form: Form, progress: Progress | None = None) -> None:
    """Writes a standard model as Hugging Face publishes them; INT8 as compressed-tensors, the rest in bfloat16 then.

    Raises RequestError for a name that is none, CheckpointError if the folder has something in it.
    """
    if name not in MODELS:
        raise RequestError(f"{name!r} is no standard model; there are {', '.join(MODELS)}")
    check_new(folder)
    raw, dtype = MODELS[name], "bfloat16" if form == "int8" else form
    cfg = Config.from_hf(raw)
    hf.save(folder, draw(describe(cfg, form, jnp.dtype(dtype)), progress=progress), cfg, raw | {"dtype": dtype})
    (folder / "tokenizer.json").write_text(json.dumps(_padded(cfg.vocab_size)))
    settings = json.loads((EMBEDDED / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # how transformers reads tokenizer.json alone
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
