"""What tells engines and their pages apart."""

from dataclasses import replace

import pytest

from jaxserve.identity import digest, identify
from jaxserve.layers.config import Config
from jaxserve.options import EngineConfig

CFG = Config.tiny("deepseek_v3")
GIVEN = {"cfg": CFG, "weights": "w", "dtype": "float32", "options": EngineConfig()}


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("config", {"cfg": replace(CFG, vocab_size=CFG.vocab_size + 1)}),
        ("mtp_layers", {"cfg": replace(CFG, mtp_layers=CFG.mtp_layers + 1)}),
        ("weights", {"weights": "v"}),
        ("dtype", {"dtype": "bfloat16"}),
        ("kv_cache_dtype", {"options": EngineConfig(kv_cache_dtype="int8")}),
        ("page_size", {"options": EngineConfig(page_size=8)}),
    ],
)
def test_each_difference_has_a_field_of_its_own_and_makes_other_pages(field, change):
    one, other = identify(**GIVEN), identify(**GIVEN | change)
    assert [name for name in one._fields if getattr(one, name) != getattr(other, name)] == [field]
    assert one.page_kind.key(b"tokens") != other.page_kind.key(b"tokens")


def test_a_config_is_the_same_whether_its_mtp_modules_are_there_or_not():
    assert digest(CFG) == digest(replace(CFG, mtp_layers=0)) != digest(Config.tiny("qwen3"))
