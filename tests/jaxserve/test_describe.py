import jax.numpy as jnp
import pytest

from jaxserve.describe import architecture, human, memory, parts
from jaxserve.layers.config import Config


def number(rows, name):
    return int(dict(rows)[name].replace(",", ""))


def test_parts_add_up_to_the_total():
    rows = parts(Config.tiny("deepseek_v3"))
    named = sum(number(rows, name) for name, _ in rows[:-2])
    assert named == number(rows, "total")


def test_a_token_uses_its_own_experts_and_not_the_mtp_module():
    cfg = Config.tiny("deepseek_v3")
    rows = parts(cfg)
    idle = number(rows, "routed experts") * (1 - cfg.experts.per_token / cfg.experts.count)
    used = number(rows, "used by a token, without MTP")
    assert used == number(rows, "total") - number(rows, "MTP") - idle


def test_the_cache_of_a_token_is_its_latents():
    cfg = Config.tiny("deepseek_v3")
    values = (cfg.attention.kv_rank + cfg.attention.rope_dim) * (cfg.layers + cfg.mtp_layers)
    assert dict(memory(cfg, jnp.float16))["cache of a token"] == human(2 * values)


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v2_lite", "deepseek_v3", "qwen3", "qwen3_moe"])
def test_every_family_is_described(family):
    rows = dict(architecture(Config.tiny(family)))
    assert ("experts" in rows) == (family != "qwen3")
    assert rows["layers"].startswith("3: ")


@pytest.mark.parametrize(("size", "text"), [(10, "10 B"), (2048, "2 KiB"), (1536 * 2**20, "1.5 GiB"), (2**41, "2 TiB")])
def test_bytes_are_shown_with_a_unit(size, text):
    assert human(size) == text
