"""A model as Hugging Face publishes it, as the one file that llama.cpp reads.

Names of tensors are those of the `gguf` package, from its table for each architecture. llama.cpp wants the experts of a
layer in one tensor, and `kv_b_proj` in two, so that latents stay latent: `w_uk` with its columns as rows, and `w_uv`.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

from jaxserve.checkpoints.hf import read_json
from jaxserve.checkpoints.safetensors import Tensor, open_folder
from jaxserve.layers.config import Config, LatentAttention
from jaxserve.parallel.errors import CheckpointError, ConfigError

ARCHITECTURES = {"deepseek_v2": gguf.MODEL_ARCH.DEEPSEEK2, "qwen3": gguf.MODEL_ARCH.QWEN3}
KINDS = {"float32": Kind.F32, "bfloat16": Kind.BF16, "int8": Kind.Q8_0}
"""What matrices are held in."""


def write(folder: Path, path: Path, form: str) -> None:
    """Writes the folder's model as a GGUF without a vocabulary: only token ids go in and out.

    Vectors and routers stay in float32, as llama.cpp's own converter leaves them. Raises ConfigError for what is not
    written: other architectures, YaRN, groups of experts, tied embeddings; CheckpointError for a tensor without a name.
    """
    cfg = Config.from_hf(read_json(folder))
    _check(cfg, folder)
    architecture = ARCHITECTURES[cfg.model_type]
    names = gguf.get_tensor_name_map(architecture, cfg.layers)
    unfinished = path.with_suffix(".part")
    writer = gguf.GGUFWriter(unfinished, gguf.MODEL_ARCH_NAMES[architecture])
    _describe(writer, cfg)
    for name, values in arranged(open_folder(folder), cfg):
        plain = values.ndim == 1 or name.endswith(".mlp.gate.weight")
        kind = Kind.F32 if plain else KINDS[form]
        called = names.get_name(name, try_suffixes=(".weight",))
        if called is None:
            raise CheckpointError(f"{folder} has {name}, for which GGUF has no name in {cfg.model_type}")
        writer.add_tensor(called, gguf.quantize(values.astype(np.float32), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.replace(path)


def arranged(tensors: Mapping[str, Tensor], cfg: Config) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors that llama.cpp wants, by names as Hugging Face would give them.

    Experts are [e f d] or [e d f], `k_b_proj` is [h c n] and `v_b_proj` [h v c]; all others are as they were.
    """
    for name, tensor in tensors.items():
        if ".experts." in name:
            if ".experts.0." in name:
                each = (name.replace(".experts.0.", f".experts.{expert}.") for expert in range(_experts(cfg)))
                yield name.replace(".experts.0.", ".experts."), np.stack([tensors[one].read() for one in each])
        elif name.endswith(".kv_b_proj.weight") and isinstance(cfg.attention, LatentAttention):
            a = cfg.attention
            both = tensor.read().reshape(a.heads, a.nope_dim + a.value_dim, a.kv_rank)
            w_uk, w_uv = np.split(both, [a.nope_dim], axis=1)
            yield name.replace("kv_b_proj", "k_b_proj"), w_uk.swapaxes(1, 2)
            yield name.replace("kv_b_proj", "v_b_proj"), w_uv
        else:
            yield name, tensor.read()


def _experts(cfg: Config) -> int:
    return cfg.experts.count if cfg.experts else 0


def _check(cfg: Config, folder: Path) -> None:
    experts = cfg.experts
    reasons = {
        f"its model_type is {cfg.model_type}": cfg.model_type not in ARCHITECTURES,
        "its positions are YaRN's": cfg.rope.yarn is not None,
        "its experts are in groups": experts is not None and experts.groups > 1,
        "its embeddings are tied": cfg.tied_embeddings,
    }
    if found := [reason for reason, holds in reasons.items() if holds]:
        known = " and ".join(ARCHITECTURES)
        raise ConfigError(f"{folder} can't be written as GGUF: {', '.join(found)}; {known} without these can")


def _describe(writer: gguf.GGUFWriter, cfg: Config) -> None:
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(cfg.vocab_size)
    writer.add_context_length(cfg.max_positions)
    writer.add_embedding_length(cfg.width)
    writer.add_block_count(cfg.layers)
    writer.add_feed_forward_length(cfg.dense_width)
    writer.add_layer_norm_rms_eps(cfg.norm_eps)
    writer.add_rope_freq_base(cfg.rope.theta)
    writer.add_rope_dimension_count(cfg.rope.dim)
    writer.add_head_count(cfg.attention.heads)
    if isinstance(cfg.attention, LatentAttention):
        _describe_latents(writer, cfg.attention)
        _describe_experts(writer, cfg)
    else:
        writer.add_head_count_kv(cfg.attention.kv_heads)
        writer.add_key_length(cfg.attention.head_dim)
        writer.add_value_length(cfg.attention.head_dim)


def _describe_latents(writer: gguf.GGUFWriter, attention: LatentAttention) -> None:
    """To llama.cpp it is attention with one head of keys, the latent and what is rotated."""
    writer.add_head_count_kv(1)
    writer.add_q_lora_rank(attention.query_rank or 0)
    writer.add_kv_lora_rank(attention.kv_rank)
    writer.add_key_length(attention.kv_rank + attention.rope_dim)
    writer.add_value_length(attention.kv_rank)
    writer.add_key_length_mla(attention.nope_dim + attention.rope_dim)
    writer.add_value_length_mla(attention.value_dim)


def _describe_experts(writer: gguf.GGUFWriter, cfg: Config) -> None:
    experts = cfg.experts
    assert experts is not None
    writer.add_leading_dense_block_count(cfg.is_moe.index(True))
    writer.add_expert_count(experts.count)
    writer.add_expert_used_count(experts.per_token)
    writer.add_expert_feed_forward_length(experts.width)
    writer.add_expert_shared_count(experts.shared_width // experts.width)
    writer.add_expert_weights_scale(experts.weight_scale)
    writer.add_expert_weights_norm(experts.normalize)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SOFTMAX)
