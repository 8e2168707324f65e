"""What is promised for features one by one holds for their product: the tokens of an oracle without any of them."""

import functools
import itertools
import random

import pytest

from jaxserve.engine import Engine
from jaxserve.request import Request, SamplingParams
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
def expected(name: str, sampled: bool) -> list[list[int]]:
    """What the oracle says."""
    *_, config, weights = loaded(name)
    how = SAMPLED if sampled else GREEDY
    return [generate(config, weights, prompt, max_tokens=NEW, **how) for prompt in prompts(name)]


def run(subject: Engine, requests: list[Request], disturb: bool) -> list[list[int]]:
    """The tokens of each request; disturbed, one that runs is preempted every third step.

    Of the launches that may have several rounds, every other has.
    """
    answers: dict[str, list[int]] = {request.id: [] for request in requests}
    subject._rounds = itertools.cycle((ROUNDS, 1)).__next__
    for request in requests:
        subject.add(request)
    scheduler = subject._scheduler
    for count in itertools.count():
        if not subject.busy:
            del subject._rounds
            return list(answers.values())
        assert count < 2000
        if disturb and count % 3 == 2 and scheduler.running:
            scheduler.preempt(scheduler.running[count % len(scheduler.running)])
        for output in subject.step():
            assert output.error is None
            answers[output.request_id] += output.token_ids


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
def test_tokens_are_those_of_the_oracle(name, drafts, sampled, chunked, hit, together, preempted, monkeypatch):
    subject = engine(name, drafts)
    scheduler = subject._scheduler
    scheduler.limits = scheduler.limits._replace(tokens=16 if chunked else 128)
    params = SamplingParams(max_tokens=NEW, ignore_eos=True, **(SAMPLED if sampled else GREEDY))
    requests = [Request(str(i), prompt, params) for i, prompt in enumerate(prompts(name))]
    if hit:
        run(subject, requests, False)
    launched, launch = [], subject._launch
    monkeypatch.setattr(subject, "_launch", lambda plan: launched.append(plan) or launch(plan))
    before = scheduler.preemptions, scheduler.hit, subject.counters.wide_rows
    if together:
        if not hit:
            scheduler.pool.clear()
        found = run(subject, requests, preempted)
        wanted = expected(name, sampled)
    else:
        found, wanted = [], [expected(name, sampled)[i] for i in ALONE]
        for i in ALONE:
            if not hit:
                scheduler.pool.clear()
            found += run(subject, [requests[i]], preempted)
    assert found == wanted
    # The case has been what its name says.
    assert (scheduler.preemptions > before[0]) == preempted
    assert scheduler.hit - before[1] >= 96 * hit  # 32 of 33 tokens and 64 of 80 of those that run alone
    assert (subject.counters.wide_rows > before[2]) == (drafts > 0)
    assert {plan.rounds for plan in launched} == {1, ROUNDS}
    chunks = [chunk for plan in launched for chunk in plan.chunks]
    assert max(chunk.size for chunk in chunks) <= 16 or not chunked
    assert any(not chunk.first for chunk in chunks) or not chunked or hit  # a hit leaves less than one to compute
    assert scheduler.pool.used == 0
