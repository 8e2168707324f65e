"""Make the golden files: tiny random checkpoints and what Hugging Face transformers computes with them.

`python tests/oracles/make_goldens.py` rewrites `tests/oracles/goldens/` in seconds on one core. It needs an
environment of its own with torch and transformers (made with torch 2.13, transformers 5.23, safetensors, numpy),
neither of which jaxserve depends on, and it imports nothing of jaxserve. The weights come from NumPy's generator, so
a rerun with the same versions gives the same bytes.

Each variant is one folder, laid out as a published checkpoint (one tensor an expert, `[out, in]`, float32):
    config.json          in the 4.x spelling of the hub, or, where `Variant.spelling` is 5, as transformers 5 saves it
    model.safetensors    or shards with model.safetensors.index.json
    golden.npz           for i = 0, 1, 2:
        prompt_i  int32   [t]      token ids, t = 1, 7, 33
        logits_i  float32 [t, u]   of every position, from one pass with eager attention and experts
        greedy_i  int32   [20]     tokens that follow; each from a full pass without cache; no token ends the text

Seeds are tried in order until no decision is close: the best token leads by `TOKEN_GAP`, and the last expert (and
group) chosen leads the first one left out by `ROUTER_GAP`. So another order of float32 sums can't flip a token or an
expert.
"""

import json
import re
import shutil
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.utils.logging import disable_progress_bar

GOLDENS = Path(__file__).parent / "goldens"
PROMPT_LENGTHS = (1, 7, 33)
NUM_GREEDY = 20
TOKEN_GAP = 2e-3
ROUTER_GAP = 2e-4

Arrays = dict[str, np.ndarray]
Tensors = dict[str, torch.Tensor]


class Variant(NamedTuple):
    """A checkpoint to make."""

    config: dict[str, Any]  # what config.json says, in the 4.x spelling
    shards: int = 1  # files the weights are split over
    spelling: int = 4  # of config.json: major version of transformers


class Architecture(NamedTuple):
    """The classes of transformers that compute a `model_type`."""

    config: type
    model: type


ARCHITECTURES = {
    "deepseek_v2": Architecture(DeepseekV2Config, DeepseekV2ForCausalLM),
    "deepseek_v3": Architecture(DeepseekV3Config, DeepseekV3ForCausalLM),
    "kimi_k2": Architecture(DeepseekV3Config, DeepseekV3ForCausalLM),  # unknown to transformers; published as V3
    "qwen3": Architecture(Qwen3Config, Qwen3ForCausalLM),
    "qwen3_moe": Architecture(Qwen3MoeConfig, Qwen3MoeForCausalLM),
}


def main() -> None:
    """Write every variant to its folder and report its size."""
    prepare()
    for name, variant in variants().items():
        write_variant(GOLDENS / name, variant)


def prepare() -> None:
    """Compute on one thread, for the same bits every time, and quietly."""
    torch.set_num_threads(1)
    disable_progress_bar()


def write_variant(folder: Path, variant: Variant, seed: int = 0) -> None:
    """Write one checkpoint and its golden outputs, then check that the files alone reproduce them."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for attempt in count(seed):
        model = random_model(variant.config, attempt)
        golden = safe_golden(model, attempt)
        if golden is not None:
            break
    tensors = published_tensors(model)
    write_config(folder, variant)
    write_tensors(folder, tensors, variant.shards)
    np.savez(folder / "golden.npz", **golden)
    check_reload(folder, variant, golden)
    parameters = sum(tensor.numel() for tensor in tensors.values())
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder.name:20} {parameters:6} parameters {size // 1024:4} KiB  seed {attempt}", flush=True)


# What is computed


def random_model(config: dict[str, Any], seed: int) -> torch.nn.Module:
    """A float32 model with eager attention whose weights are drawn by `draw`."""
    architecture = ARCHITECTURES[config["model_type"]]
    model = architecture.model._from_config(hf_config(config), **EAGER).eval()
    rng = np.random.default_rng(seed)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        tensor.copy_(torch.from_numpy(draw(rng, name, tuple(tensor.shape))))
    return model


EAGER = {"attn_implementation": "eager", "experts_implementation": "eager", "dtype": torch.float32}


def hf_config(config: dict[str, Any]) -> Any:
    """The configuration object of transformers, which may change the dictionary it is given."""
    fields = json.loads(json.dumps(config))
    return ARCHITECTURES[fields.pop("model_type")].config(**fields)


def draw(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Weights that keep activations near one, so that logits spread and attention and routing are decided."""
    noise = rng.standard_normal(shape, dtype=np.float32)
    if name.endswith("norm.weight"):
        return 1 + 0.2 * noise
    if name.endswith("e_score_correction_bias"):
        # Mostly negative: an expert of a group that was not chosen must lose even to a score below zero.
        return 0.25 * noise - 0.4
    if name.endswith("embed_tokens.weight"):
        return 0.25 * noise
    gain = 2.0 if name.endswith(("mlp.gate.weight", "lm_head.weight")) else 1.3
    return np.float32(gain / shape[-1] ** 0.5) * noise


