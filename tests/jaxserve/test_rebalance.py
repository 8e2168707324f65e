"""Experts move while requests are served, and nobody notices."""

import numpy as np
import pytest

from jaxserve.layers.spread import in_order, spread
from jaxserve.parallel.errors import ShardingError
from jaxserve.parallel.mesh import make_mesh
from jaxserve.parallel.moves import move
from jaxserve.parallel.placement import eplb, imbalance, load
from tests.jaxserve.conftest import engine, greedy, loaded, serve, tokens
from tests.jaxserve.test_trace import watch_compilations

pytestmark = pytest.mark.xdist_group("deepseek_v3")  # compiled in one process

PROMPTS = [[3, 9, 27], [5, 7, 11, 13], list(range(2, 40)), [1, 1, 2, 3, 5, 8, 13], [90, 80], [4], [66, 6], [31, 32]]
NEW = 24


@pytest.fixture
def subject():
    it = engine("deepseek_v3", 0, (4, 2))
    it._programs[move]  # compiled, if it is not
    return it


def serve_and_move(subject, placements) -> list[list[int]]:
    """The tokens of all prompts; every fourth step the engine is given another placement to go to."""
    wanted, step = iter(placements), subject.step

    def step_and_move():
        if subject.counters.steps % 4 == 3 and not subject._rebalancer.busy:
            subject.rebalance(next(wanted, subject._rebalancer.slots_lx))
        return step()

    subject.step = step_and_move
    try:
        return [tokens(outputs) for outputs in serve(subject, PROMPTS, greedy(NEW))]
    finally:
        del subject.step


def test_tokens_are_the_same_while_experts_move_and_nothing_is_compiled(subject):
    for _ in range(2):  # cold, then from the cache: so that all programs are there
        before = [tokens(outputs) for outputs in serve(subject, PROMPTS, greedy(NEW))]
    rng, plain = np.random.default_rng(2), in_order(subject.cfg, 8)
    others = [rng.permuted(plain, axis=1) for _ in range(3)]
    with watch_compilations() as events:
        assert serve_and_move(subject, others) == before
        while subject._rebalancer.busy:
            subject.step()
        assert events == []
    assert any((subject._rebalancer.slots_lx != plain).any(axis=1))
    assert [tokens(outputs) for outputs in serve(subject, PROMPTS, greedy(NEW))] == before


def test_every_expert_s_tokens_are_counted(subject):
    before = subject.expert_load()
    answers = serve(subject, PROMPTS, greedy(NEW))
    grown = subject.expert_load() - before
    computed = sum(map(len, PROMPTS)) - sum(outputs[0].num_cached_tokens for outputs in answers)
    computed += len(PROMPTS) * (NEW - 1)  # the last token of an answer is not computed
    assert grown.shape == (2, 12)
    assert grown.sum(axis=1).tolist() == [computed * subject.cfg.experts.per_token] * 2


def test_a_placement_made_from_a_skewed_load_evens_it_and_serves_the_same_tokens(subject):
    skewed = np.ones((2, 12), np.int64)
    skewed[:, [4, 5]] = 100, 40  # expert 4 is to have all replicas that there are
    better = eplb(skewed, slots=16, groups=1, nodes=4, ranks=8)
    plain = in_order(subject.cfg, 8)
    for found, before, counted in zip(better, plain, skewed, strict=True):
        assert np.bincount(found)[4] >= 4
        assert imbalance(load(found, counted, 8)) < 0.5 * imbalance(load(before, counted, 8))
    before = [tokens(outputs) for outputs in serve(subject, PROMPTS, greedy(NEW))]
    subject.rebalance(better)
    assert [tokens(outputs) for outputs in serve(subject, PROMPTS, greedy(NEW))] == before
    while subject._rebalancer.busy:  # a fast machine answers in few steps of many rounds
        subject.step()
    assert (subject._rebalancer.slots_lx == better).all()


def test_the_load_is_right_when_the_devices_sums_have_started_again(subject):
    before = subject.expert_load()
    full = subject._devices.split(np.full(subject._state.load.shape, -5, np.int32))  # as unsigned, just below 2**32
    subject._load_seen = np.asarray(full).view(np.uint32)
    subject._state = subject._state._replace(load=full)
    serve(subject, PROMPTS, greedy(NEW))
    grown = subject.expert_load() - before
    assert (grown >= 0).all() and (grown.sum(axis=1) > 500).all()


def test_what_can_not_be_is_refused(subject):
    plain = in_order(subject.cfg, 8)
    with pytest.raises(ShardingError, match=r"slots_lx has shape \(1, 16\); the model's has \(2, 16\)"):
        subject.rebalance(plain[:1])
    with pytest.raises(ShardingError, match="expert 11 has no slot"):
        subject.rebalance(np.where(plain == 11, 0, plain))
    with pytest.raises(ShardingError, match="this engine has none"):
        engine("deepseek_v2_lite", 0).rebalance(plain)
    assert not subject._rebalancer.busy


def test_a_model_can_be_placed_as_its_load_wants_from_the_start():
    cfg, model, *_ = loaded("deepseek_v3")
    slots_lx = eplb(np.arange(24).reshape(2, 12) ** 3 + 1, slots=16, groups=1, nodes=4, ranks=8)
    placed = spread(model, cfg, make_mesh(4, 2), slots_lx)
    assert placed.layers[1].ffn.routes.count_e.tolist() == np.bincount(slots_lx[0], minlength=12).tolist()
