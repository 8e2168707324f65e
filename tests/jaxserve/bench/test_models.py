import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.bench import models
from jaxserve.checkpoints import hf
from jaxserve.checkpoints.hub import EMBEDDED
from jaxserve.describe import count
from jaxserve.layers.config import TINY, Config
from jaxserve.layers.transformer import model_params
from jaxserve.parallel.errors import CheckpointError, RequestError
from jaxserve.parallel.qarray import QArray, dequantize
from jaxserve.tokenizer import Tokenizer


@pytest.fixture
def small(monkeypatch):
    """A standard model that is tiny but for its vocabulary."""
    raw = TINY["deepseek_v2_lite"] | {"vocab_size": 4200}
    monkeypatch.setitem(models.MODELS, "small", raw)
    return Config.from_hf(raw)


@pytest.mark.parametrize(("name", "billions"), [("bench-1b", 1.27), ("bench-dense", 0.5), ("bench-v2-lite", 15.7)])
def test_standard_models_have_their_size(name, billions):
    cfg = Config.from_hf(models.MODELS[name])
    assert count(model_params(cfg)) / 1e9 == pytest.approx(billions, rel=0.02)


def test_forms_have_the_same_weights_but_for_rounding(small):
    eight, floats = (models.load("small", form).model for form in ("int8", "float32"))
    is_codes = lambda leaf: isinstance(leaf, QArray)  # noqa: E731
    wide = jax.tree.map(lambda w: dequantize(w, jnp.float32) if is_codes(w) else w, eight, is_leaf=is_codes)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), wide, floats)
    assert isinstance(eight.head, QArray) and isinstance(eight.layers[1].ffn.experts.w_gate, QArray)


def test_random_weights_are_spread_as_their_params_say(small):
    params = model_params(small)
    drawn = models.draw(params)
    assert float(drawn.embed.std()) == pytest.approx(params.embed.std, rel=0.01)
    assert (np.asarray(drawn.norm) == 1).all()
    codes = models.load("small", "int8").model.head.codes
    assert (codes.min(), codes.max()) == (-127, 127)


@pytest.mark.parametrize("form", ["int8", "bfloat16"])
def test_a_written_model_is_the_one_that_is_measured(form, small, tmp_path):
    models.save(tmp_path / "model", "small", form)
    cfg, read = hf.load(tmp_path / "model", jnp.bfloat16)
    assert cfg == small
    drawn = models.draw(models.describe(small, form, jnp.dtype(jnp.bfloat16)))
    jax.tree.map(np.testing.assert_array_equal, read, drawn)
    tokenizer = Tokenizer.from_folder(tmp_path / "model")
    assert tokenizer.vocab_size == 4200
    assert tokenizer.encode("def f(x):") == Tokenizer.from_folder(EMBEDDED).encode("def f(x):")
    loaded = models.load(str(tmp_path / "model"), "int8")
    assert loaded.about()["bytes"] == sum(leaf.nbytes for leaf in jax.tree.leaves(loaded.model))


def test_what_can_not_be_is_refused(small, tmp_path):
    with pytest.raises(RequestError, match="'huge' is no standard model; there are bench-1b"):
        models.save(tmp_path, "huge", "int8")
    models.save(tmp_path / "model", "small", "int8")
    with pytest.raises(CheckpointError, match="not empty"):
        models.save(tmp_path / "model", "small", "int8")
    with pytest.raises(RequestError, match="--form bfloat16: .* is INT8 in its files; leave --form out"):
        models.load(str(tmp_path / "model"), "bfloat16")
