"""What the engine's programs do on a mesh, by the text of what is compiled; `test_product` has what comes of them."""

import jax
import pytest

from jaxserve.layers.spread import mixtures
from jaxserve.parallel.dispatch import capacity, message_bytes
from jaxserve.parallel.transfer import move
from jaxserve.slots import mark
from tests.jaxserve.conftest import MESH_SHAPES, engine
from tests.parallel.conftest import collectives, kinds

pytestmark = pytest.mark.xdist_group("deepseek_v3")  # compiled in one process


@pytest.fixture(scope="module")
def subject():
    return engine("deepseek_v3", 0, (4, 2))


@pytest.mark.parametrize("shape", [MESH_SHAPES.decode[0], MESH_SHAPES.prefill[0]], ids=["decode", "prefill"])
def test_a_step_meets_in_two_exchanges_a_mixture_and_nowhere_else(subject, shape):
    compiled = subject._lower(shape).compile()
    assert kinds(compiled) == {"all-to-all": 2 * len(mixtures(subject._model))}
    cfg, tokens = subject.cfg, shape if isinstance(shape, int) else shape.tokens
    rows = 8 * capacity(tokens, cfg.experts.per_token, slots_per_rank=2)
    there, back = collectives(compiled)[:2]
    assert (there.dtype, there.values) == ("u8", rows * message_bytes(cfg.width, "float", itemsize=4))
    assert (back.dtype, back.values) == ("f32", rows * cfg.width)


def test_a_sequence_is_marked_without_asking_other_ranks(subject):
    assert kinds(subject._lower(mark).compile()) == {}


def test_experts_move_by_one_collective_a_matrix(subject):
    assert set(kinds(subject._lower(move).compile())) == {"all-reduce"}


def test_what_belongs_to_sequences_is_split_and_what_all_need_is_on_all(subject):
    for leaf in jax.tree.leaves((subject._state, subject._table.on_device())):
        assert leaf.addressable_shards[0].data.shape[0] * 8 == leaf.shape[0]
    assert subject._model.embed.is_fully_replicated
