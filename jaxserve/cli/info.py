"""`jaxserve info`: what a model is, and the memory it takes."""

from typing import Annotated

import typer

from jaxserve.cli.options import KvCacheDtypeOption, ModelArgument
from jaxserve.cli.show import print_table


def info(
    model: ModelArgument = None,
    dtype: Annotated[str, typer.Option(help="Of weights and cache, for the memory they take.")] = "bfloat16",
    kv_cache_dtype: KvCacheDtypeOption = "auto",
) -> None:
    """Shows a model's architecture, parameters and memory.

    Parameters by part, and the memory of weights and cache. Reads no weights, they need not be there: config.json, and
    of files that are there the headers, which say what is INT8.
    """
    from jaxserve.checkpoints.formats import DESCRIPTION
    from jaxserve.checkpoints.hf import read_json
    from jaxserve.checkpoints.hub import locate
    from jaxserve.describe import architecture, memory, parts
    from jaxserve.layers.config import Config
    from jaxserve.llm import describe_weights, resolve_dtype

    folder = locate(model, wanted=("config.json", DESCRIPTION))
    raw = read_json(folder)
    cfg, kind = Config.from_hf(raw), resolve_dtype(dtype, raw)
    weights = describe_weights(folder, raw, cfg, kind)  # refuses what can't be read before anything is shown
    print_table(f"{cfg.model_type}  {folder}", architecture(cfg), "left")
    print_table("parameters", parts(cfg), "right")
    print_table(f"memory in {kind}", memory(cfg, kind, weights, kv_cache_dtype=kv_cache_dtype), "right")
