"""Answers from latents in INT8: each token sees rounded entries, its own too, however it was computed."""

import itertools

import jax.numpy as jnp
import pytest

from jaxserve import LLM
from jaxserve.describe import memory
from jaxserve.engine import Engine
from jaxserve.layers.config import Config
from jaxserve.layers.int8 import in_int8, quantize_model
from jaxserve.layers.spread import in_order, spread
from jaxserve.layers.transformer import model_params
from jaxserve.options import EngineConfig, num_pages
from jaxserve.parallel.errors import RequestError
from jaxserve.parallel.mesh import make_mesh
from jaxserve.request import SamplingParams
from tests.jaxserve.conftest import EMBEDDED_SIZE, MESH_SHAPES, engine, loaded, serve, tokens, with_few_shapes
from tests.jaxserve.test_product import ALONE, NEW, SAMPLED, check, expected, prompts

CASES = {  # greedy or sampled, whole or chunked, cold or cached, alone or in a batch, undisturbed or preempted
    ("short", 1): [
        (True, False, False, False, False),
        (True, True, True, True, True),
        (True, True, False, True, False),
    ],
    ("deepseek_v3", 0): [(False, False, False, True, False), (False, True, True, False, True)],
}


@pytest.mark.parametrize(
    ("name", "drafts", "sampled", "chunked", "hit", "together", "preempted"),
    [
        pytest.param(*which, *features, marks=pytest.mark.xdist_group(which[0]))
        for which, each in CASES.items()
        for features in each
    ],
)
def test_tokens_are_those_of_an_oracle_that_rounds(name, drafts, sampled, chunked, hit, together, preempted):
    check(engine(name, drafts, kv_cache_dtype="int8"), name, sampled, chunked, hit, together, preempted)


@pytest.mark.xdist_group("short")
@pytest.mark.parametrize(("chunked", "hit", "preempted"), [(False, False, False), (True, True, True)])
def test_on_eight_devices_and_in_microbatches_too(chunked, hit, preempted):
    subject = engine("short", 1, (2, 4), 2, kv_cache_dtype="int8")
    check(subject, "short", True, chunked, hit, True, preempted)


@pytest.mark.xdist_group("short")
def test_the_oracle_would_notice_if_nothing_were_rounded():
    assert expected("short", True, "int8") != expected("short", True)


def in_integers(shape: tuple[int, int] | None) -> Engine:
    """With weights in INT8 too."""
    cfg, model, tokenizer, *_ = loaded("deepseek_v3")
    model = quantize_model(model, in_int8(model_params(cfg)))
    options = EngineConfig(**EMBEDDED_SIZE, kv_cache_dtype="int8")
    if shape is None:
        return with_few_shapes(Engine(model, cfg, tokenizer, options))
    mesh = make_mesh(*shape)
    placed = spread(model, cfg, mesh, in_order(cfg, mesh.size))
    return with_few_shapes(Engine(placed, cfg, tokenizer, options, mesh=mesh), MESH_SHAPES)


@pytest.mark.xdist_group("deepseek_v3")
def test_with_weights_in_int8_tokens_are_the_same_alone_in_a_batch_and_on_eight_devices():
    # On eight but for one answer at most: floats are summed in an order that depends on a step's shape, and a latent
    # that lies between two codes may be rounded to either.
    how, asked = SamplingParams(max_tokens=NEW, ignore_eos=True, **SAMPLED), prompts("deepseek_v3")
    one = in_integers(None)
    together = [tokens(each) for each in serve(one, asked, how)]
    assert [tokens(serve(one, [asked[i]], how)[0]) for i in ALONE] == [together[i] for i in ALONE]
    on_eight = [tokens(each) for each in serve(in_integers((4, 2)), asked, how)]
    assert sum(a != b for a, b in zip(on_eight, together, strict=True)) <= 1


# -- what it takes --

CFG = Config.tiny("deepseek_v3")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_more_pages_fit_into_as_many_bytes(dtype):
    latent, key, size = CFG.attention.kv_rank, CFG.attention.rope_dim, jnp.dtype(dtype).itemsize
    each = {"auto": (latent + key) * size, "int8": latent + 4 + 2 * key}
    for (kv_cache_dtype, token), missing in itertools.product(each.items(), (0, 1)):
        page = token * 8 * (CFG.layers + CFG.mtp_layers)
        options = EngineConfig(
            page_size=8, max_model_len=64, max_num_seqs=64, cache_bytes=100 * page - missing,
            kv_cache_dtype=kv_cache_dtype,
        )  # fmt: skip
        assert num_pages(CFG, options, dtype) == 100 - missing


def test_a_token_takes_what_is_told_of_it():
    values = (CFG.attention.kv_rank + 4 + 2 * CFG.attention.rope_dim) * (CFG.layers + CFG.mtp_layers)
    assert dict(memory(CFG, jnp.float16, kv_cache_dtype="int8"))["cache of a token"] == f"{values} B"


def test_a_model_without_latents_is_refused_before_anything_is_loaded(tiny_folder, monkeypatch):
    monkeypatch.setattr("jaxserve.checkpoints.hf.Checkpoint.read", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(RequestError, match="kv_cache_dtype = 'int8': the model's attention is grouped-query .* 'auto'"):
        LLM(tiny_folder, kv_cache_dtype="int8")
