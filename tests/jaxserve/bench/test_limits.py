import jax.numpy as jnp
import pytest

from jaxserve.bench import limits


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(limits, "READ", 1 << 20)
    monkeypatch.setattr(limits, "SHAPES", ((16, 32, 64), (32, 32, 64)))


def test_all_limits_are_found_and_progress_is_told():
    told = []
    found = limits.measure(turns=1, progress=lambda done, total: told.append((done, total)))
    assert found.bandwidth > 0 and set(found.peaks) == {"int8", "bfloat16", "float32"}
    assert all(peak > 0 for peak in found.peaks.values())
    assert told == [(done, told[0][1]) for done in range(told[0][1] + 1)]


def test_the_fastest_form_counts(monkeypatch):
    seconds = iter([4.0, 2.0, 8.0, 8.0])
    monkeypatch.setattr(limits, "fastest", lambda *_, **__: next(seconds))
    monkeypatch.setattr(limits, "LONG", 10.0)
    assert limits.peak(jnp.dtype(jnp.float32), turns=1) == 2 * 16 * 32 * 64 / 2.0


def test_larger_products_are_not_tried_where_one_takes_long(monkeypatch):
    seconds = iter([1.0, 1.0])
    monkeypatch.setattr(limits, "fastest", lambda *_, **__: next(seconds))
    assert limits.peak(jnp.dtype(jnp.int8), turns=1) == 2 * 16 * 32 * 64
