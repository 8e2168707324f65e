"""What is promised for features one by one holds for their product: the tokens of an oracle without any of them."""

import functools
import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest

from jaxserve.engine import Engine
from jaxserve.options import CacheDtype
from jaxserve.programs import Tiles
from jaxserve.request import Request, SamplingParams
from jaxserve.scheduler import Plan
from jaxserve.steps import ROUNDS
from tests.jaxserve.conftest import engine, loaded
from tests.oracles.generate import generate

LENGTHS = (1, 2, 5, 7, 15, 16, 17, 23, 31, 32, 33, 48, 50, 64, 65, 80)
ALONE = (0, 5, 10, 15)
"""Which of them run alone."""
SAMPLED = {"temperature": 0.8, "top_p": 0.95, "top_k": 50, "seed": 1234}
GREEDY = {"temperature": 0.0}
NEW = 14


@functools.cache
def prompts(name: str) -> list[tuple[int, ...]]:
    """Sixteen of mixed lengths, some of which begin alike."""
    vocabulary, rng = loaded(name)[0].vocab_size, random.Random(name)
    base = tuple(rng.randrange(2, vocabulary) for _ in range(max(LENGTHS)))
    other = tuple(rng.randrange(2, vocabulary) for _ in range(max(LENGTHS)))
    return [(base if i % 2 else other)[:length] for i, length in enumerate(LENGTHS)]


@functools.cache
def expected(name: str, sampled: bool, kv_cache_dtype: CacheDtype = "auto") -> list[list[int]]:
    """What the oracle says."""
    *_, config, weights = loaded(name)
    config, how = config | {"kv_cache_dtype": kv_cache_dtype}, SAMPLED if sampled else GREEDY
    return [generate(config, weights, prompt, max_tokens=NEW, **how) for prompt in prompts(name)]


def run(subject: Engine, requests: list[Request], disturb: bool) -> list[list[int]]:
    """The tokens of each request; disturbed, one that runs is preempted every third step.

    Of the launches that may have several rounds, every other has.
    """
    answers: dict[str, list[int]] = {request.id: [] for request in requests}
    subject._rounds = itertools.cycle((ROUNDS, 1)).__next__
    for request in requests:
        subject.add(request)
    for count in itertools.count():
        if not subject.busy:
            del subject._rounds
            return list(answers.values())
        assert count < 2000
        running = [(scheduler, s) for scheduler in subject._schedulers for s in scheduler.running]
        if disturb and count % 3 == 2 and running:
            scheduler, s = running[count % len(running)]
            scheduler.preempt(s)
        for output in subject.step():
            assert output.error is None
            answers[output.request_id] += output.token_ids


def check(subject: Engine, name: str, sampled: bool, chunked: bool, hit: bool, together: bool, preempted: bool) -> None:
    """Tokens are the oracle's, and the case has been what its name says."""
    for scheduler in subject._schedulers:
        scheduler.limits = scheduler.limits._replace(tokens=16 if chunked else 128)
    params = SamplingParams(max_tokens=NEW, ignore_eos=True, **(SAMPLED if sampled else GREEDY))
    requests = [Request(str(i), prompt, params) for i, prompt in enumerate(prompts(name))]
    if hit:
        run(subject, requests, False)
    before = [sums(subject), subject.counters.wide_rows]
    found, wanted, launched = [], [], []
    for some in [range(len(requests))] if together else [[i] for i in ALONE]:
        if not hit:
            for scheduler in subject._schedulers:
                scheduler.pool.clear()
        with noting_plans(subject, launched):
            found += run(subject, [requests[i] for i in some], preempted)
        wanted += [expected(name, sampled, subject.options.kv_cache_dtype)[i] for i in some]
    assert found == wanted
    after = sums(subject)
    assert (after.preemptions > before[0].preemptions) == preempted
    least = 96 if len(subject._schedulers) == 1 else 1  # 32 of 33 tokens and 64 of 80 of those that run alone
    assert after.hit - before[0].hit >= least * hit  # on a mesh a prompt may come to a rank that has not seen it
    assert (subject.counters.wide_rows > before[1]) == (subject.drafts > 0)
    assert {plan.rounds for plan in launched} == {1, ROUNDS}
    chunks = [chunk for plan in launched for chunk in plan.chunks]
    assert max(chunk.size for chunk in chunks) <= 16 or not chunked
    assert any(not chunk.first for chunk in chunks) or not chunked or hit  # a hit leaves less than one to compute
    assert after.used == 0


class Sums(NamedTuple):
    """Of all ranks."""

    preemptions: int
    hit: int
    used: int


def sums(subject: Engine) -> Sums:
    each = [(s.preemptions, s.hit, s.pool.used) for s in subject._schedulers]
    return Sums(*map(sum, zip(*each, strict=True)))


@contextmanager
def noting_plans(subject: Engine, plans: list[Plan]) -> Iterator[None]:
    """Adds the plans of all launches to a list."""
    launch = subject._launch
    subject._launch = lambda each: plans.extend(each) or launch(each)
    yield
    del subject._launch


@pytest.mark.parametrize("preempted", [False, True], ids=["undisturbed", "preempted"])
@pytest.mark.parametrize("together", [False, True], ids=["alone", "batch"])
@pytest.mark.parametrize("hit", [False, True], ids=["cold", "hit"])
@pytest.mark.parametrize("chunked", [False, True], ids=["whole", "chunked"])
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    ("name", "drafts"),
    [
        pytest.param(*which, marks=pytest.mark.xdist_group(which[0]))  # compiled in one process
        for which in (("embedded", 0), ("embedded", 1), ("embedded", 2), ("qwen3", 0), ("deepseek_v2_lite", 0))
    ],
)
def test_tokens_are_those_of_the_oracle(name, drafts, sampled, chunked, hit, together, preempted):
    check(engine(name, drafts), name, sampled, chunked, hit, together, preempted)


ON_MESHES = {  # with guesses or without; its answers greedy or sampled; of steps, the microbatches
    ("embedded", 1, (2, 4), True, 2): [(False, False, False), (True, True, True)],
    ("deepseek_v3", 0, (4, 2), True, 1): list(itertools.product([False, True], repeat=3)),
    ("deepseek_v2_lite", 0, (1, 8), False, 2): [(False, False, False), (True, True, True), (True, False, True)],
    ("qwen3_moe", 0, (2, 4), False, 1): [(False, False, False), (True, True, True), (False, True, True)],
}


@pytest.mark.parametrize(
    ("name", "drafts", "shape", "sampled", "microbatches", "chunked", "hit", "preempted"),
    [
        pytest.param(*which, *features, marks=pytest.mark.xdist_group(which[0]))
        for which, each in ON_MESHES.items()
        for features in each
    ],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_on_eight_devices_too(name, drafts, shape, sampled, microbatches, chunked, hit, preempted):
    subject = engine(name, drafts, shape, microbatches)
    check(subject, name, sampled, chunked, hit, True, preempted)
    parts = {shape.parts for shape in subject._programs._compiled if isinstance(shape, Tiles)}
    assert max(parts) == microbatches
