"""The models in NumPy float64, written from the papers: the oracle of the numeric tests.

Whole sequences, no cache, no batch, loops where they read better. Nothing here may import jaxserve. `config` is a
Hugging Face config.json as a dict, `weights` its tensors under their published names; linear weights are [out, in].
Letters as in the design: t tokens, d model width, h heads, n/r/v no-rope, rope and value widths of a head, c latent
width, e experts, k experts per token, u vocabulary.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

Array = np.ndarray
Config = Mapping[str, Any]
Weights = Mapping[str, Array]

SIGMOID_ROUTED = {"deepseek_v3", "kimi_k2"}

# DeepSeek builds q_a_layernorm and kv_a_layernorm without passing rms_norm_eps (modeling_deepseek.py, model.py, and
# Hugging Face's port), so the latents use the class default whatever the config says. vLLM passes rms_norm_eps.
LATENT_EPS = 1e-6


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Root mean square layer normalization (arXiv:1910.07467, eq. 4), over the last axis."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * np.asarray(weight, np.float64)


def linear(weights: Weights, name: str, x: Array) -> Array:
    """`x w^T`, plus the bias where the checkpoint has one."""
    y = x @ np.asarray(weights[f"{name}.weight"], np.float64).T
    bias = weights.get(f"{name}.bias")
    return y if bias is None else y + np.asarray(bias, np.float64)


def softmax(x: Array) -> Array:
    """Over the last axis; -inf becomes exactly 0."""
    z = np.exp(x - x.max(axis=-1, keepdims=True))
    return z / z.sum(axis=-1, keepdims=True)


def rope_settings(config: Config) -> dict[str, Any]:
    """`rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (4.x), as one dict with `rope_type`."""
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    found.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    found.setdefault("rope_type", found.get("type", "default"))
    return found


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN (arXiv:2309.00071, eq. 22): 0.1 ln(s) + 1, with DeepSeek's multiplier on the logarithm."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def yarn_range(rope: Mapping[str, Any], dim: int, original: int) -> tuple[float, float]:
    """The pairs between which YaRN goes from extrapolation to interpolation (arXiv:2309.00071, section 3.2).

    Pair i turns `original * theta^(-2i/dim) / 2pi` times in the original context; solved for i.
    """

    def pair_turning(times: float) -> float:
        return dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))

    low, high = pair_turning(rope.get("beta_fast") or 32), pair_turning(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    return max(low, 0), min(high, dim - 1)


def rope_frequencies(config: Config) -> tuple[Array, float]:
    """Radians a position for each pair, [r/2], and the factor on cosine and sine (YaRN, arXiv:2309.00071, eq. 20-22).

    DeepSeek-V2/V3 give `mscale` and `mscale_all_dim`; their ratio, 1 in every published checkpoint, is then the factor.
    """
    rope, dim = rope_settings(config), config.get("qk_rope_head_dim") or config["head_dim"]
    pairs = np.arange(dim // 2)
    plain = float(rope["rope_theta"]) ** (-2.0 * pairs / dim)
    if rope["rope_type"] == "default":
        return plain, 1.0
    if rope["rope_type"] != "yarn":
        raise ValueError(f"rope_type {rope['rope_type']!r}; this oracle knows 'default' and 'yarn'.")
    original = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
    factor = rope.get("factor") or config["max_position_embeddings"] / original
    low, high = yarn_range(rope, dim, original)
    interpolated = np.clip((pairs - low) / (high - low or 0.001), 0, 1)
    inv_freq = plain * (1 - interpolated) + plain / factor * interpolated
    mscale, all_dim, given = rope.get("mscale"), rope.get("mscale_all_dim"), rope.get("attention_factor")
    ratio = yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim) if mscale and all_dim else yarn_mscale(factor, 1)
    return inv_freq, ratio if given is None else given


def rotate_interleaved(x: Array, positions: Array, inv_freq: Array, factor: float = 1.0) -> Array:
    """RoPE on [t, ..., r] with pairs (0, 1), (2, 3), …, as complex numbers (RoFormer, arXiv:2104.09864, eq. 12-15)."""
    turn = factor * np.exp(1j * np.outer(positions, inv_freq))
    turn = turn.reshape(len(x), *[1] * (x.ndim - 2), -1)
    z = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
    return np.stack([z.real, z.imag], axis=-1).reshape(x.shape)


def rotate_half_split(x: Array, positions: Array, inv_freq: Array, factor: float = 1.0) -> Array:
    """RoPE on [t, ..., r] with pairs (i, i + r/2): the order of Llama and Qwen checkpoints."""
    half = x.shape[-1] // 2
    paired = np.stack([x[..., :half], x[..., half:]], axis=-1).reshape(x.shape)
    turned = rotate_interleaved(paired, positions, inv_freq, factor)
    return np.concatenate([turned[..., 0::2], turned[..., 1::2]], axis=-1)


def causal_attention(q_thn: Array, k_thn: Array, v_thv: Array, scale: float) -> Array:
    """Softmax attention of every head, token i over tokens 0..i (arXiv:1706.03762, section 3.2). Returns [t, h, v]."""
    tokens = len(q_thn)
    future = np.triu(np.ones((tokens, tokens), bool), k=1)
    heads = []
    for h in range(q_thn.shape[1]):
        scores = np.where(future, -np.inf, q_thn[:, h] @ k_thn[:, h].T * scale)
        heads.append(softmax(scores) @ v_thv[:, h])
    return np.stack(heads, axis=1)


def gqa(config: Config, weights: Weights, prefix: str, x: Array) -> Array:
    """Grouped-query attention with RMSNorm on each query and key head (Qwen3, arXiv:2505.09388, section 2)."""
    tokens, heads, kv_heads = len(x), config["num_attention_heads"], config["num_key_value_heads"]
    positions, (inv_freq, factor) = np.arange(tokens), rope_frequencies(config)

    def normed(projection: str, norm: str, count: int) -> Array:
        y = linear(weights, f"{prefix}.{projection}", x).reshape(tokens, count, config["head_dim"])
        y = rms_norm(y, weights[f"{prefix}.{norm}.weight"], config["rms_norm_eps"])
        return rotate_half_split(y, positions, inv_freq, factor)

    q, k = normed("q_proj", "q_norm", heads), normed("k_proj", "k_norm", kv_heads)
    v = linear(weights, f"{prefix}.v_proj", x).reshape(tokens, kv_heads, config["head_dim"])
    shared_by = np.arange(heads) // (heads // kv_heads)
    out = causal_attention(q, k[:, shared_by], v[:, shared_by], config["head_dim"] ** -0.5)
    return linear(weights, f"{prefix}.o_proj", out.reshape(tokens, -1))


def softmax_scale(config: Config) -> float:
    """(n + r)^-1/2, times YaRN's mscale squared: DeepSeek moves it there from the cosines (inference/model.py, MLA)."""
    rope = rope_settings(config)
    scale = (config["qk_nope_head_dim"] + config["qk_rope_head_dim"]) ** -0.5
    if rope["rope_type"] == "default" or not rope.get("mscale_all_dim"):
        return scale
    return scale * yarn_mscale(rope["factor"], rope["mscale_all_dim"]) ** 2


def rounded_to_int8(x: Array) -> Array:
    """Rows as whole multiples of a 127th of their largest magnitude, half to even."""
    step = np.abs(x).max(axis=-1, keepdims=True) / 127
    return np.round(x / np.where(step, step, 1)) * step


def mla(config: Config, weights: Weights, prefix: str, x: Array) -> Array:
    """Multi-head latent attention, keys and values expanded (DeepSeek-V2, arXiv:2405.04434, section 2.1 and app. C)."""
    tokens, heads, n, r = len(x), config["num_attention_heads"], config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    latent = config["kv_lora_rank"]
    positions, (inv_freq, factor) = np.arange(tokens), rope_frequencies(config)
    rotate = rotate_interleaved if config.get("rope_interleave", True) else rotate_half_split

    if config.get("q_lora_rank"):
        c = linear(weights, f"{prefix}.q_a_proj", x)
        c = rms_norm(c, weights[f"{prefix}.q_a_layernorm.weight"], LATENT_EPS)
        q = linear(weights, f"{prefix}.q_b_proj", c).reshape(tokens, heads, n + r)
    else:
        q = linear(weights, f"{prefix}.q_proj", x).reshape(tokens, heads, n + r)
    compressed = linear(weights, f"{prefix}.kv_a_proj_with_mqa", x)
    c = rms_norm(compressed[:, :latent], weights[f"{prefix}.kv_a_layernorm.weight"], LATENT_EPS)
    k_rope = rotate(compressed[:, None, latent:], positions, inv_freq, factor)
    if config.get("kv_cache_dtype") == "int8":
        c, k_rope = rounded_to_int8(c), k_rope.astype(ml_dtypes.bfloat16).astype(np.float64)
    kv = linear(weights, f"{prefix}.kv_b_proj", c).reshape(tokens, heads, n + config["v_head_dim"])

    q_rope, k_rope = rotate(q[..., n:], positions, inv_freq, factor), k_rope.repeat(heads, axis=1)
    q, k = np.concatenate([q[..., :n], q_rope], axis=-1), np.concatenate([kv[..., :n], k_rope], axis=-1)
    out = causal_attention(q, k, kv[..., n:], softmax_scale(config))
    return linear(weights, f"{prefix}.o_proj", out.reshape(tokens, -1))


def top(scores: Array, count: int) -> Array:
    """Indices of the `count` largest over the last axis, largest first, ties to the lower index."""
    return np.argsort(-scores, axis=-1, kind="stable")[..., :count]


def keep_groups(scores: Array, group_scores: Array, count: int) -> Array:
    """`scores` [t, e] with -inf outside the `count` best groups.

    DeepSeek's inference/model.py and transformers 5 (V3 only) fill with -inf. DeepSeek's early modeling_deepseek.py,
    transformers 4.x, and V2 in both fill with 0: then an expert outside wins where biased scores inside are negative.
    """
    kept = np.zeros(group_scores.shape, bool)
    np.put_along_axis(kept, top(group_scores, count), True, axis=-1)
    return np.where(kept.repeat(scores.shape[-1] // kept.shape[-1], axis=-1), scores, -np.inf)


def route_v3(scores_logits: Array, bias: Array, config: Config) -> tuple[Array, Array]:
    """Experts [t, k] and their weights for logits [t, e] (DeepSeek-V3, arXiv:2412.19437, section 2.1.2, eq. 12-16).

    The bias chooses and does not weigh. A group is worth the sum of its two best biased scores.
    """
    scores = 1 / (1 + np.exp(-scores_logits))
    biased = scores + bias
    group_scores = np.sort(biased.reshape(len(biased), config.get("n_group") or 1, -1))[..., -2:].sum(-1)
    chosen = top(keep_groups(biased, group_scores, config.get("topk_group") or 1), config["num_experts_per_tok"])
    gates = np.take_along_axis(scores, chosen, axis=-1)
    if config.get("norm_topk_prob", True):
        gates = gates / gates.sum(-1, keepdims=True)
    return chosen, gates * config["routed_scaling_factor"]


def route_v2(logits: Array, config: Config) -> tuple[Array, Array]:
    """Experts [t, k] and their weights (DeepSeek-V2, arXiv:2405.04434, section 2.2, eq. 20-22).

    A group is worth its best expert. Weights are the probabilities among all experts, not renormalized.
    """
    if config.get("norm_topk_prob"):
        # modeling_deepseek.py normalizes and drops the scaling; inference/model.py and transformers do the reverse.
        raise ValueError("norm_topk_prob with softmax routing: the published codes disagree, and no checkpoint has it.")
    scores = choice = softmax(logits)
    if config.get("topk_method", "greedy") == "group_limited_greedy":
        choice = keep_groups(scores, scores.reshape(len(scores), config["n_group"], -1).max(-1), config["topk_group"])
    chosen = top(choice, config["num_experts_per_tok"])
    return chosen, np.take_along_axis(scores, chosen, axis=-1) * config["routed_scaling_factor"]


def route_qwen3(logits: Array, config: Config) -> tuple[Array, Array]:
    """Experts [t, k] and their weights: the most probable, renormalized if `norm_topk_prob` (arXiv:2505.09388, 2)."""
    scores = softmax(logits)
    chosen = top(scores, config["num_experts_per_tok"])
    gates = np.take_along_axis(scores, chosen, axis=-1)
    return chosen, gates / gates.sum(-1, keepdims=True) if config.get("norm_topk_prob") else gates


def mlp(weights: Weights, prefix: str, x: Array) -> Array:
    """SwiGLU (arXiv:2002.05202, eq. 6): down(silu(gate x) * up x)."""
    gate, up = linear(weights, f"{prefix}.gate_proj", x), linear(weights, f"{prefix}.up_proj", x)
    return linear(weights, f"{prefix}.down_proj", gate / (1 + np.exp(-gate)) * up)


def moe(config: Config, weights: Weights, prefix: str, x: Array) -> Array:
    """Weighted routed experts, plus the shared ones, one wide mlp, where there are any (arXiv:2401.06066, eq. 9)."""
    router_logits = linear(weights, f"{prefix}.gate", x)
    if config["model_type"] in SIGMOID_ROUTED:
        indices, gates = route_v3(router_logits, weights[f"{prefix}.gate.e_score_correction_bias"], config)
    else:
        indices, gates = (route_v2 if config["model_type"] == "deepseek_v2" else route_qwen3)(router_logits, config)
    out = np.zeros_like(x)
    for expert in np.unique(indices):
        tokens, choices = np.nonzero(indices == expert)
        out[tokens] += gates[tokens, choices, None] * mlp(weights, f"{prefix}.experts.{expert}", x[tokens])
    has_shared = f"{prefix}.shared_experts.gate_proj.weight" in weights
    return out + mlp(weights, f"{prefix}.shared_experts", x) if has_shared else out


def decoder_layer(config: Config, weights: Weights, prefix: str, x: Array) -> Array:
    """Norm, attention, add, norm, feed-forward, add. A layer is sparse where its checkpoint has a router."""
    attention = mla if "kv_lora_rank" in config else gqa
    eps, mlp_prefix = config["rms_norm_eps"], f"{prefix}.mlp"
    y = rms_norm(x, weights[f"{prefix}.input_layernorm.weight"], eps)
    x = x + attention(config, weights, f"{prefix}.self_attn", y)
    y = rms_norm(x, weights[f"{prefix}.post_attention_layernorm.weight"], eps)
    sparse = f"{mlp_prefix}.gate.weight" in weights
    return x + (moe(config, weights, mlp_prefix, y) if sparse else mlp(weights, mlp_prefix, y))


def embed(weights: Weights, tokens: Sequence[int]) -> Array:
    return np.asarray(weights["model.embed_tokens.weight"], np.float64)[np.asarray(tokens)]


def head(config: Config, weights: Weights, norm: str, x: Array) -> Array:
    """Logits [t, u] after the named norm; the embedding is the head where the two are tied."""
    tied = config.get("tie_word_embeddings", False)
    x = rms_norm(x, weights[f"{norm}.weight"], config["rms_norm_eps"])
    return linear(weights, "model.embed_tokens" if tied else "lm_head", x)


def hidden_states(config: Config, weights: Weights, tokens: Sequence[int]) -> Array:
    """Output of the last layer, [t, d], before the final norm."""
    x = embed(weights, tokens)
    for layer in range(config["num_hidden_layers"]):
        x = decoder_layer(config, weights, f"model.layers.{layer}", x)
    return x


def logits(config: Config, weights: Weights, tokens: Sequence[int]) -> Array:
    """[t, u]; row i predicts token i + 1."""
    return head(config, weights, "model.norm", hidden_states(config, weights, tokens))


def greedy(config: Config, weights: Weights, tokens: Sequence[int], n: int) -> list[int]:
    """The n tokens that follow, everything recomputed for each."""
    sequence = list(tokens)
    for _ in range(n):
        sequence.append(int(np.argmax(logits(config, weights, sequence)[-1])))
    return sequence[len(tokens) :]


def mtp_logits(config: Config, weights: Weights, tokens: Sequence[int]) -> Array:
    """DeepSeek-V3's first MTP module (arXiv:2412.19437, section 2.2): [t - 1, u]; row i predicts token i + 2.

    Row i joins the hidden state of token i, after the main model's final norm, with the embedding of token i + 1. The
    paper's eq. 21 writes [hidden; embedding]; the published eh_proj takes [embedding; hidden]. Row i sits at position i
    as in vLLM and SGLang; transformers says i + 1, the same to RoPE, which sees differences only. vLLM zeroes the
    embedding of row 0, though it is already that of token 1 (its issue 33299); the other three do not.
    """
    prefix, eps = f"model.layers.{config['num_hidden_layers']}", config["rms_norm_eps"]
    previous = rms_norm(hidden_states(config, weights, tokens)[:-1], weights["model.norm.weight"], eps)
    e = rms_norm(embed(weights, tokens[1:]), weights[f"{prefix}.enorm.weight"], eps)
    h = rms_norm(previous, weights[f"{prefix}.hnorm.weight"], eps)
    x = linear(weights, f"{prefix}.eh_proj", np.concatenate([e, h], axis=-1))
    return head(config, weights, f"{prefix}.shared_head.norm", decoder_layer(config, weights, prefix, x))


def dequantize_fp8_blocks(codes_as_float: Array, scale_inv: Array, block: tuple[int, int] = (128, 128)) -> Array:
    """Codes times their block's `weight_scale_inv`; the last blocks may be cut (DeepSeek-V3, README_WEIGHTS.md)."""
    rows, columns = codes_as_float.shape
    scale = np.asarray(scale_inv, np.float64).repeat(block[0], axis=0).repeat(block[1], axis=1)
    return codes_as_float * scale[:rows, :columns]


def top_k_set(logits: Array, k: int) -> set[int]:
    """Tokens not below the k-th largest logit: ties with it all stay, as in vLLM. Temperature doesn't matter."""
    return set(np.flatnonzero(logits >= np.sort(logits)[-k]).tolist())


def top_p_set(logits: Array, p: float, temperature: float = 1.0) -> set[int]:
    """The smallest set of most probable tokens of mass >= p (arXiv:1904.09751, section 3.1), crossing token included.

    As vLLM sums it, from the least probable up: the tail of mass <= 1 - p goes. Tokens as probable as the last that
    stays all stay.
    """
    probabilities = softmax(logits / temperature)
    falling = np.sort(probabilities)[::-1]
    mass_from_here = np.cumsum(falling[::-1])[::-1]
    last = falling[max(np.count_nonzero(mass_from_here > 1 - p), 1) - 1]
    return set(np.flatnonzero((probabilities >= last) & (probabilities > 0)).tolist())


def min_p_set(logits: Array, min_p: float, temperature: float = 1.0) -> set[int]:
    """Tokens at least min_p times as probable as the most probable (arXiv:2407.01082, section 3)."""
    probabilities = softmax(logits / temperature)
    return set(np.flatnonzero(probabilities >= min_p * probabilities.max()).tolist())


def kept_set(logits: Array, temperature: float, k: int, p: float, min_p: float) -> set[int]:
    """All filters in vLLM's order: temperature, min-p, top-k of those left, top-p of the renormalized rest."""
    ids = np.arange(len(logits))
    left = np.where(np.isin(ids, list(min_p_set(logits, min_p, temperature))), logits, -np.inf)
    left = np.where(np.isin(ids, list(top_k_set(left, k))), left, -np.inf)
    return top_p_set(left, p, temperature)
