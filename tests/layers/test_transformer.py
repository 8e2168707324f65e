import functools
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.checkpoints import hf
from jaxserve.layers import batch as paging
from jaxserve.layers.config import Config
from jaxserve.layers.transformer import Model, cache_params, forward, model_params
from tests.layers.helpers import (
    FAMILIES,
    GOLDEN_NAMES,
    GOLDENS,
    batch_of,
    chunks,
    empty,
    empty_cache,
    page_table,
    published,
    random_model,
    random_tokens,
    raw_config,
    step,
)
from tests.oracles import reference
from tests.tolerances import MODEL, OP, assert_close

PAGE = 7
TILE = 56  # longer than every prompt, so that there is padding; and than what makes the expanded form pay


class Golden(NamedTuple):
    """A checkpoint, and what Hugging Face transformers computes with it."""

    cfg: Config
    model: Model
    prompts: list[np.ndarray]
    logits: list[np.ndarray]
    greedy: np.ndarray


@functools.cache
def golden(name: str) -> Golden:
    cfg, model = hf.load(GOLDENS / name)
    file = np.load(GOLDENS / name / "golden.npz")
    prompts, logits, greedy = ([file[f"{kind}_{i}"] for i in range(3)] for kind in ("prompt", "logits", "greedy"))
    return Golden(cfg, model, prompts, logits, np.stack(greedy))


@functools.cache
def prefilled(name: str) -> tuple[np.ndarray, Any, np.ndarray]:
    """Logits `[a, w, u]` of the three prompts in one step, their cache, and their shuffled pages."""
    it, table = golden(name), page_table(3, 8, seed=6)
    out, cache = step(it.model, batch_of(it.prompts, table, tile=TILE), empty_cache(it.cfg, 24, PAGE), it.cfg)
    return np.asarray(out), cache, table


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_logits_at_every_position_equal_hugging_face(name):
    out = prefilled(name)[0]
    assert np.isfinite(out).all()
    for row, expected in zip(out, golden(name).logits, strict=True):
        assert_close(row[: len(expected)], expected, MODEL)


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_greedy_tokens_decoded_step_by_step_equal_hugging_face(name):
    it, (out, cache, table) = golden(name), prefilled(name)
    lengths = [len(prompt) for prompt in it.prompts]
    tokens = [[int(out[i, n - 1].argmax())] for i, n in enumerate(lengths)]
    for count in range(19):
        starts = [n + count for n in lengths]
        out, cache = step(it.model, batch_of([row[-1:] for row in tokens], table, starts), cache, it.cfg)
        for row, best in zip(tokens, np.asarray(out)[:, 0].argmax(axis=-1), strict=True):
            row.append(int(best))
    np.testing.assert_array_equal(tokens, it.greedy)


def run(model: Model, cfg: Config, tokens: np.ndarray, table: np.ndarray, page: int, chunk: int) -> np.ndarray:
    """Logits of one sequence that is prefilled in chunks."""
    cache, parts = empty_cache(cfg, table.size, page), []
    for batch in chunks(tokens, table, chunk):
        out, cache = step(model, batch, cache, cfg)
        parts.append(np.asarray(out)[0])
    return np.concatenate(parts)[: len(tokens)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_random_model_equals_the_reference(rng, family):
    cfg = Config.tiny(family)
    model, tokens = random_model(cfg, rng), random_tokens(cfg, rng, 24)
    expected = reference.logits(raw_config(family), published(model), tokens.tolist())
    assert_close(run(model, cfg, tokens, page_table(1, 1), page=24, chunk=24), expected, MODEL)


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe"])
def test_shuffled_pages_and_chunks_give_what_contiguous_memory_gives(rng, family):
    cfg = Config.tiny(family)
    model, tokens = random_model(cfg, rng), random_tokens(cfg, rng, 24)
    expected = run(model, cfg, tokens, page_table(1, 1), page=24, chunk=24)
    assert_close(run(model, cfg, tokens, page_table(1, 8, seed=1), page=3, chunk=24), expected, MODEL)
    assert_close(run(model, cfg, tokens, page_table(1, 5, seed=1), page=5, chunk=10), expected, MODEL)


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "qwen3_moe"])
def test_a_batch_gives_each_sequence_what_it_gets_alone(rng, family):
    cfg = Config.tiny(family)
    model, runs = random_model(cfg, rng), [random_tokens(cfg, rng, n) for n in (24, 1, 10)]
    out, _ = step(model, batch_of(runs, page_table(3, 6, seed=2)), empty_cache(cfg, 18, 4), cfg)
    assert jnp.isfinite(out).all()
    for row, tokens in zip(np.asarray(out), runs, strict=True):
        padded = np.resize(tokens, 24)  # what follows a token has no effect on it
        expected = run(model, cfg, padded, page_table(1, 1), page=24, chunk=24)
        assert_close(row[: len(tokens)], expected[: len(tokens)], MODEL)


