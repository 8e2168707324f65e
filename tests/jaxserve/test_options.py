import json
import re
import shutil
from dataclasses import fields

import jax
import pytest

from jaxserve import LLM, RequestError
from jaxserve import options as sizes
from jaxserve.checkpoints import hf
from jaxserve.checkpoints.hub import EMBEDDED
from jaxserve.layers.config import Config
from jaxserve.options import EngineConfig
from tests.jaxserve.conftest import GOLDENS, word_tokenizer

WHOLE = ["1", 1.0, True, -1]
WRONG = {
    "max_num_seqs": [*WHOLE, 0, None],
    "max_model_len": [*WHOLE, 1],
    "max_num_batched_tokens": [*WHOLE, 15, None],
    "max_num_queued": WHOLE,
    "enable_prefix_caching": [1, "yes", None],
    "page_size": [*WHOLE, 0, None],
    "num_pages": [*WHOLE, 0],
    "cache_bytes": [*WHOLE, 0, None],
    "kv_cache_dtype": ["int4", "INT8", None, 8],
    "num_speculative_tokens": [*WHOLE, 9],
    "speculation_entropy": ["1", True, -0.5, float("nan"), None],
    "speculation_max_seqs": [*WHOLE, None],
    "num_redundant_experts": [*WHOLE, None],
    "num_shared_expert_ranks": [*WHOLE, None],
    "expert_exchange": ["fast", None, 1],
    "num_microbatches": [*WHOLE, 0, 3, None],
    "warmup": [0, "no", None],
    "seed": [*WHOLE, None],
}


@pytest.fixture
def unloaded(monkeypatch):
    """Weights must not be read."""

    def fail(*_, **__):
        raise AssertionError("weights are loaded")

    monkeypatch.setattr(hf, "open_checkpoint", fail)


def plain_folder(tmp_path):
    """A checkpoint without an MTP module, and without weights."""
    shutil.copy(GOLDENS / "qwen3" / "config.json", tmp_path)
    (tmp_path / "tokenizer.json").write_text(word_tokenizer(97).to_json())
    return tmp_path


def test_every_option_has_values_that_are_wrong():
    assert set(WRONG) == {field.name for field in fields(EngineConfig)}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_wrong_value_is_refused_by_name_before_weights_are_loaded(unloaded, name, value):
    with pytest.raises(RequestError, match=re.escape(f"{name} = {value!r}") + ": it must be ") as caught:
        LLM(**{name: value})
    assert caught.value.__cause__ is None


def test_the_least_values_are_accepted():
    EngineConfig(
        max_num_seqs=1, max_model_len=2, max_num_batched_tokens=16, max_num_queued=0, page_size=1, num_pages=1,
        cache_bytes=1, num_speculative_tokens=0, speculation_entropy=0, speculation_max_seqs=0, seed=0,
    )  # fmt: skip
    EngineConfig(num_speculative_tokens=8, speculation_entropy=float("inf"))


def test_an_unknown_option_is_named(unloaded):
    with pytest.raises(TypeError, match="LLM has no option 'max_seqs'; did you mean max_num_seqs?"):
        LLM(max_seqs=4)
    with pytest.raises(TypeError, match="LLM has no option 'zzz'; there are max_num_seqs, .*, seed"):
        LLM(zzz=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_redundant_experts": 2}, "num_redundant_experts = 2: it is for a mesh; give mesh too"),
        ({"num_shared_expert_ranks": 1}, "num_shared_expert_ranks = 1: it is for a mesh; give mesh too"),
        ({"expert_exchange": "hierarchical"}, "expert_exchange = 'hierarchical': it is for a mesh; give mesh too"),
        ({"num_microbatches": 2}, "num_microbatches = 2: it is for a mesh; give mesh too"),
        ({"max_model_len": 4097}, "max_model_len = 4097: it must be from 2 to 4096, the model's positions"),
        ({"num_pages": 3, "max_model_len": 200}, "num_pages = 3: it must be at least 4, to hold one answer of max_mod"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_weights_are_loaded(unloaded, options, message):
    with pytest.raises(RequestError, match=message):
        LLM(**options)


def test_guesses_without_an_mtp_module_are_refused_before_weights_are_loaded(unloaded, tmp_path):
    with pytest.raises(RequestError, match="num_speculative_tokens = 1: the model has no MTP module; it must be 0"):
        LLM(plain_folder(tmp_path), num_speculative_tokens=1)


@pytest.mark.parametrize(
    ("folder", "backend", "count"),
    [(GOLDENS / "qwen3", "gpu", 0), (EMBEDDED, "gpu", 1), (EMBEDDED, "tpu", 1), (EMBEDDED, "cpu", 0)],
)
def test_a_guess_is_made_by_default_where_the_model_can_and_it_pays(monkeypatch, folder, backend, count):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    cfg = Config.from_hf(hf.read_json(folder))
    assert sizes.drafts(cfg, EngineConfig()) == count
    assert sizes.drafts(cfg, EngineConfig(num_speculative_tokens=0)) == 0


def test_an_answer_is_by_default_at_most_as_long_as_the_model_s_positions_and_8192():
    raw = hf.read_json(EMBEDDED)
    assert sizes.model_len(Config.from_hf(raw), EngineConfig()) == 4096
    assert sizes.model_len(Config.from_hf(raw | {"max_position_embeddings": 163_840}), EngineConfig()) == 8192


def test_pages_are_by_default_those_of_all_answers_as_far_as_cache_bytes_hold_them():
    cfg = Config.from_hf(json.loads((EMBEDDED / "config.json").read_text()))
    page_bytes = (64 + 16) * 4 * 64 * 7  # latent and rope key, float32, tokens, layers and the MTP module

    def count(**options):
        return sizes.num_pages(cfg, EngineConfig(max_model_len=1000, max_num_seqs=3, **options), "float32")

    assert count() == 3 * 16
    assert count(cache_bytes=20 * page_bytes) == 20
    assert count(cache_bytes=21 * page_bytes - 1) == 20
    assert count(cache_bytes=1) == 16  # one answer always fits
    assert count(num_pages=17, cache_bytes=1) == 17
