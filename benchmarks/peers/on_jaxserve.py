"""jaxserve itself, by its engine."""

import time
from collections.abc import Iterable
from itertools import count
from typing import NamedTuple, cast

import jax

import jaxserve
from benchmarks.peers.job import Answer, Answerer, Job, run
from jaxserve.bench import models
from jaxserve.compilation import enable_cache
from jaxserve.engine import Engine
from jaxserve.options import EngineConfig
from jaxserve.parallel.errors import EngineError
from jaxserve.request import Output, Request, SamplingParams, TokenLogprobs
from jaxserve.serving import Serving


class Came(NamedTuple):
    """A part of an answer, and when it came."""

    seconds: float
    output: Output


def load(job: Job) -> Answerer:
    """The folder may be the name of a standard model: its INT8 is that from which its bfloat16 is made."""
    enable_cache()
    subject = models.load(job.folder, cast(models.Form, job.form))
    longest = job.prompt_tokens + job.new_tokens
    options = EngineConfig(max_num_seqs=max(job.batches), max_model_len=longest, num_speculative_tokens=0)
    return answering(Engine(subject.model, subject.cfg, subject.tokenizer, options))


def answering(engine: Serving) -> Answerer:
    """Prompts are read for one token each; then again, now mostly from the cache, for all tokens.

    An engine lets answers go on while other prompts are read. So that each is timed without the other, decode counts
    from when all have a token until the first has all of its.
    """
    numbers = count()

    def answer(prompts: list[list[int]], new: int, logprobs: bool) -> Answer:
        how = {"temperature": 0, "ignore_eos": True, "logprobs": 0 if logprobs else None}
        start = time.perf_counter()
        _answers(engine, prompts, numbers, SamplingParams(max_tokens=1, **how))
        prefill_seconds = time.perf_counter() - start
        said = _answers(engine, prompts, numbers, SamplingParams(max_tokens=new, **how))
        begin, end = max(parts[0].seconds for parts in said), min(parts[-1].seconds for parts in said)
        made = sum(len(part.output.token_ids) for parts in said for part in parts if begin < part.seconds <= end)
        tokens = [[token for part in parts for token in part.output.token_ids] for parts in said]
        scores = [[near[token].logprob for part in parts for token, near in _scored(part.output)] for parts in said]
        return Answer(tokens, scores, prefill_seconds, end - begin, made)

    return answer


def _answers(
    engine: Serving, prompts: list[list[int]], numbers: Iterable[int], how: SamplingParams
) -> list[list[Came]]:
    """The parts of each answer; all are asked for at once."""
    said: dict[str, list[Came]] = {}
    for prompt, number in zip(prompts, numbers, strict=False):  # prompts first: no number is lost
        said[str(number)] = []
        engine.add(Request(str(number), tuple(prompt), how))
    while engine.busy:
        outputs = engine.step()
        now = time.perf_counter()
        for output in outputs:
            if output.error:
                raise EngineError(f"an answer failed: {output.error}")
            said[output.request_id].append(Came(now, output))
    return list(said.values())


def _scored(output: Output) -> Iterable[tuple[int, TokenLogprobs]]:
    return zip(output.token_ids, output.logprobs, strict=False)  # of none, if none were asked for


if __name__ == "__main__":
    run(load, f"jaxserve {jaxserve.__version__}, JAX {jax.__version__}")
