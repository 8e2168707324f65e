"""Decoding in INT8 against BF16 and float32: tokens a second and bytes, of a random model in one run.

`python -m benchmarks.int8` makes a DeepSeek-V3-like model of about 300 million parameters and decodes 16 answers
together: the same weights in each form, in turns, medians.
"""

import statistics
import time
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from jaxserve.checkpoints.hub import EMBEDDED
from jaxserve.compilation import enable_cache
from jaxserve.describe import count, human
from jaxserve.engine import Engine
from jaxserve.layers.config import Config
from jaxserve.layers.int8 import in_int8, quantize_model
from jaxserve.layers.transformer import model_params
from jaxserve.options import EngineConfig
from jaxserve.parallel.sharding import initialize
from jaxserve.request import Request, SamplingParams
from jaxserve.tokenizer import Tokenizer

RAW: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 10,
    "first_k_dense_replace": 2,
    "num_nextn_predict_layers": 0,
    "num_attention_heads": 16,
    "q_lora_rank": 512,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "rope_theta": 10000,
    "max_position_embeddings": 2048,
    "vocab_size": 4096,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
}
BATCH = 16


def engines() -> dict[str, Engine]:
    """One of each form."""
    cfg = Config.from_hf(RAW)
    weights = initialize(model_params(cfg), jax.random.key(0))
    options = EngineConfig(max_num_seqs=BATCH, max_model_len=512, num_speculative_tokens=0, warmup=False)
    tokenizer = Tokenizer.from_folder(EMBEDDED)
    in_bits = lambda dtype: jax.tree.map(lambda w: w.astype(dtype) if w.ndim > 1 else w, weights)  # noqa: E731
    forms = {
        "float32": weights,
        "bfloat16": in_bits(jnp.bfloat16),
        "INT8 in float32": quantize_model(weights, in_int8(model_params(cfg))),
        "INT8 in bfloat16": quantize_model(in_bits(jnp.bfloat16), in_int8(model_params(cfg, jnp.bfloat16))),
    }
    return {name: Engine(model, cfg, tokenizer, options) for name, model in forms.items()}


def speed(engine: Engine, tokens: int, prompt: int = 32) -> float:
    """Tokens a second of the batch, from the first output on: each answer to a prompt has so many more."""
    how = SamplingParams(temperature=0, max_tokens=tokens + 1, ignore_eos=True)
    for number in range(BATCH):
        engine.add(Request(str(number), tuple(range(2, 2 + prompt)), how))
    began = None
    while engine.busy:
        outputs = engine.step()
        if outputs and began is None:
            began = time.perf_counter()
    assert began is not None
    return BATCH * tokens / (time.perf_counter() - began)


def main(
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer, after the first.")] = 48,
    turns: Annotated[int, typer.Option(min=1, help="How often each form answers.")] = 5,
) -> None:
    """Prints tokens a second and bytes of each form."""
    enable_cache()
    subjects = engines()
    for engine in subjects.values():
        speed(engine, tokens)  # compiles
    runs: dict[str, list[float]] = {name: [] for name in subjects}
    for name in track([name for _ in range(turns) for name in subjects], "answering", console=Console(stderr=True)):
        runs[name].append(speed(subjects[name], tokens))
    median = {name: statistics.median(found) for name, found in runs.items()}
    parameters = count(model_params(Config.from_hf(RAW)))
    title = f"{parameters:,} parameters, {BATCH} answers together, medians of {turns}"
    table = Table("weights", "bytes", "tokens/s", "of bfloat16", "of float32", title=title)
    for name, engine in subjects.items():
        ratios = (f"{median[name] / median[base]:.2f}" for base in ("bfloat16", "float32"))
        table.add_row(name, human(engine.memory.weights), f"{median[name]:.0f}", *ratios)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
