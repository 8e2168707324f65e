"""Tiny checkpoints with a tokenizer, and engines that serve them."""

import atexit
import functools
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from safetensors.numpy import save_file
from tokenizers import decoders, models, pre_tokenizers

from jaxserve.checkpoints import hf
from jaxserve.checkpoints.hub import EMBEDDED
from jaxserve.engine import Engine
from jaxserve.layers.spread import in_order, spread
from jaxserve.options import CacheDtype, EngineConfig
from jaxserve.parallel.mesh import make_mesh
from jaxserve.programs import Shapes, Tiles
from jaxserve.request import Output, Request, SamplingParams
from jaxserve.tokenizer import Tokenizer

GOLDENS = Path(__file__).parents[1] / "oracles" / "goldens"


SIZE: dict[str, Any] = {"max_num_seqs": 4, "max_model_len": 128, "max_num_batched_tokens": 128, "warmup": False}
"""Of all engines in tests, where nothing depends on it: every other size is compiled anew."""

EMBEDDED_SIZE: dict[str, Any] = SIZE | {"max_num_seqs": 16, "page_size": 16, "speculation_entropy": 3.0}
"""Of those that serve the embedded model."""

EMBEDDED_SHAPES = Shapes(prefill=(Tiles(2, 8), Tiles(16, 8)), decode=(1, 16))
MESH_SHAPES = Shapes(prefill=(Tiles(16, 8), Tiles(16, 8, past=16)), decode=(4,))
"""All sixteen of a test's answers run, two on each of eight ranks."""
SHAPES_IN_PARTS = Shapes(prefill=(Tiles(16, 8, past=16), Tiles(16, 8, past=16, parts=2)), decode=(4,))
"""The same in two microbatches; a step that is not in two parts is one that can't be."""


def with_few_shapes(engine: Engine, shapes: Shapes | None = None) -> Engine:
    """The engine with these shapes, or one each for prefill and decode; none of them is compiled yet."""
    engine._shapes = shapes or Shapes(prefill=(Tiles(16, 8),), decode=(engine.options.max_num_seqs,))
    return engine


def word_tokenizer(size: int) -> Tokenizer:
    """Token i is the word `ti`."""
    backend = tokenizers.Tokenizer(models.WordLevel({f"t{i}": i for i in range(size)}, unk_token="t0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.Fuse()
    return Tokenizer(backend)


@pytest.fixture(scope="session")
def make_engine():
    """An engine for a golden checkpoint; each checkpoint is read once, and engines of one size are compiled once."""
    loaded = {}

    def make(name: str = "deepseek_v3", **options) -> Engine:
        if name not in loaded:
            loaded[name] = hf.load(GOLDENS / name)
        cfg, model = loaded[name]
        settings = EngineConfig(**(SIZE | options))
        engine = Engine(model, cfg, word_tokenizer(cfg.vocab_size), settings)
        return engine if settings.warmup else with_few_shapes(engine)

    return make


WRITTEN = "embedded", "short"
"""Models that know texts; the others' tokens are words of their own."""


@functools.cache
def short_folder() -> Path:
    """The embedded model with the first and the last of its layers and with its MTP module: it compiles sooner."""
    folder, config = Path(tempfile.mkdtemp(prefix="jaxserve-short-")), hf.read_json(EMBEDDED)
    atexit.register(shutil.rmtree, folder)
    count = config["num_hidden_layers"]
    places = {0: 0, count - 1: 1, count: 2}
    tensors = {}
    for name, tensor in hf.open_folder(EMBEDDED).items():
        layer = re.match(r"model\.layers\.(\d+)", name)
        if layer is None:
            tensors[name] = np.asarray(tensor.read())
        elif (place := places.get(int(layer[1]))) is not None:
            tensors[f"model.layers.{place}{name[layer.end() :]}"] = np.asarray(tensor.read())
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED / name, folder)
    return folder


@functools.cache
def loaded(name: str):
    """A checkpoint's engine parts, and its config and weights as published."""
    folder = {"embedded": lambda: EMBEDDED, "short": short_folder}.get(name, lambda: GOLDENS / name)()
    cfg, model = hf.load(folder, "float32")
    tokenizer = Tokenizer.from_folder(folder) if name in WRITTEN else word_tokenizer(cfg.vocab_size)
    weights = {key: np.asarray(tensor.read(), np.float64) for key, tensor in hf.open_folder(folder).items()}
    return cfg, model, tokenizer, hf.read_json(folder), weights


@functools.cache
def engine(
    name: str, drafts: int, shape: tuple[int, int] | None = None, microbatches: int = 1,
    kv_cache_dtype: CacheDtype = "auto",
) -> Engine:  # fmt: skip
    """Steps of 128 tokens, compiled when they are needed; on one device, or on each of a mesh of this shape."""
    cfg, model, tokenizer, *_ = loaded(name)
    options = EngineConfig(
        **EMBEDDED_SIZE,
        num_speculative_tokens=drafts,
        num_microbatches=microbatches,
        kv_cache_dtype=kv_cache_dtype,
    )
    if shape is None:
        return with_few_shapes(Engine(model, cfg, tokenizer, options), EMBEDDED_SHAPES if name in WRITTEN else None)
    mesh = make_mesh(*shape)
    placed = spread(model, cfg, mesh, in_order(cfg, mesh.size))
    shapes = MESH_SHAPES if microbatches == 1 else SHAPES_IN_PARTS
    return with_few_shapes(Engine(placed, cfg, tokenizer, options, mesh=mesh), shapes)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A model of random weights."""
    folder = tmp_path_factory.mktemp("tiny")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDENS / "qwen3" / name, folder)
    (folder / "tokenizer.json").write_text(word_tokenizer(97).to_json())
    return folder


def serve(engine: Engine, prompts, params) -> list[list[Output]]:
    """All outputs of each prompt, in the order of the prompts."""
    each = params if isinstance(params, list) else [params] * len(prompts)
    outputs: dict[str, list[Output]] = {str(i): [] for i in range(len(prompts))}
    for i, (prompt, p) in enumerate(zip(prompts, each, strict=True)):
        engine.add(Request(str(i), tuple(int(t) for t in prompt), p))
    while engine.busy:
        for output in engine.step():
            outputs[output.request_id].append(output)
    return list(outputs.values())


def tokens(outputs: list[Output]) -> list[int]:
    """The tokens of one request's outputs."""
    return [t for output in outputs for t in output.token_ids]


def greedy(count: int, **more) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, **more)
