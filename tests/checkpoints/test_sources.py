import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.checkpoints import hf
from jaxserve.checkpoints.sources import Source, sources, to_tensors
from jaxserve.layers.config import Config
from jaxserve.layers.int8 import quantize_model
from jaxserve.layers.transformer import model_params
from jaxserve.parallel.errors import CheckpointError
from jaxserve.parallel.sharding import quantized
from tests.checkpoints.test_hf import assert_same
from tests.layers.helpers import random_model


@pytest.mark.parametrize(
    ("shape", "view", "inputs"),
    [((6, 7), (6, 7), (7,)), ((6, 7), (2, 3, 7), (7,)), ((6, 8), (6, 2, 4), (2, 4)), ((6,), (6,), ())],
)
def test_the_axes_that_are_summed_over_are_those_behind_the_rows(shape, view, inputs):
    assert Source(("x",), shape, view).inputs == inputs


def test_parts_are_written_as_the_whole_is(v3):
    raw, tensors = v3
    cfg = Config.from_hf(raw)
    model = random_model(cfg, np.random.default_rng(0))
    table = sources(cfg, model_params(cfg))
    parts = [(table.embed, table.norm, table.head), *table.layers, *table.mtp]
    weights = [(model.embed, model.norm, model.head), *model.layers, *model.mtp]
    written = [to_tensors(*both) for both in zip(parts, weights, strict=True)]
    assert_same({name: w for part in written for name, w in part.items()}, tensors)


def test_scales_of_blocks_and_a_tensor_of_two_kinds_are_not_written(tmp_path, v3):
    raw, cfg = v3[0], Config.from_hf(v3[0])
    model = random_model(cfg, np.random.default_rng(0))
    attn = model.layers[0].attn
    rounded = quantize_model(attn.w_dkv, quantized(model_params(cfg).layers[0].attn.w_dkv))
    blocks = rounded._replace(scale=jnp.tile(rounded.scale, (1, 2)))
    for w, message in ((rounded, "kv_a_proj_with_mqa.weight would be"), (blocks, "kv_a_proj_with_mqa.* blocks of its")):
        layer = model.layers[0]._replace(attn=attn._replace(w_dkv=w))
        with pytest.raises(CheckpointError, match=message):
            hf.save(tmp_path, model._replace(layers=(layer, *model.layers[1:])), cfg, raw)
