from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.layers.batch import Rows
from jaxserve.layers.config import Config
from jaxserve.layers.mtp import draft
from jaxserve.layers.transformer import Model, forward, logits
from tests.layers.helpers import (
    batch_of,
    chunks,
    empty_cache,
    normal,
    page_table,
    published,
    random_model,
    random_tokens,
    raw_config,
)
from tests.oracles import reference
from tests.tolerances import MODEL, assert_close

RAW = {
    "as published": raw_config("deepseek_v3"),
    "large eps": raw_config("deepseek_v3", rms_norm_eps=0.05),
    "dense": raw_config("deepseek_v3", n_routed_experts=None),
}
run_forward, run_draft = (jax.jit(f, static_argnames="cfg") for f in (forward, draft))
score = jax.jit(logits)


def drafted(model: Model, cfg: Config, tokens: np.ndarray, chunk: int = 24) -> tuple[np.ndarray, Any]:
    """Logits of the module for all positions but the last, in chunks; and its load of the last chunk."""
    table, cache, parts, load = page_table(1, 5, seed=2), empty_cache(cfg, 5, 5), [], None
    for batch, shifted in zip(*(chunks(part, table, chunk) for part in (tokens[:-1], tokens[1:])), strict=True):
        out = run_forward(model, batch, cache, cfg)
        guess = run_draft(model, model.mtp[0], out.hidden_td, shifted, out.cache[-1], cfg)
        cache, load = (*out.cache[:-1], guess.cache), guess.load_e
        parts.append(score(model, guess.hidden_td))
    return np.concatenate(parts)[: len(tokens) - 1], load


@pytest.mark.parametrize("name", RAW)
def test_drafts_equal_the_reference(rng, name):
    cfg = Config.from_hf(RAW[name])
    model, tokens = random_model(cfg, rng), random_tokens(cfg, rng, 20)
    actual, _ = drafted(model, cfg, tokens)
    assert_close(actual, reference.mtp_logits(RAW[name], published(model), tokens.tolist()), MODEL)


@pytest.mark.parametrize("chunk", [1, 8])
def test_step_by_step_gives_what_all_positions_at_once_give(rng, chunk):
    cfg = Config.tiny("deepseek_v3")
    model, tokens = random_model(cfg, rng), random_tokens(cfg, rng, 20)
    whole, _ = drafted(model, cfg, tokens)
    assert_close(drafted(model, cfg, tokens, chunk)[0], whole, MODEL)


def test_wanted_rows_are_those_of_all_and_the_cache_gains_every_entry(rng):
    cfg = Config.tiny("deepseek_v3")
    model, table = random_model(cfg, rng), page_table(2, 2, seed=4)
    batch, hidden = batch_of([[5, 6, 7], [8]], table), normal(rng, 6, cfg.width)
    every = run_draft(model, model.mtp[0], hidden, batch, empty_cache(cfg, 4, 4)[-1], cfg)
    rows = Rows(jnp.array([3, 6, 1]), jnp.array([1, 0, 0]))  # the second is none
    some = run_draft(model, model.mtp[0], hidden, batch, empty_cache(cfg, 4, 4)[-1], cfg, rows)
    assert_close(some.hidden_td[np.array([0, 2])], every.hidden_td[np.array([3, 1])], MODEL)
    assert_close(some.cache.c, every.cache.c, MODEL)
    assert (every.load_e.sum(), some.load_e.sum()) == (4 * cfg.experts.per_token, 2 * cfg.experts.per_token)


def test_padding_counts_for_no_expert_of_the_module(rng):
    cfg = Config.tiny("deepseek_v3")
    assert cfg.experts is not None
    _, load = drafted(random_model(cfg, rng), cfg, random_tokens(cfg, rng, 20))
    assert load.sum() == 19 * cfg.experts.per_token


def test_a_dense_module_reports_no_load(rng):
    cfg = Config.from_hf(RAW["dense"])
    assert drafted(random_model(cfg, rng), cfg, random_tokens(cfg, rng, 20))[1] is None


def test_the_draft_depends_on_the_next_token_and_on_the_hidden_state(rng):
    cfg = Config.tiny("deepseek_v3")
    model, batch = random_model(cfg, rng), batch_of([[5]], page_table(1, 1))
    hidden = jnp.asarray(rng.standard_normal((1, cfg.width)), jnp.float32)

    def guess(hidden, token: int):
        changed = batch._replace(tokens_t=jnp.array([token], jnp.int32))
        return np.asarray(run_draft(model, model.mtp[0], hidden, changed, empty_cache(cfg, 1, 4)[-1], cfg).hidden_td)

    assert np.abs(guess(hidden, 5) - guess(hidden, 6)).max() > 1e-2
    assert np.abs(guess(hidden, 5) - guess(-hidden, 5)).max() > 1e-2