def safe_golden(model: torch.nn.Module, seed: int) -> Arrays | None:
    """`golden_arrays`, or None where a decision is too close or the text repeats itself."""
    router_gaps: list[float] = []

    def watch(router: torch.nn.Module, _: Any, out: Any) -> None:
        router_gaps.append(router_gap(router, out[0]))

    hooks = [router.register_forward_hook(watch) for router in routers(model)]
    token_gaps: list[float] = []
    golden = golden_arrays(model, seed, token_gaps)
    for hook in hooks:
        hook.remove()
    varied = all(len(set(golden[f"greedy_{i}"].tolist())) >= 5 for i in range(len(PROMPT_LENGTHS)))
    clear = min(token_gaps) > TOKEN_GAP and min(router_gaps, default=1.0) > ROUTER_GAP
    return golden if clear and varied else None


def golden_arrays(model: torch.nn.Module, seed: int, gaps: list[float]) -> Arrays:
    """Prompts, logits and greedy tokens; the lead of each greedy token is appended to `gaps`."""
    rng = np.random.default_rng((seed, 1))
    arrays: Arrays = {}
    for i, length in enumerate(PROMPT_LENGTHS):
        prompt = rng.integers(0, model.config.vocab_size, length, dtype=np.int32)
        tokens = prompt.tolist()
        arrays[f"prompt_{i}"] = prompt
        arrays[f"logits_{i}"] = logits_of(model, tokens)
        for _ in range(NUM_GREEDY):
            last = logits_of(model, tokens)[-1]
            second, first = np.sort(last)[-2:]
            gaps.append(float(first - second))
            tokens.append(int(last.argmax()))
        arrays[f"greedy_{i}"] = np.array(tokens[length:], np.int32)
    return arrays


def logits_of(model: torch.nn.Module, tokens: list[int]) -> np.ndarray:
    """Logits `[t, u]` of every position from one pass without a cache."""
    with torch.no_grad():
        return model(torch.tensor([tokens]), use_cache=False).logits[0].numpy()


def routers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The routers of a model; a dense one has none."""
    return [module for name, module in model.named_modules() if name.endswith("mlp.gate")]


def router_gap(router: torch.nn.Module, logits: torch.Tensor) -> float:
    """By how much the last expert and the last group chosen lead the first ones left out, over all tokens.

    Softmax keeps order, and its small results have small errors, so there the lead is that of the logits.
    """
    bias = getattr(router, "e_score_correction_bias", None)
    scores = logits if bias is None else logits.sigmoid() + bias
    groups = getattr(router, "num_group", None) or 1
    if groups == 1 or getattr(router, "topk_method", "") == "greedy":
        return lead(scores, router.top_k)
    grouped = scores.view(len(scores), groups, -1)
    best = grouped.topk(1 if bias is None else 2).values.sum(-1)
    left_out = best < best.topk(router.topk_group).values[:, -1:]
    inside = grouped.masked_fill(left_out[..., None], -torch.inf).flatten(1)
    return min(lead(best, router.topk_group), lead(inside, router.top_k))


def lead(scores: torch.Tensor, chosen: int) -> float:
    """The smallest distance between the last of `chosen` and the next."""
    if chosen == scores.shape[-1]:
        return torch.inf
    top = scores.topk(chosen + 1).values
    return float((top[:, -2] - top[:, -1]).min())


# What is written


def published_tensors(model: torch.nn.Module) -> Tensors:
    """The weights under their published names: transformers 5 keeps the experts of a layer in two tensors."""
    tensors: Tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if (match := re.fullmatch(r"(.*\.experts)\.(gate_up_proj|down_proj)", name)) is None:
            tensors[name] = tensor.clone()
            continue
        parts = ("gate_proj", "up_proj") if match[2] == "gate_up_proj" else ("down_proj",)
        for i, expert in enumerate(tensor):
            for part, weight in zip(parts, expert.chunk(len(parts)), strict=True):
                tensors[f"{match[1]}.{i}.{part}.weight"] = weight.clone()
    return tensors


def write_config(folder: Path, variant: Variant) -> None:
    """Write config.json: the dictionary itself, or what transformers 5 makes of it."""
    if variant.spelling == 5:
        saved = hf_config(variant.config).to_diff_dict()
        config = {**saved, "architectures": variant.config["architectures"], "dtype": "float32"}
        config.pop("torch_dtype", None)
    else:
        config = variant.config
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def write_tensors(folder: Path, tensors: Tensors, shards: int) -> None:
    """Write one file, or `shards` files of neighbouring tensors and their index."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for i, names in enumerate(np.array_split(list(tensors), shards), start=1):
        file = f"model-{i:05}-of-{shards:05}.safetensors"
        save_file({str(name): tensors[str(name)] for name in names}, folder / file, metadata={"format": "pt"})
        weight_map |= {str(name): file for name in names}
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def check_reload(folder: Path, variant: Variant, golden: Arrays) -> None:
    """Raise unless transformers, given the folder, computes the golden logits to the bit."""
    config = json.loads((folder / "config.json").read_text())
    architecture = ARCHITECTURES[variant.config["model_type"]]
    model, info = architecture.model.from_pretrained(
        folder, config=hf_config(config), output_loading_info=True, **EAGER
    )
    wrong = {key: names for key, names in info.items() if names}
    if wrong:
        raise AssertionError(f"{folder.name}: names don't match the model: {wrong}")
    for parameter in model.parameters():
        # Loaded weights lie where the file has them, and sums differ in the last bit with their alignment.
        parameter.data = parameter.data.clone()
    for i in range(len(PROMPT_LENGTHS)):
        logits = logits_of(model.eval(), golden[f"prompt_{i}"].tolist())
        if not np.array_equal(logits, golden[f"logits_{i}"]):
            raise AssertionError(f"{folder.name}: the files give other logits for prompt {i}")


