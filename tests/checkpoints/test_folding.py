import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.checkpoints.folding import Range, hadamard, pairs, rescale, rotate, scales, search_scales, smooth
from jaxserve.checkpoints.matrices import BLOCKS, inputs, matrices, output, sample
from jaxserve.checkpoints.rounding import product_error
from jaxserve.layers.batch import whole
from jaxserve.layers.config import Config
from jaxserve.layers.transformer import Layer, forward, logits
from tests.checkpoints.calibration import ROWS, Passed, passed, planted
from tests.layers.helpers import FAMILIES, empty_cache, random_model
from tests.tolerances import LAYER, OP, assert_close


def assert_same_function(p: Passed, changed: Layer) -> None:
    for block in BLOCKS:
        assert_close(output(changed, block, p.found, p.cfg), p.found.outputs[block], LAYER)


def differ(before: Layer, after: Layer) -> bool:
    return any(not np.array_equal(old, new) for old, new in zip(*map(jax.tree.leaves, (before, after)), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_rescaling_leaves_the_function_and_divides_the_inputs(family):
    p = passed(family)
    for block in BLOCKS:
        for pair in pairs(p.layer, block):
            before = inputs(p.layer, block, p.found, p.cfg, ROWS)[pair.readers[0]]
            groups = 1 if pair.is_gain else before.shape[0]
            scale_ed = jnp.exp2(jnp.arange(groups * before.shape[2], dtype=jnp.float32) % 7 - 3).reshape(groups, -1)
            if pair.source == "attn.w_v":  # heads that share a value share its scales
                width = p.layer.attn.w_v.shape[1]
                scale_ed = jnp.tile(scale_ed[:, :width], (1, scale_ed.shape[1] // width))
            changed = rescale(p.layer, pair, scale_ed)
            assert differ(p.layer, changed)
            assert_same_function(p, changed)
            after = inputs(changed, block, p.found, p.cfg, ROWS)[pair.readers[0]]
            assert_close(after * scale_ed[:, None], before, LAYER)


@pytest.mark.parametrize("family", FAMILIES)
def test_rotations_leave_the_function(family):
    p = passed(family)
    changed = rotate(p.layer)
    assert differ(p.layer, changed)
    assert_same_function(p, changed)


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v2_lite", "qwen3_moe"])
def test_all_transformations_of_all_layers_leave_the_models_logits(family):
    cfg = Config.tiny(family)
    model, tokens = random_model(cfg, np.random.default_rng(0)), np.arange(64, dtype=np.int32).reshape(4, 16) % 97
    batch = whole(jnp.asarray(tokens))
    states, cache, layers = model.embed[batch.tokens_t], empty_cache(cfg, 4, 16), []
    for p in model.layers:
        found = sample(p, states, batch, cache[0], cfg)
        for block in BLOCKS:
            p = search_scales(rotate(p) if block == "attn" else p, block, found, cfg, ROWS)
            p = smooth(p, block, found, cfg, ROWS)
        layers.append(p)
        states = found.after_td
    found, expected = (
        logits(m, forward(m, batch, cache, cfg).hidden_td) for m in (model._replace(layers=tuple(layers)), model)
    )
    assert 0 < np.abs(found - expected).max() < 1e-4


def test_a_rotation_spreads_what_is_large_in_one_channel():
    p = planted(passed("deepseek_v3"))
    crest = lambda layer: float(  # noqa: E731
        jnp.max(jnp.abs(x := inputs(layer, "attn", p.found, p.cfg, ROWS)["attn.w_uq"])) / jnp.sqrt(jnp.mean(x**2))
    )
    assert crest(rotate(p.layer)) < 0.6 * crest(p.layer)


@pytest.mark.parametrize(("size", "block"), [(1, 1), (8, 8), (12, 4), (96, 32)])
def test_hadamard_matrices_are_orthogonal_and_flat(size, block):
    turn = np.asarray(hadamard(size))
    assert_close(turn @ turn.T, np.eye(size), OP)
    assert np.allclose(np.abs(turn[turn != 0]), block**-0.5)
    assert (np.count_nonzero(turn, axis=0) == block).all()


def test_scales_are_powers_of_two_that_bring_ranges_together():
    ranges = Range(jnp.asarray([[64.0, 1.0, 4.0, 0.0]]), jnp.asarray([[1.0, 1.0, 4.0, 2.0]]))
    assert scales(ranges, 0.5).tolist() == [[8.0, 1.0, 1.0, 1.0]]
    assert scales(ranges, 0.9).tolist() == [
        [2.0 ** round(5.4 - 0.8), 2.0 ** round(0 - 0.8), 2.0 ** round(1.6 - 0.8), 1.0]
    ]


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3"])
def test_smoothing_evens_out_what_enters(family):
    p = planted(passed(family))
    changed = smooth(p.layer, "attn", p.found, p.cfg, ROWS)
    assert_same_function(p, changed)
    name = "attn.w_dq" if family == "deepseek_v3" else "attn.w_q"
    spread = lambda layer: np.ptp(np.log2(np.abs(inputs(layer, "attn", p.found, p.cfg, ROWS)[name]).max((0, 1))))  # noqa: E731
    assert spread(changed) < 0.6 * spread(p.layer)


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v2_lite", "qwen3_moe"])
@pytest.mark.parametrize("block", BLOCKS)
def test_searched_scales_lose_no_more_and_where_channels_are_outliers_far_less(family, block):
    p = planted(passed(family))

    def lost(layer: Layer) -> float:
        entering = inputs(layer, block, p.found, p.cfg, ROWS)
        return sum(float(product_error(w, entering[name]).sum()) for name, w in matrices(layer, block).items())

    changed = search_scales(p.layer, block, p.found, p.cfg, ROWS)
    assert_same_function(p, changed)
    assert lost(changed) < 0.2 * lost(p.layer)
    again = search_scales(changed, block, p.found, p.cfg, ROWS)
    assert lost(again) <= 1.001 * lost(changed)
