"""mlx-lm on MLX's CPU backend."""
# pyright: reportMissingImports=false

import importlib.metadata
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from benchmarks.peers.job import Answerer, Job, greedy, run

NO_YARN = {"rope_scaling": {"factor": 1.0}}
"""mlx-lm's DeepSeek-V2 can't be without YaRN; a factor of one is none."""


class Mlx:
    """A model as mlx-lm loads it; 8 bits are mlx-lm's own: a scale and an offset for each 64 codes.

    Around 8 bits it is float32, with which MLX multiplies them much faster on CPU than with bfloat16.
    """

    def __init__(self, job: Job):
        self._model, config = load_model(Path(job.folder), model_config=NO_YARN)
        self._model.set_dtype(mx.float32 if job.form == "int8" else getattr(mx, job.form))
        if job.form == "int8":
            nn.quantize(self._model, group_size=64, bits=8)
        mx.eval(self._model.parameters())
        self._cache: Any = None

    def start(self, prompts: list[list[int]]) -> np.ndarray:
        self._cache = make_prompt_cache(self._model)
        return self._read(prompts)

    def go_on(self, tokens: list[int]) -> np.ndarray:
        return self._read([[token] for token in tokens])

    def _read(self, tokens_st: list[list[int]]) -> np.ndarray:
        logits_su = self._model(mx.array(tokens_st), cache=self._cache)[:, -1]
        return np.array(logits_su.astype(mx.float32))


def load(job: Job) -> Answerer:
    mx.set_default_device(mx.cpu)
    return greedy(Mlx(job))


if __name__ == "__main__":
    run(load, ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("mlx-lm", "mlx")))