# The variants


def variants() -> dict[str, Variant]:
    """Every variant by name: published configurations made small, with odd sizes."""
    return {
        "deepseek_v2_lite": Variant(deepseek_v2_lite()),
        "deepseek_v2": Variant(deepseek_v2()),
        "deepseek_v3": Variant(deepseek_v3(), shards=3),
        "deepseek_v3_plain": Variant(deepseek_v3_plain(), spelling=5),
        "kimi_k2": Variant(kimi_k2()),
        "qwen3": Variant(qwen3()),
        "qwen3_tied": Variant(qwen3_tied()),
        "qwen3_moe": Variant(qwen3_moe()),
        "qwen3_moe_sparse": Variant(qwen3_moe_sparse(), spelling=5),
    }


def deepseek_v2_lite() -> dict[str, Any]:
    """DeepSeek-V2-Lite: no query latent, greedy softmax router, weights not normalised."""
    return deepseek_base("deepseek_v2", "DeepseekV2ForCausalLM") | {
        "rope_scaling": yarn(factor=40, original=16, mscale=0.707, mscale_all_dim=0.707),
        "scoring_func": "softmax",
        "topk_method": "greedy",
    }


def deepseek_v2() -> dict[str, Any]:
    """DeepSeek-V2: query latent, group-limited router, weights scaled by 16.

    Unlike the published 0.707 for both, `mscale` differs from `mscale_all_dim`, so that the factor on cos and sin is
    not 1. The small `rope_theta` gives YaRN's ramp a value between its ends.
    """
    return deepseek_base("deepseek_v2", "DeepseekV2ForCausalLM") | {
        "hidden_size": 45,
        "kv_lora_rank": 14,
        "max_position_embeddings": 960,
        "moe_intermediate_size": 7,
        "n_group": 3,
        "n_routed_experts": 9,
        "q_lora_rank": 18,
        "qk_rope_head_dim": 10,
        "rope_scaling": yarn(factor=40, original=24, mscale=1.0, mscale_all_dim=0.707),
        "rope_theta": 100,
        "routed_scaling_factor": 16.0,
        "scoring_func": "softmax",
        "topk_group": 2,
        "topk_method": "group_limited_greedy",
    }


def deepseek_v3() -> dict[str, Any]:
    """DeepSeek-V3: sigmoid router with correction bias and groups; prompts outgrow the original 16 positions."""
    return deepseek_base("deepseek_v3", "DeepseekV3ForCausalLM") | {
        "moe_intermediate_size": 6,
        "n_group": 4,
        "n_routed_experts": 12,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_experts_per_tok": 4,
        "q_lora_rank": 20,
        "rope_scaling": yarn(factor=40, original=16, mscale=1.0, mscale_all_dim=1.0),
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "topk_group": 2,
        "topk_method": "noaux_tc",
    }


