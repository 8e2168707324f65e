"""What is described and traced without devices is what an engine has and runs."""

from collections import Counter

import jax
import numpy as np
import pytest

from jaxserve.engine import Engine
from jaxserve.footprint import footprint
from jaxserve.layers.config import Config
from jaxserve.layers.spread import in_order, spread
from jaxserve.options import EngineConfig
from jaxserve.parallel.errors import ShardingError
from jaxserve.parallel.mesh import abstract_mesh, make_mesh
from jaxserve.parallel.ranks import Ranks
from jaxserve.parallel.sharding import DECODE, PREFILL
from jaxserve.parallel.traffic import collectives
from jaxserve.request import Request
from jaxserve.tracing import describe, trace_described
from tests.jaxserve.conftest import MESH_SHAPES, SIZE, engine, greedy, with_few_shapes, word_tokenizer
from tests.layers.helpers import random_model
from tests.parallel import conftest
from tests.parallel.conftest import as_compiled

pytestmark = pytest.mark.xdist_group("deepseek_v3")  # compiled in one process


@pytest.fixture(scope="module")
def subject():
    return engine("deepseek_v3", 0, (4, 2))


def described(subject):
    mesh = subject._devices.mesh
    return describe(subject.cfg, subject.options, np.float32, mesh and abstract_mesh(*mesh.devices.shape))


@pytest.mark.parametrize("shape", [None, (4, 2)])
def test_each_array_of_an_engine_is_described_with_its_part_on_a_device(shape):
    real = engine("deepseek_v3", 0, shape)
    said, found = described(real), (real._model, real._state)
    for one, array in zip(jax.tree.leaves((said.model, said.state)), jax.tree.leaves(found), strict=True):
        assert (one.shape, one.dtype) == (array.shape, array.dtype)
        assert {part.data.shape for part in array.addressable_shards} == {one.sharding.shard_shape(one.shape)}
    keeps, ranks = footprint(said), real._devices.count
    assert (ranks * keeps.weights, ranks * (keeps.cache + keeps.slots)) == real.memory
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(real._state.cache))
    assert keeps.cache == held


@pytest.mark.parametrize("shape", [MESH_SHAPES.decode[0], *MESH_SHAPES.prefill], ids=["decode", "whole", "chunks"])
def test_the_collectives_of_a_traced_step_are_those_of_the_compiled_program(subject, shape):
    program = trace_described(shape, described(subject), subject.cfg, subject.options, Ranks())
    found: Counter = Counter()
    for one, count in collectives(program.jaxpr, {"node": 4, "die": 2}).items():
        found[as_compiled(one)] += count
    compiled = Counter(conftest.collectives(subject._call(shape).lower().compile()))
    assert without_sums(found) == without_sums(compiled)
    assert values_of_sums(found) == values_of_sums(compiled)


def without_sums(found: Counter) -> Counter:
    return Counter({one: count for one, count in found.items() if one.kind != "all-reduce"})


def values_of_sums(found: Counter) -> int:
    """XLA joins those of several arrays in one."""
    return sum(one.values * count for one, count in found.items() if one.kind == "all-reduce")


def test_ranks_that_only_prefill_choose_and_guess_the_same_with_their_heads_alone():
    cfg, mesh = Config.tiny("deepseek_v3", num_attention_heads=8), make_mesh(2, 4)
    model, options = random_model(cfg, np.random.default_rng(4)), EngineConfig(**SIZE, num_speculative_tokens=1)
    found = []
    for rules in (DECODE, PREFILL):
        placed = spread(model, cfg, mesh, in_order(cfg, 8), rules)
        ranks = with_few_shapes(Engine(placed, cfg, word_tokenizer(97), options, mesh=mesh), MESH_SHAPES)
        for i in range(3):
            ranks.add(Request(str(i), tuple(range(5 * i + 3)), greedy(2)))
        ranks.step()  # launches the prompts
        if rules is PREFILL:
            with pytest.raises(ShardingError, match="1 of 8 heads, as PREFILL places them; decode needs all"):
                ranks._call(MESH_SHAPES.decode[0]).trace()
        chosen = ranks._ongoing.prefilled.chosen
        found.append((np.asarray(chosen.tokens_sw), np.asarray(chosen.drafts_sk), np.asarray(chosen.count_s)))
    for all_heads, own_heads in zip(*found, strict=True):
        np.testing.assert_array_equal(own_heads, all_heads)
    assert found[0][2].sum() == 3
