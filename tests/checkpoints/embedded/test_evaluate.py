import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.checkpoints.embedded import evaluate
from jaxserve.layers.config import Config
from jaxserve.layers.transformer import model_params
from jaxserve.parallel.sharding import initialize
from tests.layers.helpers import published, raw_config
from tests.oracles import reference

TINY = Config.tiny("deepseek_v3")


@pytest.fixture
def scored(key, monkeypatch):
    """A module of 13 tokens, scored in windows of 8 of which 4 are fresh; and the model's weights as published."""
    monkeypatch.setattr(evaluate, "WINDOW", 8)
    monkeypatch.setattr(evaluate, "FRESH", 4)
    model = initialize(model_params(TINY), key)
    ids = np.asarray(jax.random.randint(key, (13,), 1, 97))
    cut = evaluate.windows(ids, begin=0)
    scores = [evaluate.score(model, jnp.asarray(w.tokens[None]), TINY) for w in cut]
    return ids, cut, scores, published(model)


def test_windows_count_every_token_once_with_enough_before_it():
    ids = np.arange(1, 3001)
    seen = []
    for window in evaluate.windows(ids, begin=0):
        first = np.flatnonzero(window.counted)[0]
        assert window.tokens[0] == 0 or first >= evaluate.WINDOW - evaluate.FRESH
        seen += window.tokens[1:][window.counted].tolist()
    assert seen == ids.tolist()


def test_bits_are_those_of_the_reference_given_the_same_windows(scored):
    _, cut, scores, weights = scored
    raw = raw_config("deepseek_v3")
    for window, got in zip(cut, scores, strict=True):
        expected = np.log2(reference.softmax(reference.logits(raw, weights, window.tokens[:-1])))
        of = np.flatnonzero(window.counted)
        np.testing.assert_allclose(got.log2_t[0][of], expected[of, window.tokens[1:][of]], rtol=1e-4)


def test_acceptance_compares_the_guess_with_the_model_s_choice_one_position_later(scored):
    _, cut, scores, weights = scored
    raw = raw_config("deepseek_v3")
    for window, got in zip(cut, scores, strict=True):
        own = reference.logits(raw, weights, window.tokens[:-1]).argmax(axis=1)
        guess = reference.mtp_logits(raw, weights, window.tokens).argmax(axis=1)
        pairs = np.flatnonzero((window.counted & window.drafted)[:-1])
        found = evaluate.tally(evaluate.Window(*(column[None] for column in window)), got)
        assert found.drafted == len(pairs)
        assert found.agreed == sum(guess[i] == own[i + 1] for i in pairs)


def test_a_last_batch_that_is_not_full_counts_nothing_twice():
    rows = evaluate.windows(np.arange(1, 10), begin=0)
    filled = evaluate._filled(rows)
    assert len(filled) == evaluate.ROWS
    assert sum(w.counted.sum() for w in filled) == 9


def test_the_total_is_the_sum_of_the_windows_and_is_told_as_it_grows(key, monkeypatch):
    monkeypatch.setattr(evaluate, "WINDOW", 8)
    monkeypatch.setattr(evaluate, "FRESH", 4)
    model = initialize(model_params(TINY), key)
    cut = evaluate.windows(np.asarray(jax.random.randint(key, (25,), 1, 97)), begin=0)
    alone = [evaluate.score(model, jnp.asarray(w.tokens[None]), TINY) for w in cut]
    parts = [evaluate.tally(evaluate.Window(*(c[None] for c in w)), s) for w, s in zip(cut, alone, strict=True)]
    calls: list[tuple[int, int]] = []
    sums = evaluate.total(cut, model, TINY, lambda *call: calls.append(call))
    assert sums[1:] == tuple(sum(column) for column in zip(*parts, strict=True))[1:]
    assert sums.bits == pytest.approx(sum(part.bits for part in parts), rel=1e-5)
    assert sums.tokens == 25
    assert calls == [(4, 6), (6, 6)]


def test_a_model_is_scored_with_the_cache_it_is_asked_for(key):
    model, tokens_st = initialize(model_params(TINY), key), jax.random.randint(key, (2, 17), 1, 97)
    score = jax.jit(evaluate.score, static_argnums=(2, 3))
    exact, rounded = (score(model, tokens_st, TINY, int8).log2_t for int8 in (False, True))
    assert 0 < np.abs(exact - rounded).max() < 0.1


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
def test_the_command_prints_json_alone_and_shows_its_progress_on_standard_error(monkeypatch, capsys, kv_cache_dtype):
    report = evaluate.Report(1, 2, 3, 4.0, 11.0, 5.0, 0.2, 0.6, 0.7)

    def measured(model, cfg, tokenizer, show, int8_cache):
        show(4, 4)
        assert int8_cache == (kv_cache_dtype == "int8")
        return report

    monkeypatch.setattr(evaluate, "evaluate", measured)
    evaluate.main(kv_cache_dtype=kv_cache_dtype)
    printed = capsys.readouterr()
    assert json.loads(printed.out) == report._asdict()
    assert "scoring windows" in printed.err and "100%" in printed.err
