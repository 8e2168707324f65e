"""The engine at work on prompts of random tokens: how long its steps take, and which experts they visit.

What is timed is what whoever serves has: the steps as they are compiled, and the host that plans, launches and reads
them.
"""

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from jaxserve.bench.models import Subject
from jaxserve.bench.workload import Ask
from jaxserve.engine import Engine
from jaxserve.layers.config import Config
from jaxserve.options import CacheDtype, EngineConfig
from jaxserve.parallel.errors import EngineError, RequestError
from jaxserve.request import Output, Request, SamplingParams
from jaxserve.steps import ROUNDS

STEP = EngineConfig().max_num_batched_tokens
WARM = 2 * ROUNDS
"""Rounds of a batch that don't count: in the first steps the host is not ahead of the device yet."""
COUNTED = 8
"""Rounds in which visits of experts are counted."""
WAITING = "waiting"
"""The request that finds no place."""

Prompt = tuple[int, ...]


class Decoding(NamedTuple):
    """Rounds of a batch."""

    batch: int
    seconds: list[float]  # of each round
    seen: float  # tokens that a token sees, itself among them: the mean over rounds and sequences
    visited: float  # experts that some token of a round visits, of all layers together: the mean


class Filling(NamedTuple):
    """Prompts, one after another."""

    tokens: int  # of each
    seconds: list[float]  # from when it is asked to its first token
    visited: int  # experts that some token of it visits, of all layers together


class Round(NamedTuple):
    """A token of each sequence."""

    seconds: float
    seen: float


class Serving(NamedTuple):
    """Requests that came all at once."""

    requests: int
    prompt_tokens: int  # of all together
    output_tokens: int
    seconds: list[float]  # of each time


def make_engine(
    subject: Subject, batch: int, longest: int, kv_cache_dtype: CacheDtype = "auto", step: int = STEP,
    warmup: bool = False,
) -> Engine:  # fmt: skip
    """One for so many answers, of so many tokens with their prompts, in steps of so many; it makes no guesses."""
    positions = subject.cfg.max_positions
    if longest > positions:
        raise RequestError(f"{longest} tokens of prompt and answer: {subject.name} has positions for {positions}")
    options = EngineConfig(
        max_num_seqs=batch,
        max_model_len=longest,
        max_num_batched_tokens=step,
        num_speculative_tokens=0,
        enable_prefix_caching=False,
        kv_cache_dtype=kv_cache_dtype,
        warmup=warmup,
    )
    return Engine(subject.model, subject.cfg, subject.tokenizer, options)


def prompts(cfg: Config, sizes: Sequence[int], seed: int) -> list[Prompt]:
    """Random tokens, so many for each."""
    rng = np.random.default_rng(seed)
    return [tuple(rng.integers(0, cfg.vocab_size, size).tolist()) for size in sizes]


