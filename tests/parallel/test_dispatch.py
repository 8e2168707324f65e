import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxserve.parallel.dispatch import (
    buffer_bytes,
    capacity,
    combine,
    dispatch,
    message_bytes,
    pack,
    rank_in_group,
    unpack,
)
from jaxserve.parallel.mesh import AXES, make_mesh
from jaxserve.parallel.qarray import dequantize
from jaxserve.parallel.ranks import Ranks
from tests.parallel.conftest import collectives, kinds, on_mesh

RANK_COUNT, TOKENS, WIDTH, CHOICES = 8, 6, 16, 3
FLAT, NESTED = Ranks(), Ranks(implementation="hierarchical")


def routing(kind: str, slots: int) -> tuple[np.ndarray, np.ndarray]:
    """Physical slots of all ranks' tokens, and weights."""
    rng = np.random.default_rng(3)
    tokens = RANK_COUNT * TOKENS
    chosen = np.array([rng.permutation(slots)[:CHOICES] for _ in range(tokens)], np.int32)
    if kind == "to one":
        chosen = np.concatenate([np.full((tokens, 1), 5), np.full((tokens, CHOICES - 1), slots)], axis=1)
    if kind == "to few":  # most experts get nothing, one device more than half
        chosen = np.tile(np.arange(CHOICES), (tokens, 1))
    if kind == "few tokens":  # the others are padding
        chosen[rng.random(tokens) < 0.7] = slots
    return chosen.astype(np.int32), rng.random((tokens, CHOICES)).astype(np.float32)


def experts(slots: int) -> np.ndarray:
    return np.random.default_rng(4).normal(size=(slots, WIDTH, WIDTH)).astype(np.float32) / 4


def inputs() -> np.ndarray:
    return np.random.default_rng(5).normal(size=(RANK_COUNT * TOKENS, WIDTH)).astype(np.float32)


def visit(x_td, slots_tk, weights_tk, w_xdd, how):
    """A mixture of experts, each of which is a matrix and a tanh."""
    here = w_xdd.shape[0]
    came, handle = dispatch(x_td, slots_tk, here, how)
    rows_id = dequantize(came.rows_id, x_td.dtype) if how.payload == "int8" else came.rows_id
    all_xid = jnp.tanh(jnp.einsum("id,xdf->xif", rows_id, w_xdd))
    own_i = jnp.minimum(came.slots_i, here - 1)
    y_id = jnp.take_along_axis(all_xid, own_i[None, :, None], axis=0)[0]
    return combine(jnp.where((came.slots_i < here)[:, None], y_id, jnp.nan), weights_tk, handle, how)


def loop(x_td, slots_tk, weights_tk, w_xdd):
    """The same, token by token in float64."""
    y_td = np.zeros(x_td.shape)
    for t, choices in enumerate(slots_tk):
        for slot, weight in zip(choices, weights_tk[t], strict=True):
            if slot < len(w_xdd):
                y_td[t] += weight * np.tanh(x_td[t].astype(np.float64) @ w_xdd[slot])
    return y_td


