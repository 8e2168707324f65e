"""Of two microbatches, one's exchange and the other's attention don't wait for each other, by the compiled text."""

from collections.abc import Callable

import numpy as np
import pytest

from jaxserve.layers.spread import mixtures
from tests.jaxserve.conftest import SHAPES_IN_PARTS, engine, greedy, serve
from tests.parallel.conftest import kinds
from tests.parallel.hlo import Program, reached

MOST, (ROWS,) = SHAPES_IN_PARTS.prefill[-1], SHAPES_IN_PARTS.decode
ENGINES = [("deepseek_v2_lite", 0, (1, 8)), ("embedded", 1, (2, 4))]
"""Those of `test_product`."""

on_each = pytest.mark.parametrize(
    "subject", [pytest.param(engine, marks=pytest.mark.xdist_group(engine[0])) for engine in ENGINES], indirect=True
)


@pytest.fixture
def subject(request: pytest.FixtureRequest):
    return engine(*request.param, 2)


def scope(microbatch: int, part: str, module: bool) -> Callable[[str], bool]:
    """The names of what is for a microbatch, in the MTP module or in the model's own layers."""
    return lambda names: f"/microbatch{microbatch}/{part}/" in names and ("/draft/" in names) == module


@on_each
@pytest.mark.parametrize("shape", [ROWS, MOST], ids=["decode", "prefill"])
def test_exchanges_and_the_other_microbatch_s_attention_are_independent(subject, shape):
    program, seen = Program(subject._programs[shape]), set()
    for operations in program.computations.values():
        for module in (False, True):
            exchanges, attention = (
                [program.find(operations, kind, scope(number, part, module)) for number in (0, 1)]
                for kind, part in (("all-to-all", "moe"), ("dot", "attention"))
            )
            if not any(operations[name].kind == "all-to-all" for name in exchanges[0] | exchanges[1]):
                continue  # it has none of its own
            seen.add(module)
            for one, other in ((0, 1), (1, 0)):
                assert exchanges[one] and attention[one]
                assert not reached(operations, exchanges[one]) & attention[other]
                assert not reached(operations, attention[one]) & exchanges[other]
                # The check can fail: within a microbatch they wait for each other.
                assert reached(operations, attention[one]) & exchanges[one]
                assert module or reached(operations, exchanges[one]) & attention[one]
    assert seen == {False, subject.drafts > 0}


@on_each
def test_each_microbatch_meets_in_two_exchanges_a_mixture_and_nowhere_else(subject):
    """A round verifies guesses or does not, which are programs of their own; in the latter it may guess, or not."""
    model, module = (2 * len(mixtures(part)) for part in (subject._model._replace(mtp=()), subject._model))
    rounds = model if not subject.drafts else 2 * module
    assert kinds(subject._programs[ROWS]) == {"all-to-all": 2 * rounds}


@on_each
def test_in_prefill_each_gathers_and_exchanges_by_itself_and_the_last_states_go_to_their_ranks_together(subject):
    """The MTP module gathers what it leaves in its cache too, and all learn which token follows a prompt.

    The past waits for nothing that the step computes: XLA's CPU backend sums it for all layers at once.
    """
    layers, drafts = subject.cfg.layers, subject.drafts
    exchanges = 2 * len(mixtures(subject._model))
    wanted = {
        "all-gather": 2 * layers + 3 * drafts,
        "all-to-all": 2 * (layers + exchanges),
        "reduce-scatter": 1 + drafts,
    }
    assert kinds(subject._programs[MOST]) == wanted | {"all-reduce": 1}


@on_each
def test_nothing_is_copied_that_a_microbatch_reads_before_the_other_writes(subject):
    parts = {leaf.addressable_shards[0].data.shape for layer in subject._state.cache for leaf in layer}
    for shape in (ROWS, MOST):
        text = subject._programs[shape].as_text()
        assert not [size for size in parts if f"[{','.join(map(str, size))}]" in _copied(text)]


@pytest.mark.xdist_group(ENGINES[0][0])
def test_prompts_have_the_log_probabilities_that_a_single_device_gives():
    name, drafts, mesh = ENGINES[0]
    params, rng = greedy(1, prompt_logprobs=1), np.random.default_rng(4)
    prompts = [rng.integers(2, 90, size) for size in (33, 2, 24, 9)]
    alone, shared = (serve(engine(*which), prompts, params) for which in ((name, drafts), (name, drafts, mesh, 2)))
    for (expected,), (found,) in zip(alone, shared, strict=True):
        assert found.token_ids == expected.token_ids
        for one, other in zip(found.prompt_logprobs[1:], expected.prompt_logprobs[1:], strict=True):
            assert {token: score.rank for token, score in one.items()} == {t: score.rank for t, score in other.items()}
            assert all(abs(score.logprob - other[token].logprob) < 1e-4 for token, score in one.items())


def _copied(text: str) -> set[str]:
    """The shapes of what a program copies."""
    copies = (line.split(" = ")[1] for line in text.splitlines() if " copy(" in line)
    return {copy[copy.index("[") : copy.index("]") + 1] for copy in copies}