def decoding(subject: Subject, batch: int, context: int, rounds: int, kv_cache_dtype: CacheDtype = "auto") -> Decoding:
    """Times so many rounds of `batch` sequences whose prompts have `context` tokens.

    Before, the experts that they visit are counted; that also compiles what is needed.
    """
    apart = batch * -(-context // STEP)  # tokens that the first has said when the last begins, at most
    tokens = apart + COUNTED + WARM + rounds + 2 * ROUNDS
    server = make_engine(subject, batch, context + tokens, kv_cache_dtype)
    with _answers(server, prompts(subject.cfg, [context] * batch, batch), tokens) as said:
        server.add(_request(WAITING, (0,), 1))
        visited = list(itertools.islice(_visits(server, said), COUNTED))
        server.abort(WAITING)
        found = list(itertools.islice(_rounds(server, said), WARM, WARM + rounds))
    seen = context + float(np.mean([each.seen for each in found]))
    return Decoding(batch, [each.seconds for each in found], seen, float(np.mean(visited)))


def _rounds(server: Engine, said: dict[str, int]) -> Iterator[Round]:
    """Those of steps in which all answers go on; `seen` are tokens of answers alone."""
    while server.busy:
        before, all_begun, seen = time.perf_counter(), all(said.values()), float(np.mean(list(said.values())))
        outputs = _step(server, said)
        seconds, gained = time.perf_counter() - before, {len(output.token_ids) for output in outputs}
        if all_begun and len(outputs) == len(said) and len(gained) == 1:
            (rounds,) = gained
            yield from (Round(seconds / rounds, seen + number) for number in range(rounds))


def _visits(server: Engine, said: dict[str, int]) -> Iterator[int]:
    """Experts that a round visits, of all layers together, for each step in which all answers go on.

    What the engine has counted before the step and after tells it, if the step has one round: another request must wait
    for a place.
    """
    experts, layers = server.cfg.experts, sum(server.cfg.is_moe)
    choices = len(said) * experts.per_token if experts else 0
    while not all(said.values()):
        _step(server, said)
    while server.busy:
        before = server.expert_load()
        _step(server, said)
        load_le = (server.expert_load() - before)[:layers]
        if (load_le.sum(axis=1) == choices).all():
            yield int((load_le > 0).sum())


def filling(
    subject: Subject, tokens: int, repetitions: int, step: int = STEP, kv_cache_dtype: CacheDtype = "auto"
) -> Filling:
    """Times so many prompts, one after another, none of which is cached; one before them compiles what is needed."""
    server = make_engine(subject, 1, tokens + 1, kv_cache_dtype, step)
    seconds, layers, visited = [], sum(subject.cfg.is_moe), 0
    for prompt in prompts(subject.cfg, [tokens] * (1 + repetitions), tokens):
        before, began = server.expert_load(), time.perf_counter()
        answer(server, [prompt], [1])
        seconds.append(time.perf_counter() - began)
        visited = int((server.expert_load() - before)[:layers].astype(bool).sum())
    return Filling(tokens, seconds[1:], visited)


def serving(
    subject: Subject, asks: Sequence[Ask], batch: int, repetitions: int, kv_cache_dtype: CacheDtype = "auto"
) -> Serving:
    """Times the answers to all requests, of which so many run together; once before, that doesn't count."""
    sizes = [sum(piece.tokens for piece in ask.pieces) for ask in asks]
    outputs = [ask.output_tokens for ask in asks]
    server = make_engine(subject, batch, max(sizes) + max(outputs), kv_cache_dtype, warmup=True)
    seconds = []
    for number in range(1 + repetitions):
        asked, began = prompts(subject.cfg, sizes, number), time.perf_counter()
        answer(server, asked, outputs)
        seconds.append(time.perf_counter() - began)
    return Serving(len(asks), sum(sizes), sum(outputs), seconds[1:])


def answer(server: Engine, asked: Sequence[Prompt], tokens: Sequence[int]) -> None:
    """Answers all prompts to the end, each by so many tokens."""
    said = {str(number): 0 for number in range(len(asked))}
    for name, prompt, count in zip(said, asked, tokens, strict=True):
        server.add(_request(name, prompt, count))
    while server.busy:
        _step(server, said)


@contextmanager
def _answers(server: Engine, asked: Sequence[Prompt], tokens: int) -> Iterator[dict[str, int]]:
    """Asks for answers of so many tokens, and aborts what is left of them; gives how many tokens each has so far."""
    said = {str(number): 0 for number in range(len(asked))}
    for name, prompt in zip(said, asked, strict=True):
        server.add(_request(name, prompt, tokens))
    yield said
    for name in said:
        server.abort(name)
    while server.busy:
        server.step()


def _request(name: str, prompt: Prompt, tokens: int) -> Request:
    return Request(name, prompt, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True))


def _step(server: Engine, said: dict[str, int]) -> list[Output]:
    """A step, whose outputs are counted."""
    outputs = server.step()
    for output in outputs:
        if output.error:
            raise EngineError(f"an answer failed while it was measured: {output.error}")
        said[output.request_id] += len(output.token_ids)
    return outputs