@pytest.mark.parametrize("kind", ["any", "to one", "to few", "few tokens"])
@pytest.mark.parametrize("slots", [8, 16, 40])
@pytest.mark.parametrize("how", [FLAT, NESTED], ids=["flat", "hierarchical"])
def test_what_comes_back_is_what_a_loop_over_experts_gives(mesh, how, slots, kind):
    given = (inputs(), *routing(kind, slots), experts(slots))
    y_td = on_mesh(mesh, visit, *given, static={"how": how})
    np.testing.assert_allclose(y_td, loop(*given), atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("how", [FLAT, NESTED], ids=["flat", "hierarchical"])
def test_combine_after_dispatch_gives_the_tokens_back_bit_by_bit(mesh, how, dtype):
    def there_and_back(x_td, slots_tk):
        came, handle = dispatch(x_td, slots_tk, 2, how)
        return combine(came.rows_id, jnp.tile(jnp.eye(1, CHOICES, dtype=dtype), (TOKENS, 1)), handle, how)

    x_td = jnp.asarray(inputs(), dtype)
    np.testing.assert_array_equal(on_mesh(mesh, there_and_back, x_td, routing("any", 16)[0]), x_td)


def test_each_device_gets_every_token_for_its_experts_once_and_nothing_else(mesh):
    slots_tk, _ = routing("few tokens", 16)
    x_td = inputs()

    def receive(x_td, slots_tk):
        return tuple(dispatch(x_td, slots_tk, 2, FLAT)[0])

    rows, slots = (np.asarray(part).reshape(8, -1, *part.shape[1:]) for part in on_mesh(mesh, receive, x_td, slots_tk))
    for rank in range(RANK_COUNT):
        wanted = sorted((s % 2, *x_td[t]) for t, choices in enumerate(slots_tk) for s in choices if s // 2 == rank)
        found = sorted((int(s), *row) for s, row in zip(slots[rank], rows[rank], strict=True) if s < 2)
        assert found == wanted
        assert not rows[rank][slots[rank] == 2].any()


@pytest.mark.parametrize("how", [FLAT, NESTED], ids=["flat", "hierarchical"])
def test_int8_arrives_as_each_token_was_quantized_and_answers_come_back_as_they_are(how):
    mesh, x_td = make_mesh(2, 4), inputs()
    x_td[3] = 0
    slots_tk, weights_tk = routing("any", 8)
    how = how._replace(payload="int8")
    most = np.abs(x_td).max(axis=1, keepdims=True)
    scale = most * np.float32(1 / 127)
    codes = np.round(x_td * np.divide(127, most, out=np.zeros_like(most), where=most > 0))

    def receive(x_td, slots_tk):
        return tuple(dispatch(x_td, slots_tk, 1, how)[0])

    rows, slots = on_mesh(mesh, receive, x_td, slots_tk)
    assert rows.codes.dtype == jnp.int8
    sent = {(*row, float(one)) for row, (one,) in zip(codes, scale, strict=True)}
    here = np.asarray(slots) == 0
    came = zip(np.asarray(rows.codes)[here], np.asarray(rows.scale)[here], strict=True)
    assert {(*row, float(one)) for row, (one,) in came} == sent
    given = ((codes * scale).astype(np.float32), slots_tk, weights_tk, experts(8))
    y_td = on_mesh(mesh, visit, x_td, *given[1:], static={"how": how})
    np.testing.assert_allclose(y_td, loop(*given), atol=1e-5)
    exact = loop(x_td, *given[1:])
    assert np.linalg.norm(y_td - exact) < 0.01 * np.linalg.norm(exact)


@pytest.mark.parametrize(("payload", "width", "size"), [("int8", 7168, 7176), ("float", 7168, 14340)])
def test_a_step_has_two_collectives_and_they_carry_what_the_formula_says(payload, width, size):
    mesh, how, t = make_mesh(2, 4), Ranks(payload=payload), 4
    shape = lambda *dims, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(dims, dtype)  # noqa: E731

    def step(x_td, slots_tk, weights_tk):
        came, handle = dispatch(x_td, slots_tk, 2, how)
        rows_id = came.rows_id if payload == "float" else dequantize(came.rows_id, x_td.dtype)
        return combine(rows_id, weights_tk, handle, how)

    spec = P(AXES)
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)
    given = shape(8 * t, width), shape(8 * t, 3, dtype=jnp.int32), shape(8 * t, 3, dtype=jnp.float32)
    compiled = jax.jit(mapped).lower(*given).compile()
    assert kinds(compiled) == {"all-to-all": 2}
    there, back = collectives(compiled)
    rows = 8 * capacity(t, 3, 2)
    assert message_bytes(width, payload) == size
    assert (there.dtype, there.values) == ("u8", rows * size)
    assert (back.dtype, back.values) == ("u16", rows * width)
    assert buffer_bytes(8, t, 3, 2, size) == there.values


def test_int8_takes_about_half_the_bytes_and_no_more_than_the_papers_message():
    assert message_bytes(7168, "int8") <= 7680
    assert message_bytes(7168, "float", itemsize=2) == 14336 + 4


def test_buffers_of_the_supernode_are_as_large_as_the_paper_says():
    assert capacity(96, 8, 1) == 96
    mebibytes = [buffer_bytes(320, 96, 8, 1, message) / 2**20 for message in (7680, 14336)]
    assert mebibytes == [225, 420]


def test_no_routing_compiles_anything_anew():
    mesh, rng = make_mesh(1, 8), np.random.default_rng(0)
    spec = P(AXES)
    traced = []

    def body(*given):
        traced.append(given)
        return visit(*given, how=FLAT)

    mapped = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=(spec,) * 4, out_specs=spec, check_vma=False))
    x_td, (_, weights_tk), w_xdd = inputs(), routing("any", 16), experts(16)
    for _ in range(50):
        slots_tk = np.array([rng.permutation(17)[:CHOICES] for _ in range(len(x_td))], np.int32)
        np.testing.assert_allclose(
            mapped(x_td, slots_tk, weights_tk, w_xdd), loop(x_td, slots_tk, weights_tk, w_xdd), atol=1e-5
        )
    assert len(traced) == 1


def test_arrays_of_several_dtypes_are_one_message_of_their_bytes():
    rng = np.random.default_rng(6)
    wide = jnp.asarray(rng.normal(size=(5, 2, 3)), jnp.bfloat16)
    tree = {
        "codes": jnp.asarray(rng.integers(-127, 128, (5, 7)), jnp.int8),
        "scale": jnp.full((5, 1), -0.0),
        "wide": wide,
    }
    message = pack(tree)
    assert (message.shape, message.dtype) == ((5, 7 + 4 + 12), jnp.uint8)
    found = unpack(jnp.concatenate([message, message[:2]]), tree)
    for name, array in tree.items():
        assert found[name].dtype == array.dtype
        assert np.asarray(found[name]).tobytes() == np.concatenate([array, array[:2]]).tobytes()


def test_members_of_a_group_are_numbered_in_order():
    place, count = rank_in_group(jnp.array([2, 0, 2, 3, 1, 2, 0]), 3)
    assert place.tolist()[:3] == [0, 0, 1] and place.tolist()[4:] == [0, 2, 1]
    assert count.tolist() == [2, 1, 3]


def test_a_payload_that_is_not_there_is_named():
    how = Ranks(payload="int4")  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match="payload 'int4' of dispatch; there are: int8, float"):
        on_mesh(make_mesh(2, 4), lambda x, s: dispatch(x, s, 1, how)[0].slots_i, inputs(), routing("any", 8)[0])