def test_a_context_of_many_blocks_gives_what_a_short_block_gives(rng, monkeypatch):
    cfg = Config.tiny("deepseek_v3", rope_theta=500.0)  # not traced elsewhere: the size of a block is not an argument
    model, tokens = random_model(cfg, rng), random_tokens(cfg, rng, 24)
    monkeypatch.setattr(paging, "BLOCK_TOKENS", 4)
    actual = run(model, cfg, tokens, page_table(1, 12, seed=3), page=2, chunk=12)
    expected = reference.logits(raw_config("deepseek_v3", rope_theta=500.0), published(model), tokens.tolist())
    assert_close(actual, expected, MODEL)


def test_a_step_reports_the_load_of_every_expert_without_padding(rng):
    cfg = Config.tiny("deepseek_v3")
    assert cfg.experts is not None
    batch = batch_of([random_tokens(cfg, rng, 5), random_tokens(cfg, rng, 2)], page_table(2, 2), tile=8)
    out = jax.jit(forward, static_argnames="cfg")(random_model(cfg, rng), batch, empty_cache(cfg, 4, 4), cfg)
    assert out.load_le.shape == (2, cfg.experts.count)
    np.testing.assert_array_equal(out.load_le.sum(axis=1), 7 * cfg.experts.per_token)


def test_the_cache_of_the_mtp_module_passes_unchanged(rng):
    cfg = Config.tiny("deepseek_v3")
    before = jax.tree.map(lambda page: page + 2.0, empty_cache(cfg, 4, 4))
    _, after = step(random_model(cfg, rng), batch_of([random_tokens(cfg, rng, 5)], page_table(1, 4)), before, cfg)
    assert len(after) == cfg.layers + 1
    for page in jax.tree.leaves(after[-1]):
        np.testing.assert_array_equal(page, 2.0)
    assert all((page != 2.0).any() for page in jax.tree.leaves(after[:-1]))


def test_a_model_of_bfloat16_computes_in_bfloat16_and_scores_in_float32(rng):
    cfg = Config.tiny("deepseek_v3", rope_theta=700.0)
    model, tokens = random_model(cfg, rng, jnp.bfloat16), random_tokens(cfg, rng, 24)
    batch = batch_of([tokens], page_table(1, 1))
    hidden = jax.eval_shape(functools.partial(forward, cfg=cfg), model, batch, empty_cache(cfg, 1, 24)).hidden_td
    assert hidden.dtype == jnp.bfloat16
    assert step(model, batch, empty_cache(cfg, 1, 24), cfg)[0].dtype == jnp.float32


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3"])
def test_a_batch_of_bfloat16_decodes_what_each_of_its_rows_decodes_alone(rng, family):
    """A row of 16 bits alone is computed as two. With these lengths no two tokens nearly tie."""
    cfg = Config.tiny(family)
    model, table, lengths = random_model(cfg, rng, jnp.bfloat16), page_table(4, 4, seed=2), [9, 1, 14, 3]
    runs, last = [random_tokens(cfg, rng, n) for n in lengths], random_tokens(cfg, rng, 4)
    _, cache = step(model, batch_of(runs, table), empty(cache_params(cfg, 16, 4, jnp.bfloat16)), cfg)
    out = np.asarray(step(model, batch_of(last[:, None], table, lengths), cache, cfg)[0])
    for i, length in enumerate(lengths):
        alone = np.asarray(step(model, batch_of([last[i : i + 1]], table[i : i + 1], [length]), cache, cfg)[0])[0]
        assert_close(alone, out[i], OP, jnp.bfloat16)
        assert alone.argmax() == out[i].argmax()


def test_tied_embeddings_have_no_head():
    assert model_params(Config.tiny("qwen3", tie_word_embeddings=True)).head is None
    assert model_params(Config.tiny("qwen3")).head is not None


def test_every_golden_folder_is_compared():
    assert json.loads((GOLDENS / "deepseek_v3" / "config.json").read_text())["model_type"] == "deepseek_v3"
    assert len(GOLDEN_NAMES) == 9
