import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.bench import costs
from jaxserve.bench.costs import Cost, Phase
from jaxserve.bench.limits import Limits
from jaxserve.checkpoints import hf
from jaxserve.layers.config import Config, LatentAttention
from jaxserve.layers.int8 import multiplied
from jaxserve.layers.transformer import cache_params, model_params
from tests.jaxserve.conftest import GOLDENS
from tests.oracles import reference

LIMITS = Limits(bandwidth=100.0, peaks={"int8": 1000.0, "bfloat16": 200.0, "float32": 100.0})


class Counted:
    """What the oracle multiplies for a prompt: it counts where it multiplies."""

    def __init__(self, monkeypatch):
        self.operations, self.weights = 0, {}
        linear, attention = reference.linear, reference.causal_attention

        def counted_linear(weights, name, x):
            weight = weights[f"{name}.weight"]
            self.operations += 2 * len(x) * weight.size
            self.weights[name] = weight.size
            return linear(weights, name, x)

        def counted_attention(q_thn, k_thn, v_thv, scale):
            t, h, n = q_thn.shape
            self.operations += sum(2 * h * (n + v_thv.shape[-1]) * seen for seen in range(1, t + 1))
            return attention(q_thn, k_thn, v_thv, scale)

        monkeypatch.setattr(reference, "linear", counted_linear)
        monkeypatch.setattr(reference, "causal_attention", counted_attention)


@pytest.mark.parametrize("name", ["deepseek_v2_lite", "deepseek_v3", "qwen3", "qwen3_moe"])
def test_a_prompt_costs_what_the_oracle_multiplies_and_reads(name, monkeypatch):
    folder, t = GOLDENS / name, 11
    raw, cfg = hf.read_json(folder), dataclasses.replace(Config.from_hf(hf.read_json(folder)), mtp_layers=0)
    weights = {key: np.asarray(tensor.read(), np.float64) for key, tensor in hf.open_folder(folder).items()}
    counted = Counted(monkeypatch)
    reference.logits(raw, weights, np.arange(t) * 5 % cfg.vocab_size)
    visited = sum(".experts." in key and key.endswith("gate_proj") for key in counted.weights)
    params, cache = model_params(cfg), cache_params(cfg, 1, 16)
    phase = Phase.prompt(t, visited)._replace(chosen=t)
    found = costs.parts(cfg, params, cache, phase)
    att = cfg.attention
    entry = att.kv_rank + att.rope_dim if isinstance(att, LatentAttention) else 2 * att.kv_heads * att.head_dim
    total = costs.total(found.values())
    assert sum(total.operations.values()) == counted.operations
    assert total.bytes == 4 * (sum(counted.weights.values()) + t * cfg.width + cfg.layers * t * entry)


def test_a_round_of_latent_attention_is_counted_by_hand():
    cfg = Config.tiny("deepseek_v2_lite")  # 3 heads of 12 + 8, values 10, latents 16; 8 experts of 14, 3 a token
    params, cache = multiplied(model_params(cfg)), cache_params(cfg, 2, 16)
    found = costs.parts(cfg, params, cache, Phase.decoding(batch=2, seen=100, visited=9))
    absorbed = 2 * 3 * ((2 * 16 + 8) * 200 + 16 * (12 + 10) * 2)
    assert found["attention"].operations == {"float32": 3 * absorbed}
    read, written = 2 * 99 * (16 + 8), 2 * (16 + 8)
    assert found["attention"].bytes == 3 * 4 * (read + written + 3 * (12 + 10) * 16)
    assert found["experts"].operations == {"int8": 2 * 2 * 2 * 3 * 3 * 14 * 32}  # products, layers, rows, choices
    assert found["experts"].bytes == 9 * (3 * 14 * 32 + 4 * (14 + 14 + 32))  # codes, and a scale a row
    assert found["router"].operations == {"float32": 2 * 2 * 2 * 8 * 32}
    assert found["head"] == Cost(97 * 32 + 97 * 4, {"int8": 2 * 2 * 97 * 32})
    assert found["embedding"] == Cost(2 * 32 * 4, {})
    assert "shared expert" in found and "dense network" in found


def test_grouped_attention_reads_keys_and_values_in_their_dtype():
    cfg = Config.tiny("qwen3")  # 4 heads, 2 of keys, of 12
    found = costs.parts(
        cfg, model_params(cfg, jnp.bfloat16), cache_params(cfg, 1, 4, jnp.bfloat16), Phase(1, 7, 6, 1, 0)
    )
    assert found["attention"] == Cost(3 * 7 * 2 * (2 * 2 * 12), {"bfloat16": 3 * 4 * 4 * 12 * 7})
    assert "experts" not in found and "router" not in found


def test_the_roofline_is_the_longer_of_memory_and_arithmetic():
    cost = Cost(bytes=100, operations={"int8": 500, "float32": 25})
    assert (costs.memory_seconds(cost, LIMITS), costs.compute_seconds(cost, LIMITS)) == (1.0, 0.75)
    assert (costs.ideal_seconds(cost, LIMITS), costs.bound(cost, LIMITS)) == (1.0, "memory")
    busy = cost._replace(bytes=10)
    assert (costs.ideal_seconds(busy, LIMITS), costs.bound(busy, LIMITS)) == (0.75, "compute")
    assert busy.intensity == 52.5
