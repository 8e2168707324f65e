import numpy as np
import pytest

from jaxserve.bench import layers, models, runs, workload
from jaxserve.bench.costs import Phase, parts, total
from jaxserve.layers.config import TINY
from jaxserve.layers.transformer import cache_params
from jaxserve.parallel.errors import RequestError


@pytest.fixture(scope="module", params=["deepseek_v2_lite", "qwen3"])
def subject(request):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "small", TINY[request.param] | {"vocab_size": 4200})
        yield models.load("small", "int8")


def test_rounds_of_a_batch_are_timed_and_the_experts_that_they_visit_are_counted(subject):
    alone, several = (runs.decoding(subject, batch, 40, 5) for batch in (1, 3))
    cfg = subject.cfg
    assert (len(alone.seconds), len(several.seconds)) == (5, 5)
    assert all(seconds > 0 for seconds in several.seconds)
    assert 40 < alone.seen < 128 and several.seen > 40
    each = cfg.experts.per_token * cfg.mixtures if cfg.experts else 0
    assert alone.visited == each
    assert each <= several.visited <= 3 * each


def test_prompts_are_timed_and_their_visits_counted(subject):
    found = runs.filling(subject, 24, 2)
    assert (found.tokens, len(found.seconds)) == (24, 2)
    experts = subject.cfg.experts
    assert (found.visited > experts.per_token * subject.cfg.mixtures) if experts else found.visited == 0


def test_requests_of_all_lengths_are_answered_to_the_end(subject):
    asks = workload.synthetic(5, workload.Lengths(3, 20), workload.Lengths(2, 6), 0, seed=1)
    found = runs.serving(subject, asks, 2, 1)
    assert (found.requests, len(found.seconds)) == (5, 1)
    assert found.output_tokens == sum(ask.output_tokens for ask in asks)


def test_more_tokens_than_positions_are_refused(subject):
    with pytest.raises(RequestError, match="tokens of prompt and answer: small has positions for 256"):
        runs.filling(subject, 256, 1)


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_the_parts_of_a_step_cost_what_the_step_does(phase, subject):
    cfg = subject.cfg
    work = layers.decoding(cfg, 2, 40, 16) if phase == "decode" else layers.prompt(cfg, 40, 16)
    found = {point.name: point for point in layers.measure(subject, work, 2)}
    assert all(len(point.seconds) == 2 for point in found.values())
    cache = cache_params(cfg, 1, 16)
    given = layers.split(subject, work, ())["experts"].given if cfg.experts else ()
    visited = sum(len(set(np.asarray(routing.experts_tk).flat)) for _, routing in given)
    whole = Phase.decoding(2, 41, visited) if phase == "decode" else Phase.prompt(40, visited)
    expected = parts(cfg, subject.params, cache, whole)
    assert list(found) == [*expected, layers.CHOICE]
    assert total(point.cost for name, point in found.items() if name in expected) == total(expected.values())
