import jax
import numpy as np
import pytest


@pytest.fixture
def rng(key: jax.Array) -> np.random.Generator:
    """Numbers that depend on the test's name only, from NumPy: `jax.random` would compile a program for every shape."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key)))
