"""llama.cpp, through the low-level interface of llama-cpp-python: a batch is one of `llama_decode`."""
# pyright: reportMissingImports=false

import ctypes
import os
from importlib.metadata import version

import llama_cpp
import numpy as np

from benchmarks.peers.job import Answerer, Job, greedy, run

F32 = 0
"""ggml's number for it."""
NO_FLASH_ATTENTION = 0
"""llama.cpp's number: its flash attention rounds to 16 bits on CPU, whatever the cache has."""
ERROR = 4
"""The level of messages that matter."""


@llama_cpp.llama_log_callback
def _log(level: int, text: bytes, _: ctypes.c_void_p) -> None:
    if level == ERROR:
        os.write(2, text)


class LlamaCpp:
    """A GGUF file; a context for each batch size, in which every sequence has a cache of its own."""

    def __init__(self, job: Job, path: str):
        llama_cpp.llama_log_set(_log, None)
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        options.use_mmap = False  # else some weights would be read from disk while it is measured
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), options)
        if not self._model:
            raise RuntimeError(f"llama.cpp can't read {path}")
        self._job, self._context, self._sequences, self._past = job, None, 0, 0

    def start(self, prompts: list[list[int]]) -> np.ndarray:
        if len(prompts) != self._sequences:
            self._open(len(prompts))
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)
        self._past = len(prompts[0])
        return np.concatenate([self._read([prompt], first=number) for number, prompt in enumerate(prompts)])

    def go_on(self, tokens: list[int]) -> np.ndarray:
        self._past += 1
        return self._read([[token] for token in tokens])

    def _open(self, sequences: int) -> None:
        if self._context:
            llama_cpp.llama_free(self._context)
        options = llama_cpp.llama_context_default_params()
        room = self._job.prompt_tokens + self._job.new_tokens
        options.n_ctx, options.n_seq_max = sequences * -(-room // 256) * 256, sequences
        options.n_threads = options.n_threads_batch = os.cpu_count() or 1
        if self._job.form == "float32":
            options.type_k = options.type_v = F32
            options.flash_attn_type = NO_FLASH_ATTENTION
        self._context, self._sequences = llama_cpp.llama_init_from_model(self._model, options), sequences

    def _read(self, tokens_st: list[list[int]], first: int = 0) -> np.ndarray:
        """Reads the last tokens of sequences from this one on, and gives the logits after each one's last."""
        count, length = len(tokens_st), len(tokens_st[0])
        batch = llama_cpp.llama_batch_init(count * length, 0, 1)
        batch.n_tokens = count * length
        for at, token in enumerate(token for tokens in tokens_st for token in tokens):
            sequence, place = divmod(at, length)
            batch.token[at], batch.pos[at] = token, self._past - length + place
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, first + sequence
            batch.logits[at] = place == length - 1
        failed = llama_cpp.llama_decode(self._context, batch)
        llama_cpp.llama_batch_free(batch)
        if failed:
            raise RuntimeError(f"llama_decode failed with {failed}")
        shape = (self._job.vocabulary,)
        ends = range(length - 1, count * length, length)
        rows = (llama_cpp.llama_get_logits_ith(self._context, at) for at in ends)
        return np.stack([np.ctypeslib.as_array(row, shape).copy() for row in rows])


def load(job: Job) -> Answerer:
    return greedy(LlamaCpp(job, f"{job.folder}/{job.form}.gguf"))


if __name__ == "__main__":
    features = llama_cpp.llama_print_system_info().decode()
    run(load, f"llama-cpp-python {version('llama-cpp-python')} ({features.strip(' |')})")
