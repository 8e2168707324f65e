from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer

from jaxserve.checkpoints.calibrate import Walk, calibrate, calibrate_model, calibration_text
from jaxserve.checkpoints.embedded import corpus
from jaxserve.checkpoints.hub import EMBEDDED
from jaxserve.checkpoints.quantize import Parts
from jaxserve.layers.config import Config
from jaxserve.layers.int8 import in_int8
from jaxserve.layers.mtp import draft
from jaxserve.layers.transformer import forward, logits, model_params
from jaxserve.parallel.errors import ConfigError, RequestError
from tests.layers.helpers import batch_of, empty_cache, page_table, random_model, random_tokens

NONE = Parts(*(False,) * len(Parts._fields))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(EMBEDDED / "tokenizer.json"))


@pytest.fixture(scope="module")
def encode(tokenizer):
    return lambda text: tokenizer.encode(text).ids


def tiny(family: str):
    cfg = Config.tiny(family, num_hidden_layers=2)
    rng = np.random.default_rng(0)
    return cfg, random_model(cfg, rng), random_tokens(cfg, rng, 4 * 17).reshape(4, 17)


def test_the_text_is_of_modules_that_are_not_held_out(tokenizer, encode):
    tokens = calibration_text(encode, 3, 20)
    assert tokens.shape == (3, 21)
    words = tokenizer.decode(tokens.reshape(-1).tolist())
    training, held_out = corpus.split(corpus.modules())
    assert any(words[:40] in module.text for module in training)
    assert not any(words[:40] in module.text for module in held_out)
    assert np.array_equal(calibration_text(encode, 3, 20), tokens)


def test_other_documents_can_be_given_and_all_give_pieces(tokenizer, encode):
    texts = ["one two three four five six seven eight", "nine ten eleven twelve thirteen fourteen fifteen"]
    pieces = [tokenizer.decode(piece.tolist()).strip() for piece in calibration_text(encode, 2, 4, texts)]
    assert {next(i for i, text in enumerate(texts) if piece in f"{text} {text}") for piece in pieces} == {0, 1}
    with pytest.raises(RequestError, match="the text has 2 tokens, 5 are needed"):
        calibration_text(encode, 1, 4, ["if x"])


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3"])
def test_a_whole_model_becomes_what_int8_models_are(family):
    cfg, model, tokens = tiny(family)
    found, reports = calibrate_model(model, cfg, tokens, NONE)
    wanted = in_int8(model_params(cfg))
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    assert [w.dtype for w in jax.tree.leaves(found)] == [p.dtype for p in jax.tree.leaves(wanted)]
    assert [list(report.steps) for report in reports] == [["attn", "ffn"]] * 2 + [
        ["join", "attn", "ffn"]
    ] * cfg.mtp_layers


def test_work_goes_on_where_it_stopped():
    cfg, model, tokens = tiny("deepseek_v3")
    whole = list(calibrate(lambda part: part(model), cfg, tokens, NONE))
    later = list(calibrate(lambda part: part(model), cfg, tokens, NONE, Walk(1, whole[0].states_td)))
    assert [each.number for each in later] == [1, 2]
    for old, new in zip(whole[1:], later, strict=True):
        assert old.report == new.report
        assert all(np.array_equal(*pair) for pair in zip(*map(jax.tree.leaves, (old.part, new.part)), strict=True))


def test_no_more_than_a_layer_is_read_at_a_time():
    cfg, model, tokens = tiny("deepseek_v3")
    asked = []

    def read(part):
        asked.append(part(model))
        return asked[-1]

    first = next(calibrate(read, cfg, tokens, NONE))
    assert first.number == 0
    assert [part is model.embed or part is model.layers[0] for part in asked] == [True, True]


def test_the_text_passes_through_the_float_model():
    cfg, model, tokens = tiny("deepseek_v3")
    *_, last = (each for each in calibrate(lambda part: part(model), cfg, tokens, NONE) if each.number < cfg.layers)
    batch = batch_of(list(tokens[:, :-1]), page_table(4, 1))
    exact = forward(model, batch, empty_cache(cfg, 4, 16), cfg)
    gain = model.norm[None]
    normed = last.states_td / np.sqrt(np.square(last.states_td).mean(1, keepdims=True) + cfg.norm_eps) * gain
    assert np.allclose(logits(model, normed), logits(model, exact.hidden_td), atol=1e-4)


def test_an_mtp_module_gets_what_it_drafts_from():
    cfg, model, tokens = tiny("deepseek_v3")
    *_, module = calibrate(lambda part: part(model), cfg, tokens, NONE)
    batch = batch_of(list(tokens[:, :-1]), page_table(4, 1))
    out = forward(model, batch, empty_cache(cfg, 4, 16), cfg)
    following = batch._replace(tokens_t=jnp.asarray(tokens[:, 1:].reshape(-1)))
    drafted = draft(model, model.mtp[0], out.hidden_td, following, empty_cache(cfg, 4, 16)[-1], cfg)
    normed = module.states_td / np.sqrt(np.square(module.states_td).mean(1, keepdims=True) + cfg.norm_eps)
    assert np.allclose(normed * model.mtp[0].norm[None], drafted.hidden_td, atol=1e-4)


def test_several_mtp_modules_are_refused():
    cfg, model, tokens = tiny("deepseek_v3")
    with pytest.raises(ConfigError, match="the model has 2 MTP modules"):
        next(calibrate(lambda part: part(model), replace(cfg, mtp_layers=2), tokens, NONE))
