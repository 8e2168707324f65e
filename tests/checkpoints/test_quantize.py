import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.checkpoints import quantize
from jaxserve.checkpoints.matrices import BLOCKS, matrices, output
from jaxserve.checkpoints.quantize import LayerReport, Parts, quantize_layer, quantize_matrix
from jaxserve.layers.transformer import Layer
from jaxserve.parallel.qarray import QArray, dequantize
from tests.checkpoints.calibration import Passed, passed, planted, through
from tests.layers.helpers import f64, normal

NONE = Parts(*(False,) * len(Parts._fields))


def alone(part: str) -> Parts:
    return NONE._replace(**{part: True})


def lost(p: Passed, layer: Layer, block: str) -> float:
    """Of a block's output, in float64."""
    exact, found = f64(p.found.outputs[block]), f64(output(layer, block, p.found, p.cfg))
    return float(((found - exact) ** 2).sum() / (exact**2).sum())


def floats(layer: Layer) -> Layer:
    """The layer with the values of its codes."""
    is_codes = lambda w: isinstance(w, QArray)  # noqa: E731
    return jax.tree.map(lambda w: dequantize(w, jnp.float32) if is_codes(w) else w, layer, is_leaf=is_codes)


def last(report: LayerReport, block: str) -> float:
    return report.steps[block][-1].lost


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3"])
def test_without_parts_weights_are_rounded_plainly(family):
    p = passed(family)
    layer, report = quantize_layer(p.layer, p.found, p.cfg, NONE)
    for block in BLOCKS:
        assert [step.part for step in report.steps[block]] == ["rounding"]
        values = matrices(floats(layer), block)
        for name, w in matrices(p.layer, block).items():
            scale = np.abs(w).max(axis=2, keepdims=True) / 127
            assert (np.abs(values[name] - w) <= 0.501 * scale).all()
    assert report.kept == ()


@pytest.mark.parametrize("part", Parts._fields)
@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3"])
def test_no_part_loses_more_than_plain_rounding_does(family, part):
    p = passed(family)
    layer, report = quantize_layer(p.layer, p.found, p.cfg, alone(part))
    for block in BLOCKS:
        before, after = report.steps[block]
        assert (before.part, after.part) == ("rounding", part)
        assert after.lost <= before.lost
        assert np.isclose(after.lost, lost(p, layer, block), rtol=1e-3)


@pytest.mark.parametrize("part", ["outliers", "scales", "mixed"])
def test_what_outliers_take_is_won_back(part):
    p = planted(passed("deepseek_v3"))
    _, plain = quantize_layer(p.layer, p.found, p.cfg, NONE)
    layer, report = quantize_layer(p.layer, p.found, p.cfg, alone(part))
    for block in BLOCKS:
        assert last(report, block) < 0.1 * last(plain, block)
        assert np.isclose(last(report, block), lost(p, layer, block), rtol=1e-3)


@pytest.mark.parametrize("part", ["clipping", "compensation"])
def test_finer_rounding_loses_less(part):
    p = passed("deepseek_v3")
    _, report = quantize_layer(p.layer, p.found, p.cfg, alone(part))
    assert all(last(report, block) < 0.99 * report.steps[block][0].lost for block in BLOCKS)


def test_all_parts_together_never_lose_more_from_one_to_the_next():
    p = planted(passed("qwen3_moe"))
    layer, report = quantize_layer(p.layer, p.found, p.cfg, Parts())
    for block in BLOCKS:
        steps = [step.lost for step in report.steps[block]]
        assert [step.part for step in report.steps[block]] == ["rounding", *Parts._fields]
        assert steps == sorted(steps, reverse=True)
        assert np.isclose(steps[-1], lost(p, layer, block), rtol=1e-3)


def test_matrices_that_lose_too_much_stay_in_float_and_are_named():
    p = planted(passed("deepseek_v3"))
    layer, report = quantize_layer(p.layer, p.found, p.cfg, alone("mixed"))
    assert {"attn.w_dkv", "attn.w_kr", "ffn.experts.w_up"} <= set(report.kept)
    assert "attn.w_o" not in report.kept
    assert layer.attn.w_dkv is not None and not isinstance(layer.attn.w_dkv, QArray)
    assert isinstance(layer.attn.w_o, QArray)


def test_matrices_that_files_have_as_one_tensor_or_engines_multiply_as_one_stay_together(monkeypatch):
    p = passed("deepseek_v3")
    errors = {"attn.w_dkv": 1.0, "attn.w_kr": 0.0}

    def planned(w, x, codes):
        name = next(each for each, found in matrices(p.layer, "attn").items() if np.array_equal(found, w))
        return jnp.full(1, errors.get(name, 0.0))

    monkeypatch.setattr(quantize, "product_error", planned)
    monkeypatch.setattr(quantize.Study, "lost", lambda *_: 0.0)
    study = quantize.Study("attn", p.found, p.cfg)
    (kept,) = quantize.keep(study.made(p.layer), study)
    assert set(matrices(p.layer, "attn")) - set(kept.codes) == {"attn.w_dq", "attn.w_dkv", "attn.w_kr"}


def test_experts_that_too_few_tokens_chose_are_named():
    p = passed("deepseek_v3")
    bias = p.layer.ffn.bias.at[2].set(-100.0)
    p = through(p.cfg, p.layer._replace(ffn=p.layer.ffn._replace(bias=bias)), p.found.states_td)
    layer, report = quantize_layer(p.layer, p.found, p.cfg, Parts())
    assert 2 in report.starved
    assert all(np.isfinite(w).all() for w in jax.tree.leaves(layer))
    assert last(report, "ffn") < 1e-2


def test_a_bias_takes_the_place_of_what_is_lost_on_average():
    p = passed("qwen3")
    layer, _ = quantize_layer(p.layer, p.found, p.cfg, alone("compensation"))
    for block in BLOCKS:
        assert getattr(layer, f"{block}_bias") is not None
        left = f64(p.found.outputs[block]) - f64(output(layer, block, p.found, p.cfg))
        assert np.abs(left.mean(0)).max() < 1e-4 * np.abs(left).max()


def test_a_matrix_alone_is_rounded_with_the_parts_that_apply():
    rng = np.random.default_rng(0)
    w, x = normal(rng, 8, 16), normal(rng, 64, 16)
    codes, steps = quantize_matrix(w, x, Parts())
    assert (codes.codes.shape, codes.scale.shape) == ((8, 16), (8, 1))
    assert [step.part for step in steps] == ["rounding", "clipping", "compensation", "mixed"]
    assert [step.lost for step in steps] == sorted((step.lost for step in steps), reverse=True)
    assert [step.part for step in quantize_matrix(w, x, NONE)[1]] == ["rounding"]


def test_a_matrix_alone_that_loses_too_much_stays_in_float():
    rng = np.random.default_rng(0)
    w, x = normal(rng, 8, 16), normal(rng, 64, 16).at[:, 0].multiply(1000.0)
    w = w.at[:, 0].set(w[:, 0] / 1000)
    kept, steps = quantize_matrix(w, x, Parts())
    assert kept is w and steps[-2].lost > quantize.TOO_LOSSY and steps[-1] == ("mixed", 0.0)
    assert isinstance(quantize_matrix(w, x, Parts(mixed=False))[0], QArray)
