"""Make checkpoints of random sizes with golden outputs, to compare beyond the goldens that are kept.

`python tests/oracles/make_live.py OUT_DIR --seed 0 --count 10` writes `OUT_DIR/<family>_<seed>_<i>/` in the layout of
`make_goldens.py`, which says what environment both need. The families take turns. The same seed gives the same folders.
`compare_live.py`, which needs jaxserve alone, reads them and compares.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from make_goldens import Variant, deepseek_base, prepare, qwen_base, write_variant, yarn

Config = dict[str, Any]


def main() -> None:
    """Write `--count` folders under OUT_DIR."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=10)
    args = parser.parse_args()
    prepare()
    for i in range(args.count):
        family = list(FAMILIES)[i % len(FAMILIES)]
        rng = np.random.default_rng((args.seed, i))
        spelling = 4 if family == "kimi_k2" else pick(rng, 4, 5)  # no version of transformers saves "kimi_k2"
        variant = Variant(FAMILIES[family](rng), shards=pick(rng, 1, 1, 2, 5), spelling=spelling)
        write_variant(args.out_dir / f"{family}_{args.seed}_{i}", variant, seed=1000 * args.seed)


def pick(rng: np.random.Generator, *choices: Any) -> Any:
    """One of `choices`, with its own type."""
    return choices[rng.integers(len(choices))]


def deepseek_v2(rng: np.random.Generator) -> Config:
    """DeepSeek-V2, its router greedy or limited to groups.

    Weights are not normalised, which transformers never does for V2; two sizes are even, as its complex view of the
    rotary part needs.
    """
    method = pick(rng, "greedy", "group_limited_greedy")
    return (
        deepseek_base("deepseek_v2", "DeepseekV2ForCausalLM")
        | latent_attention(rng)
        | experts(rng, grouped=method == "group_limited_greedy")
        | {"kv_lora_rank": 2 * int(rng.integers(3, 15)), "qk_nope_head_dim": 2 * int(rng.integers(2, 13))}
        | {"norm_topk_prob": False, "scoring_func": "softmax", "topk_method": method}
    )


def deepseek_v3(rng: np.random.Generator) -> Config:
    """DeepSeek-V3, with one group or several."""
    return (
        deepseek_base("deepseek_v3", "DeepseekV3ForCausalLM")
        | latent_attention(rng)
        | experts(rng, grouped=pick(rng, False, True))
        | {"norm_topk_prob": pick(rng, False, True), "scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    )


def kimi_k2(rng: np.random.Generator) -> Config:
    """Kimi K2: DeepSeek-V3 with one group."""
    one_group = experts(rng, grouped=False)
    return deepseek_v3(rng) | one_group | {"model_type": "kimi_k2", "norm_topk_prob": True}


def qwen3(rng: np.random.Generator) -> Config:
    """Dense Qwen3."""
    tied = {"tie_word_embeddings": pick(rng, False, True)}
    return qwen_base("qwen3", "Qwen3ForCausalLM") | grouped_attention(rng) | tied


def qwen3_moe(rng: np.random.Generator) -> Config:
    """Qwen3-MoE, with or without dense layers, by list or by step."""
    num_experts = int(rng.integers(4, 12))
    return (
        qwen_base("qwen3_moe", "Qwen3MoeForCausalLM")
        | grouped_attention(rng)
        | {
            "decoder_sparse_step": pick(rng, 1, 1, 2),
            "mlp_only_layers": pick(rng, [], [0], [1]),
            "moe_intermediate_size": int(rng.integers(3, 14)),
            "norm_topk_prob": pick(rng, False, True),
            "num_experts": num_experts,
            "num_experts_per_tok": int(rng.integers(1, num_experts)),
        }
    )


FAMILIES: dict[str, Callable[[np.random.Generator], Config]] = {
    "deepseek_v2": deepseek_v2,
    "deepseek_v3": deepseek_v3,
    "kimi_k2": kimi_k2,
    "qwen3": qwen3,
    "qwen3_moe": qwen3_moe,
}


def sizes(rng: np.random.Generator, heads: int) -> Config:
    """Widths and depth; transformers wants the model's width to be a multiple of `heads` in DeepSeek-V2."""
    return {
        "hidden_size": heads * int(rng.integers(24 // heads + 1, 80 // heads)),
        "intermediate_size": int(rng.integers(17, 60)),
        "num_attention_heads": heads,
        "num_hidden_layers": int(rng.integers(3, 5)),
        "rms_norm_eps": pick(rng, 1e-6, 1e-5, 1e-2),
        "vocab_size": int(rng.integers(98, 200)),
    }


def latent_attention(rng: np.random.Generator) -> Config:
    """Sizes of DeepSeek's attention, and its rotary embedding with or without YaRN."""
    heads = int(rng.integers(1, 8))
    factor, original = pick(rng, 4, 32.0, 40), pick(rng, 16, 100, 1000)
    scaling = yarn(factor=factor, original=original, mscale=pick(rng, 0.707, 1.0), mscale_all_dim=pick(rng, 0.707, 1.0))
    return sizes(rng, heads) | {
        "first_k_dense_replace": int(rng.integers(0, 3)),
        "kv_lora_rank": int(rng.integers(5, 30)),
        "max_position_embeddings": int(factor * original),
        "num_key_value_heads": heads,
        "q_lora_rank": pick(rng, None, int(rng.integers(7, 40))),
        "qk_nope_head_dim": int(rng.integers(3, 25)),
        "qk_rope_head_dim": 2 * int(rng.integers(3, 9)),
        "rope_scaling": pick(rng, None, scaling, scaling),
        "rope_theta": pick(rng, 100, 10000, 50000.0),
        "v_head_dim": int(rng.integers(3, 25)),
    }


def experts(rng: np.random.Generator, *, grouped: bool) -> Config:
    """Sizes of DeepSeek's experts; at least two a group, since two make a group's score."""
    groups = int(rng.integers(2, 5)) if grouped else 1
    chosen = int(rng.integers(1, groups + 1))
    per_group = int(rng.integers(2, 5)) if grouped else int(rng.integers(4, 16))
    return {
        "moe_intermediate_size": int(rng.integers(3, 14)),
        "n_group": groups,
        "n_routed_experts": groups * per_group,
        "n_shared_experts": int(rng.integers(1, 4)),
        "num_experts_per_tok": int(rng.integers(2, chosen * per_group + 1)),
        "routed_scaling_factor": pick(rng, 1.0, 2.5, 16.0),
        "topk_group": chosen,
    }


def grouped_attention(rng: np.random.Generator) -> Config:
    """Sizes of Qwen's attention, and its rotary embedding with or without YaRN."""
    shared = int(rng.integers(1, 4))
    queries = int(rng.integers(1, 4))
    original = pick(rng, 16, 100, 1024)
    scaling = {"factor": 4.0, "original_max_position_embeddings": original, "rope_type": "yarn"}
    return sizes(rng, shared * queries) | {
        "head_dim": 2 * int(rng.integers(3, 14)),
        "max_position_embeddings": 4 * original,
        "num_key_value_heads": shared,
        "rope_scaling": pick(rng, None, scaling),
        "rope_theta": pick(rng, 1000, 1000000, 1000000.0),
    }


if __name__ == "__main__":
    main()
