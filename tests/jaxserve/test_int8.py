"""Answers of INT8 models: sums are exact, so it does not matter what else is in a step, or where it runs."""

import functools
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.checkpoints import hf
from jaxserve.engine import Engine
from jaxserve.layers.config import Config
from jaxserve.layers.int8 import in_int8, is_int8, quantize_model
from jaxserve.layers.spread import in_order, mixtures, spread
from jaxserve.layers.transformer import Model, model_params
from jaxserve.llm import describe_weights
from jaxserve.options import EngineConfig
from jaxserve.parallel.dispatch import capacity, message_bytes
from jaxserve.parallel.errors import RequestError
from jaxserve.parallel.mesh import make_mesh
from jaxserve.request import Output
from tests.jaxserve.conftest import EMBEDDED_SIZE, MESH_SHAPES, loaded, serve, tokens, with_few_shapes
from tests.jaxserve.test_product import NEW, SAMPLED, prompts
from tests.layers.test_int8 import in_blocks
from tests.parallel.conftest import collectives

pytestmark = pytest.mark.xdist_group("deepseek_v3")  # compiled in one process
NAME = "deepseek_v3"
HOW = {
    how["temperature"]: SamplingParams(max_tokens=NEW, ignore_eos=True, **how)
    for how in (SAMPLED, {"temperature": 0.0})
}


def in_rows(cfg: Config, model: Model) -> tuple[Config, Model]:
    """A scale a row; layers have biases, as calibration gives them."""
    rounded, rng = quantize_model(model, in_int8(model_params(cfg))), np.random.default_rng(0)
    bias = lambda: jnp.asarray(0.1 * rng.standard_normal(cfg.width), jnp.float32)  # noqa: E731
    layers = tuple(layer._replace(attn_bias=bias(), ffn_bias=bias()) for layer in rounded.layers)
    mtp = tuple(m._replace(layer=m.layer._replace(attn_bias=bias(), ffn_bias=bias())) for m in rounded.mtp)
    return cfg, rounded._replace(layers=layers, mtp=mtp)


def in_part(cfg: Config, model: Model) -> tuple[Config, Model]:
    """Two layers: a dense one and experts in INT8 with scales of blocks, the others' attention in floats."""
    cfg, model = replace(cfg, is_moe=cfg.is_moe[:2]), model._replace(layers=model.layers[:2])
    first, second = in_blocks(model, in_int8(model_params(cfg)), size=16).layers
    mixture = model.layers[1].ffn._replace(experts=second.ffn.experts)
    return cfg, model._replace(layers=(first, model.layers[1]._replace(ffn=mixture)))


MODELS = {"rows": in_rows, "in part": in_part}


@functools.cache
def engine(shape: tuple[int, int] | None, kind: str = "rows") -> Engine:
    cfg, model, tokenizer, *_ = loaded(NAME)
    (cfg, model), options = MODELS[kind](cfg, model), EngineConfig(**EMBEDDED_SIZE)
    if shape is None:
        return with_few_shapes(Engine(model, cfg, tokenizer, options))
    mesh = make_mesh(*shape)
    placed = spread(model, cfg, mesh, in_order(cfg, mesh.size, redundant=8))
    return with_few_shapes(Engine(placed, cfg, tokenizer, options, mesh=mesh), MESH_SHAPES)


@functools.cache
def together(temperature: float, kind: str = "rows") -> list[list[int]]:
    return list(map(tokens, serve(engine(None, kind), prompts(NAME), HOW[temperature])))


def outputs(found: list[list[Output]]) -> list[list[int]]:
    return [tokens(each) for each in found]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("temperature", HOW)
def test_tokens_are_the_same_alone_and_in_a_batch(temperature, kind):
    alone = [outputs(serve(engine(None, kind), [prompt], HOW[temperature]))[0] for prompt in prompts(NAME)]
    assert alone == together(temperature, kind)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("temperature", HOW)
def test_tokens_are_the_same_on_one_device_and_on_eight(temperature, kind):
    assert outputs(serve(engine((2, 4), kind), prompts(NAME), HOW[temperature])) == together(temperature, kind)


def test_tokens_are_sent_as_they_are_to_experts_that_round_them_in_blocks():
    assert engine((2, 4), "in part")._ranks.payload == "float"


def test_tokens_are_sent_to_experts_as_they_are_rounded_there():
    subject, rows = engine((2, 4)), MESH_SHAPES.decode[0]
    slots = mixtures(subject._model)[0].experts.w_gate.shape[0] // 8
    there, back = collectives(subject._call(rows).lower().compile())[:2]
    messages = 8 * capacity(rows, subject.cfg.experts.per_token, slots)
    assert (there.dtype, there.values) == ("u8", messages * message_bytes(subject.cfg.width, "int8"))
    assert (back.dtype, back.values) == ("f32", messages * subject.cfg.width)


def test_a_quantization_that_is_not_there_is_refused_before_anything_is_loaded(tiny_folder):
    with pytest.raises(RequestError, match="quantization = 'int4': it must be None or 'int8'"):
        LLM(tiny_folder, quantization="int4")


def test_weights_are_rounded_when_they_are_loaded(tiny_folder):
    sizes = [
        LLM(tiny_folder, quantization=how, max_model_len=32, warmup=False).engine.memory.weights
        for how in (None, "int8")
    ]
    assert sizes[1] < 0.8 * sizes[0]


def test_an_int8_checkpoint_is_served_as_it_is(tiny_folder, tmp_path):
    cfg, model = hf.load(tiny_folder, int8=True)
    hf.save(tmp_path, model, cfg, hf.read_json(tiny_folder))
    shutil.copy(tiny_folder / "tokenizer.json", tmp_path)
    served = LLM(tmp_path, max_model_len=32, warmup=False).engine
    jax.tree.map(np.testing.assert_array_equal, served._model, model)
    said = describe_weights(tmp_path, hf.read_json(tmp_path), cfg, jnp.float32)
    assert served.memory.weights == sum(param.nbytes for param in jax.tree.leaves(said))


def test_weights_that_are_not_there_are_described_as_their_config_announces(tmp_path):
    cfg = Config.tiny("qwen3")
    known = {"quantization_config": {"quant_method": "w8a8_int8"}}
    kinds = [describe_weights(tmp_path, raw, cfg, jnp.bfloat16).layers[0].attn.w_o for raw in ({}, known)]
    assert [is_int8(kind) for kind in kinds] == [False, True]