def deepseek_v3_plain() -> dict[str, Any]:
    """DeepSeek-V3 without YaRN, query latent and groups.

    `rms_norm_eps` is large to show which norms take it: those of the layers do, those of the latents keep 1e-6, in
    transformers as in DeepSeek's own code.
    """
    return deepseek_base("deepseek_v3", "DeepseekV3ForCausalLM") | {
        "first_k_dense_replace": 2,
        "hidden_size": 50,
        "norm_topk_prob": True,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "qk_rope_head_dim": 6,
        "rms_norm_eps": 0.03,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "v_head_dim": 7,
        "vocab_size": 101,
    }


def kimi_k2() -> dict[str, Any]:
    """Kimi K2: DeepSeek-V3 without groups; `beta_fast` equals `beta_slow`, so YaRN's ramp is one step wide."""
    return deepseek_base("kimi_k2", "DeepseekV3ForCausalLM") | {
        "max_position_embeddings": 512,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "q_lora_rank": 20,
        "qk_rope_head_dim": 12,
        "rope_scaling": yarn(factor=32.0, original=16, mscale=1.0, mscale_all_dim=1.0)
        | {"beta_fast": 1.0, "beta_slow": 1.0},
        "rope_theta": 50000.0,
        "routed_scaling_factor": 2.827,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    }


def qwen3() -> dict[str, Any]:
    """Qwen3: heads wider than the model divided by their number, each key shared by two of six queries."""
    return qwen_base("qwen3", "Qwen3ForCausalLM")


def qwen3_tied() -> dict[str, Any]:
    """Small Qwen3 with tied embeddings, and YaRN as its model card documents it."""
    return qwen_base("qwen3", "Qwen3ForCausalLM") | {
        "head_dim": 20,
        "max_position_embeddings": 4096,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 1024, "rope_type": "yarn"},
        "rope_theta": 1000,  # with 1024 positions, the ramp spans dimensions 2 to 8
        "tie_word_embeddings": True,
    }


def qwen3_moe() -> dict[str, Any]:
    """Qwen3-MoE as published: every layer routed, weights normalised."""
    return qwen_base("qwen3_moe", "Qwen3MoeForCausalLM") | {
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 5,
        "norm_topk_prob": True,
        "num_experts": 7,
        "num_experts_per_tok": 3,
        "num_key_value_heads": 2,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    }


def qwen3_moe_sparse() -> dict[str, Any]:
    """Qwen3-MoE with a dense layer between routed ones, weights not normalised."""
    return qwen3_moe() | {"head_dim": 10, "mlp_only_layers": [1], "norm_topk_prob": False, "vocab_size": 113}


def deepseek_base(model_type: str, architecture: str) -> dict[str, Any]:
    """The fields that DeepSeek's and Kimi's published configurations share."""
    return {
        **common(model_type, architecture),
        "aux_loss_alpha": 0.001,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "ep_size": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 16,
        "moe_intermediate_size": 8,
        "moe_layer_freq": 1,
        "n_group": 1,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "norm_topk_prob": False,
        "num_attention_heads": 3,
        "num_experts_per_tok": 3,
        "num_key_value_heads": 3,
        "num_nextn_predict_layers": 0,
        "pretraining_tp": 1,
        "q_lora_rank": None,
        "qk_nope_head_dim": 12,
        "qk_rope_head_dim": 8,
        "rope_scaling": None,
        "rope_theta": 10000,
        "routed_scaling_factor": 1.0,
        "seq_aux": True,
        "topk_group": 1,
        "v_head_dim": 10,
    }


def qwen_base(model_type: str, architecture: str) -> dict[str, Any]:
    """The fields that the published configurations of Qwen3 share."""
    return {
        **common(model_type, architecture),
        "bos_token_id": 95,
        "eos_token_id": 96,
        "head_dim": 14,
        "max_window_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "use_sliding_window": False,
    }


def common(model_type: str, architecture: str) -> dict[str, Any]:
    """The fields of every configuration."""
    return {
        "architectures": [architecture],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": 48,
        "initializer_range": 0.02,
        "intermediate_size": 32,
        "max_position_embeddings": 640,
        "model_type": model_type,
        "num_hidden_layers": 3,
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": 97,
    }


def yarn(*, factor: float, original: int, mscale: float, mscale_all_dim: float) -> dict[str, Any]:
    """`rope_scaling` as DeepSeek and Kimi publish it.

    Both factors are always set: where one is absent or 0, transformers and DeepSeek's code differ.
    """
    return {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": factor,
        "mscale": mscale,
        "mscale_all_dim": mscale_all_dim,
        "original_max_position_embeddings": original,
        "type": "yarn",
    }


if __name__ == "__main__":
    main()
