import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer

from jaxserve.checkpoints import hf
from jaxserve.checkpoints.embedded import corpus, evaluate, export, train
from jaxserve.checkpoints.hub import EMBEDDED
from jaxserve.layers.config import Config
from jaxserve.parallel.errors import CheckpointError


@pytest.fixture
def run(run_of, tmp_path, monkeypatch):
    """A run with checkpoints after 2 and 4 updates, to be evaluated in small windows."""
    monkeypatch.setattr(evaluate, "WINDOW", 16)
    monkeypatch.setattr(evaluate, "FRESH", 8)
    run_of(tmp_path / "run", 4)
    return tmp_path / "run"


def assert_same(actual, expected) -> None:
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_an_exported_model_is_the_checkpoint_in_bfloat16_with_all_that_serving_needs(run, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(export, "plot", lambda points, path: drawn.append((points, path)))
    export.export(run, tmp_path / "model", tmp_path / "loss.png", step=2)
    cfg, model = hf.load(tmp_path / "model", jnp.bfloat16)
    step, trained = export.trained_weights(run, 2)
    assert step == 2 and cfg == Config.from_hf(train.CONFIG)
    assert_same(model, jax.tree.map(lambda weight, kept: weight.astype(kept.dtype), trained, model))
    assert json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())["bos_token"] == corpus.BEGIN
    assert (tmp_path / "model" / "tokenizer.json").read_bytes() == (run / "tokenizer.json").read_bytes()
    assert [[point["step"] for point in points] for points, _ in drawn] == [[2]]


def test_the_card_has_the_numbers_of_what_was_written(run, tmp_path, capsys):
    export.export(run, tmp_path / "model", tmp_path / "loss.png", step=None)
    cfg, model = hf.load(tmp_path / "model")
    measured = evaluate.evaluate(model, cfg, Tokenizer.from_file(str(run / "tokenizer.json")))
    assert json.loads(capsys.readouterr().out) == measured._asdict()
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"| bits per byte | {measured.bits_per_byte:.3f} |" in card
    assert f"| training | 4 updates, 0.0 million tokens, {jax.default_backend()} (" in card
    assert f"| parameters | {sum(leaf.size for leaf in jax.tree.leaves(model)):,}, BF16 |" in card
    assert "{" not in card
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_newest_checkpoint_is_exported_unless_one_is_named(run):
    step, newest = export.trained_weights(run, None)
    assert step == 4
    assert_same(newest, export.trained_weights(run, 4)[1])
    assert not np.array_equal(newest.embed, export.trained_weights(run, 2)[1].embed)


@pytest.mark.parametrize("missing", [0, 3])
def test_a_checkpoint_that_is_not_there_is_refused(run, missing):
    with pytest.raises(CheckpointError, match=f"no checkpoint {missing}; name one that is there: 2, 4"):
        export.trained_weights(run, missing)


def test_a_folder_without_checkpoints_is_refused_and_left_as_it_is(tmp_path):
    with pytest.raises(CheckpointError, match="has no checkpoints; train first"):
        export.trained_weights(tmp_path / "nothing", None)
    assert not (tmp_path / "nothing").exists()


def test_the_shipped_card_is_the_template_filled_in(tmp_path):
    """Whoever changes the template's words exports again."""
    shipped = (EMBEDDED / "README.md").read_text().splitlines()
    template = (EMBEDDED.parent / "card.md").read_text().splitlines()
    assert len(shipped) == len(template)
    assert all(line == text for line, text in zip(shipped, template, strict=True) if "{" not in text)
