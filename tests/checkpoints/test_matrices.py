import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.checkpoints.matrices import BLOCKS, expert_load, inputs, matrices, output, with_matrices
from jaxserve.checkpoints.rounding import rounded
from jaxserve.layers.int8 import in_int8
from jaxserve.layers.moe import route
from jaxserve.layers.norm import rms_norm
from jaxserve.layers.transformer import model_params
from jaxserve.parallel.qarray import QArray
from tests.checkpoints.calibration import ROWS, passed
from tests.layers.helpers import FAMILIES
from tests.tolerances import LAYER, OP, assert_close


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_is_put_together_again(family):
    layer = passed(family).layer
    again = with_matrices(layer, matrices(layer, "attn") | matrices(layer, "ffn"))
    assert jax.tree.structure(again) == jax.tree.structure(layer)
    assert all(np.array_equal(old, new) for old, new in zip(*map(jax.tree.leaves, (layer, again)), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_codes_take_the_places_that_int8_models_have_for_them(family):
    cfg, layer, _ = passed(family)
    codes = {name: rounded(w) for block in BLOCKS for name, w in matrices(layer, block).items()}
    found, wanted = with_matrices(layer, codes), in_int8(model_params(cfg)).layers[-1]
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    assert [w.shape for w in jax.tree.leaves(found)] == [w.shape for w in jax.tree.leaves(wanted)]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_enters_the_last_matrix_of_attention_gives_its_output(family):
    cfg, layer, found = passed(family)
    heads_tz, w_dz = inputs(layer, "attn", found, cfg, ROWS)["attn.w_o"][0], matrices(layer, "attn")["attn.w_o"][0]
    assert_close(heads_tz @ w_dz.T, found.outputs["attn"], LAYER)


def test_what_enters_the_last_matrix_of_a_network_gives_its_output():
    cfg, layer, found = passed("qwen3")
    hidden_tf, w_df = inputs(layer, "ffn", found, cfg, ROWS)["ffn.w_down"][0], matrices(layer, "ffn")["ffn.w_down"][0]
    assert_close(hidden_tf @ w_df.T, found.outputs["ffn"], LAYER)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_has_what_it_is_multiplied_with(family):
    cfg, layer, found = passed(family)
    for block in BLOCKS:
        entering = inputs(layer, block, found, cfg, ROWS)
        for name, w in matrices(layer, block).items():
            x = entering[name]
            assert (x.shape[0], x.shape[2]) == (w.shape[0], w.shape[2]), name


def test_an_expert_gets_the_tokens_that_chose_it_and_then_those_nearest_to_it():
    cfg, layer, found = passed("deepseek_v3")
    normed_td = rms_norm(found.middle_td, layer.ffn_norm, cfg.norm_eps)
    chosen_tk = np.asarray(route(layer.ffn, normed_td, cfg.experts).experts_tk)
    logits_te = np.asarray(normed_td @ layer.ffn.w_router.T)
    rows_etd = np.asarray(inputs(layer, "ffn", found, cfg, ROWS)["ffn.experts.w_up"])
    load_e = expert_load(layer, found.middle_td, cfg)
    assert load_e.min() < ROWS < load_e.max()
    for e, x_td in enumerate(rows_etd):
        own = np.flatnonzero((chosen_tk == e).any(axis=1))
        assert len(own) == load_e[e]
        ordered = sorted(range(len(logits_te)), key=lambda t, e=e, own=own: (t not in own, -logits_te[t, e]))
        assert_close(x_td, normed_td[np.array(ordered[:ROWS])], OP)


def test_a_bias_is_added_to_a_blocks_output():
    cfg, layer, found = passed("deepseek_v3")
    bias = jnp.arange(cfg.width, dtype=jnp.float32)
    for block in BLOCKS:
        moved = output(layer._replace(**{f"{block}_bias": bias}), block, found, cfg)
        assert_close(moved, found.outputs[block] + bias[None], OP)


def test_codes_of_all_experts_are_one_leaf():
    layer = passed("qwen3_moe").layer
    changed = with_matrices(layer, {"ffn.experts.w_up": rounded(matrices(layer, "ffn")["ffn.experts.w_up"])})
    assert isinstance(changed.ffn.experts.w_up, QArray)
    assert changed.ffn.experts.w_down is layer.ffn.experts.w_down
