"""What the engine's programs do on a mesh, by the text of what is compiled; `test_product` has what comes of them."""

import jax
import pytest

from jaxserve.layers.spread import mixtures
from jaxserve.parallel.dispatch import capacity, message_bytes
from jaxserve.parallel.moves import move
from jaxserve.slots import mark
from tests.jaxserve.conftest import MESH_SHAPES, engine
from tests.parallel.conftest import collectives, kinds

pytestmark = pytest.mark.xdist_group("deepseek_v3")  # compiled in one process


@pytest.fixture(scope="module")
def subject():
    return engine("deepseek_v3", 0, (4, 2))


def test_decode_meets_in_two_exchanges_a_mixture_and_nowhere_else(subject):
    shape = MESH_SHAPES.decode[0]
    compiled = subject._call(shape).lower().compile()
    assert kinds(compiled) == {"all-to-all": 2 * len(mixtures(subject._model))}
    rows = 8 * capacity(shape, subject.cfg.experts.per_token, slots_per_rank=2)
    there, back = collectives(compiled)[:2]
    assert (there.dtype, there.values) == ("u8", rows * message_bytes(subject.cfg.width, "float", itemsize=4))
    assert (back.dtype, back.values) == ("f32", rows * subject.cfg.width)


@pytest.mark.parametrize("shape", MESH_SHAPES.prefill, ids=["whole", "chunks"])
def test_prefill_also_gathers_latents_and_exchanges_heads_and_brings_the_last_states_to_their_ranks(subject, shape):
    layers, experts = subject.cfg.layers, len(mixtures(subject._model))
    wanted = {"all-gather": layers, "all-to-all": layers + 2 * experts, "all-reduce": layers * bool(shape.past)}
    wanted = {kind: count for kind, count in wanted.items() if count} | {"reduce-scatter": 1}
    assert kinds(subject._call(shape).lower().compile()) == wanted


def test_a_sequence_is_marked_without_asking_other_ranks(subject):
    assert kinds(subject._call(mark).lower().compile()) == {}


def test_experts_move_by_one_collective_a_matrix(subject):
    assert set(kinds(subject._call(move).lower().compile())) == {"all-reduce"}


def test_what_belongs_to_sequences_is_split_and_what_all_need_is_on_all(subject):
    for leaf in jax.tree.leaves((subject._state, subject._table.on_device())):
        assert leaf.addressable_shards[0].data.shape[0] * 8 == leaf.shape[0]
    assert subject._model.embed.is_fully_replicated
