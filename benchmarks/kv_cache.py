"""Decoding from latents in INT8 against latents in float32: tokens a second and bytes, in one run.

`python -m benchmarks.kv_cache` lets the embedded model, and a random one with latents as wide as DeepSeek-V3's, answer
16 long prompts together: with each kind of cache, in turns, medians.
"""

import statistics
from typing import Annotated, Any, get_args

import jax
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.int8 import BATCH, RAW, speed
from jaxserve.checkpoints import hf
from jaxserve.checkpoints.hub import EMBEDDED
from jaxserve.describe import human
from jaxserve.engine import Engine
from jaxserve.layers.config import Config
from jaxserve.layers.transformer import Model, model_params
from jaxserve.options import CacheDtype, EngineConfig
from jaxserve.parallel.sharding import initialize, local_bytes
from jaxserve.tokenizer import Tokenizer

WIDE = RAW | {"num_hidden_layers": 4, "kv_lora_rank": 512, "qk_rope_head_dim": 64}


def models() -> dict[str, tuple[Config, Model]]:
    """Each with its config."""
    wide = Config.from_hf(WIDE)
    random = initialize(model_params(wide), jax.random.key(0))
    return {"embedded, latents of 64": hf.load(EMBEDDED, "float32"), "random, latents of 512": (wide, random)}


def engines(cfg: Config, model: Model, longest: int) -> dict[str, Engine]:
    """One for each kind of cache."""
    tokenizer = Tokenizer.from_folder(EMBEDDED)
    size: dict[str, Any] = {"max_num_seqs": BATCH, "max_model_len": longest, "num_speculative_tokens": 0}
    make = lambda kind: EngineConfig(**size, kv_cache_dtype=kind, warmup=False)  # noqa: E731
    return {kind: Engine(model, cfg, tokenizer, make(kind)) for kind in get_args(CacheDtype)}


def main(
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 1900,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer, after the first.")] = 48,
    turns: Annotated[int, typer.Option(min=1, help="How often each answers.")] = 5,
) -> None:
    """Prints bytes of the cache and tokens a second of each."""
    table = Table("model", "cache", "bytes", "tokens/s", "of float32", title=f"{BATCH} answers, medians of {turns}")
    for name, (cfg, model) in models().items():
        subjects = engines(cfg, model, prompt + tokens + 1)
        for engine in subjects.values():
            speed(engine, tokens, prompt)  # compiles, and leaves the prompt in the cache
        runs: dict[str, list[float]] = {kind: [] for kind in subjects}
        order = [kind for _ in range(turns) for kind in subjects]
        for kind in track(order, name, console=Console(stderr=True)):
            runs[kind].append(speed(subjects[kind], tokens, prompt))
        for kind, engine in subjects.items():
            found = statistics.median(runs[kind])
            ratio = found / statistics.median(runs["auto"])
            held = human(local_bytes(engine._state.cache))
            table.add_row(name, kind, held, f"{found:.0f}", f"{ratio:.2f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
