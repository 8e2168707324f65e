from collections.abc import Callable
from pathlib import Path

import jax
import optax
import pytest

from jaxserve.checkpoints.embedded import corpus, export, train
from tests.layers.helpers import raw_config

MODULES = [
    corpus.Module(name, f"def {name}(x):\n    return x + {i}\n" * 40) for i, name in enumerate("abcdefghijklmnop")
]
SGD = optax.sgd(0.1)  # compiles in a moment; one object, so that the runs share what is compiled


@pytest.fixture
def optax_promotes():
    """Optax relies on JAX's implicit promotion of dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def run_of(monkeypatch, optax_promotes) -> Callable[..., None]:
    """Trains a tiny model on a tiny library, with a checkpoint every two updates of 32 tokens."""
    small = raw_config("deepseek_v3", num_hidden_layers=1, first_k_dense_replace=0, vocab_size=corpus.VOCABULARY)
    for module in (train, export):
        monkeypatch.setattr(module, "CONFIG", small)
    monkeypatch.setattr(train, "optimizer", lambda *_: SGD)
    monkeypatch.setattr(corpus, "modules", lambda: MODULES)

    def run(out: Path, steps: int, start: int | None = None) -> None:
        train.train(out, steps=steps, decay=1, rate=1e-3, batch=2, length=16, every=2, start=start)

    return run
