"""Hugging Face transformers on PyTorch's CPU."""
# pyright: reportMissingImports=false

import os
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.peers.job import Answerer, Job, greedy, run


class Transformers:
    """A model as `from_pretrained` gives it, called directly: `generate` does the same, and more beside it."""

    def __init__(self, job: Job):
        torch.set_num_threads(os.cpu_count() or 1)
        self._model = transformers.AutoModelForCausalLM.from_pretrained(job.folder, dtype=getattr(torch, job.form))
        self._cache: Any = None

    def start(self, prompts: list[list[int]]) -> np.ndarray:
        self._cache = transformers.DynamicCache()
        return self._read(prompts)

    def go_on(self, tokens: list[int]) -> np.ndarray:
        return self._read([[token] for token in tokens])

    def _read(self, tokens_st: list[list[int]]) -> np.ndarray:
        with torch.inference_mode():
            out = self._model(torch.tensor(tokens_st), past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].float().numpy()


def load(job: Job) -> Answerer:
    return greedy(Transformers(job))


if __name__ == "__main__":
    run(load, f"transformers {transformers.__version__}, torch {torch.__version__}")
