"""What a library is asked to do, and what it says of it: one JSON line a batch.

A runner is a module of its own, `python -m benchmarks.peers.on_… JOB`, in the interpreter that has its library. So this
one needs no more than NumPy, and none of jaxserve.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np

WARMUP_TOKENS = 32


class Job(NamedTuple):
    """Prompts of one length, continued greedily, in batches of several sizes."""

    folder: str  # as Hugging Face publishes models
    form: str  # of the weights: "float32", "bfloat16", or "int8": the library's own 8 bits
    batches: tuple[int, ...]  # prompts at a time
    prompt_tokens: int  # of each
    new_tokens: int  # for each
    vocabulary: int
    seed: int  # of the prompts
    patience: float  # seconds; a batch that would take longer is left out
    logprobs: bool = False  # of the tokens that are chosen


class Answer(NamedTuple):
    """What came of a batch: all prompts are read first, then all go on together."""

    tokens: list[list[int]]  # of each prompt
    logprobs: list[list[float]]  # of these tokens, or nothing
    prefill_seconds: float  # until all have their first token
    decode_seconds: float
    decode_tokens: int  # in these seconds, of all together


Answerer = Callable[[list[list[int]], int, bool], Answer]
"""Continues prompts by so many tokens each, with log-probabilities or without."""


class Model(Protocol):
    """A library's model with a cache, and logits [s u] after each sequence's last token."""

    def start(self, prompts: list[list[int]]) -> np.ndarray:
        """Reads prompts into an empty cache."""
        ...

    def go_on(self, tokens: list[int]) -> np.ndarray:
        """Reads one more token of each."""
        ...


def greedy(model: Model) -> Answerer:
    """Takes the most probable token each time."""

    def answer(prompts: list[list[int]], new: int, logprobs: bool) -> Answer:
        clock = [time.perf_counter()]
        logits_su, chosen, scores = model.start(prompts), [], []
        while True:
            chosen.append(logits_su.argmax(-1).tolist())
            clock.append(time.perf_counter())
            if logprobs:
                scores.append(_logprobs(logits_su, chosen[-1]))
            if len(chosen) == new:
                break
            logits_su = model.go_on(chosen[-1])
        tokens, found = ([list(each) for each in zip(*rounds, strict=True)] for rounds in (chosen, scores))
        return Answer(tokens, found, clock[1] - clock[0], clock[-1] - clock[1], (new - 1) * len(prompts))

    return answer


def _logprobs(logits_su: np.ndarray, tokens: list[int]) -> list[float]:
    logits_su = logits_su - logits_su.max(-1, keepdims=True)
    chosen_s = logits_su[np.arange(len(tokens)), tokens]
    return (chosen_s - np.log(np.exp(logits_su).sum(-1))).tolist()


def prompts(job: Job, batch: int, tokens: int) -> list[list[int]]:
    """Random ones, others for every batch size and seed."""
    return np.random.default_rng([job.seed, batch, tokens]).integers(2, job.vocabulary, (batch, tokens)).tolist()


def run(load: Callable[[Job], Answerer], version: str) -> None:
    """A runner: reads the job from the command line, and says its version and what came of each batch."""
    given = Job(**json.loads(sys.argv[1]))
    job = given._replace(batches=tuple(given.batches))
    _say(version=version)
    answer, last = load(job), None
    another = prompts(job, 1, max(1, job.prompt_tokens - 1))  # that none of them is known in part
    answer(another, 2, job.logprobs)  # what is for long ones may be prepared when the first comes
    for batch in job.batches:
        expected = 0.0 if last is None else last[1] * batch / last[0]
        if expected > job.patience:
            _say(batch=batch, expected=expected)
            continue
        answer(prompts(job, batch, min(WARMUP_TOKENS, job.prompt_tokens)), 2, job.logprobs)
        found = answer(prompts(job, batch, job.prompt_tokens), job.new_tokens, job.logprobs)
        last = batch, found.prefill_seconds + found.decode_seconds
        _say(batch=batch, **found._asdict())


def _say(**content: object) -> None:
    print(json.dumps(content), flush=True)
