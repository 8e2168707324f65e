import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from jaxserve.layers.config import Config
from jaxserve.layers.transformer import cache_params, model_params
from jaxserve.parallel.devices import Devices
from jaxserve.parallel.errors import ShardingError
from jaxserve.parallel.mesh import AXES
from jaxserve.parallel.qarray import QArray, quantize_rows
from jaxserve.parallel.sharding import (
    DECODE,
    PREFILL,
    Param,
    abstract,
    bytes_per_device,
    initialize,
    local_bytes,
    named_sharding,
    quantized,
    shardings,
    unsplit,
    zeros,
)
from tests.layers.helpers import FAMILIES, empty

PARAM = Param((16, 6), ("e", "d"))


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()).reshape(2, 4), ("node", "die"))


def test_rows_are_split_over_the_ranks_in_order_and_the_rest_is_everywhere(mesh):
    devices = Devices(mesh)
    rows, made = devices.split(np.arange(16)), devices.make(lambda: jnp.zeros((8, 3)))
    assert [part.data.tolist() for part in rows.addressable_shards] == [[2 * i, 2 * i + 1] for i in range(8)]
    assert made.sharding.is_equivalent_to(rows.sharding, 2)
    assert devices.same(np.arange(3)).is_fully_replicated
    assert devices.count == 8


def test_without_devices_arrays_are_described_as_they_would_be_placed(mesh):
    real, described = Devices(mesh), Devices(mesh.abstract_mesh)
    for use in (
        lambda devices: devices.split({"rows": np.arange(16)}),
        lambda devices: devices.same(np.ones((2, 3), np.float32)),
        lambda devices: devices.make(lambda: jnp.zeros((8, 3), jnp.bfloat16)),
    ):
        for array, said in zip(jax.tree.leaves(use(real)), jax.tree.leaves(use(described)), strict=True):
            assert isinstance(said, jax.ShapeDtypeStruct)
            assert (said.shape, said.sharding.spec) == (array.shape, array.sharding.spec)
            assert jnp.dtype(said.dtype).itemsize >= array.dtype.itemsize  # JAX makes 32 bits of NumPy's 64
    assert described.count == 8


def test_without_a_mesh_all_is_on_one_device():
    devices = Devices()
    arrays = devices.split(np.arange(3)), devices.same(np.arange(3)), devices.make(lambda: jnp.zeros(3))
    assert devices.count == 1
    assert {len(array.devices()) for array in arrays} == {1}


def test_a_param_knows_its_size():
    param = Param((3, 4), ("e", None), jnp.bfloat16)
    assert (param.size, param.nbytes) == (12, 24)
    assert Param((), ()).size == 1


@pytest.mark.parametrize(("shape", "axes"), [((3, 4), ("e",)), ((3,), ("e", "d")), ((), ("e",))])
def test_a_param_has_a_name_for_each_of_its_axes(shape, axes):
    with pytest.raises(ShardingError, match=rf"has {len(shape)} axes.* name {len(axes)}"):
        Param(shape, axes)


@pytest.mark.parametrize(
    ("rules", "spec"),
    [
        ({}, (None, None)),
        ({"e": "die"}, ("die", None)),
        ({"e": ("node", "die")}, (("node", "die"), None)),
        ({"e": "die", "d": "node", "h": "die"}, ("die", "node")),
        ({"e": ()}, ((), None)),
    ],
)
def test_the_rules_place_each_logical_axis(mesh, rules, spec):
    sharding = named_sharding("w", PARAM, mesh, rules)
    parts = PartitionSpec(*(entry or None for entry in spec))
    assert sharding.is_equivalent_to(jax.sharding.NamedSharding(mesh, parts), 2)


def test_an_axis_without_a_letter_is_never_split(mesh):
    assert named_sharding("w", Param((8,), (None,)), mesh, {"e": "die"}).is_fully_replicated


@pytest.mark.parametrize(
    ("param", "rules", "named"),
    [
        (Param((6, 8), ("e", "d")), {"e": "die"}, "blocks.w: axis 'e' of size 6 .* the 4 devices of die"),
        (Param((8, 12), ("e", "d")), {"d": ("node", "die")}, "blocks.w: axis 'd' of size 12 .* the 8 devices of"),
        (Param((8, 8), ("e", "d")), {"e": "die", "d": "die"}, "blocks.w: .*'e', 'd'.* twice"),
        (Param((8, 8), ("e", "d")), {"e": ("node", "die"), "d": "node"}, "blocks.w: .* twice"),
        (Param((8, 8), ("e", "e")), {"e": "die"}, "blocks.w: .* twice"),
    ],
)
def test_a_placement_that_cannot_be_names_the_array_and_the_axis(mesh, param, rules, named):
    with pytest.raises(ShardingError, match=named):
        named_sharding("blocks.w", param, mesh, rules)


def test_errors_in_a_tree_name_the_path(mesh):
    params = model_params(Config.tiny("qwen3"))
    with pytest.raises(ShardingError, match=r"\.layers\[0\]\.attn\.w_k: axis 'g' of size 2"):
        shardings(params, mesh, {"g": "die"})


RULES = {"e": ("node", "die"), "h": "die", "g": "die", "u": "node", "p": "node"}
PARTS = {"e": 8, "h": 4, "g": 4, "u": 2, "p": 2}
SIZES = {"vocab_size": 96, "num_attention_heads": 8, "num_key_value_heads": 4}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rules_place_a_tiny_model_and_its_cache_on_eight_devices(mesh, family):
    cfg = Config.tiny(family, **SIZES)
    params = model_params(cfg), cache_params(cfg, pages=4, page_size=2)
    placed = jax.device_put(empty(params), shardings(params, mesh, RULES))
    for param, array in zip(jax.tree.leaves(params), jax.tree.leaves(placed), strict=True):
        expected = tuple(n // PARTS.get(axis, 1) for n, axis in zip(param.shape, param.axes, strict=True))
        assert {shard.data.shape for shard in array.addressable_shards} == {expected}
        assert len({shard.device for shard in array.addressable_shards}) == 8
    held = sum(array.addressable_shards[0].data.nbytes for array in jax.tree.leaves(placed))
    assert bytes_per_device(params, mesh, RULES) == local_bytes(placed) == held
    assert bytes_per_device(params, None, RULES) == sum(param.nbytes for param in jax.tree.leaves(params))


@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_that_prefill_alone_have_a_part_of_the_heads_but_output_projections_and_modules_have_all(mesh, family):
    params = model_params(Config.tiny(family, num_attention_heads=8, num_key_value_heads=4))
    placed = shardings(params, mesh, PREFILL)
    split = [jax.tree_util.keystr(path[-1:]) for path, s in jax.tree.leaves_with_path(placed.layers) if any(s.spec)]
    assert set(split) == ({".w_q"} if "qwen" in family else {".w_uq", ".w_uk", ".w_uv"})
    assert not any(any(s.spec) for s in jax.tree.leaves(placed.mtp))
    assert not any(any(s.spec) for s in jax.tree.leaves(shardings(params, mesh, DECODE)))


def test_heads_that_do_not_divide_are_named(mesh):
    params = model_params(Config.tiny("deepseek_v3"))
    with pytest.raises(ShardingError, match=r"\.layers\[0\]\.attn\.w_uq: axis 'h' of size 3 .* the 8 devices"):
        shardings(params, mesh, PREFILL)


def test_an_axis_can_be_kept_whole():
    params = {"a": Param((8, 4), ("h", "d")), "b": Param((4,), ("d",))}
    assert unsplit(params, "h") == {"a": Param((8, 4), (None, "d")), "b": params["b"]}


@pytest.mark.parametrize("scales", [None, (1, 8, 2), (16, 8, 1)])
def test_codes_and_scales_are_placed_by_the_rules_of_the_weight(mesh, scales):
    """A scale for a whole axis goes to every part of it."""
    param, rules = Param((16, 8, 4), ("e", "f", "d"), jnp.bfloat16), {"e": AXES}
    described = quantized(param, scales)
    values = QArray(np.ones((16, 8, 4), np.int8), np.ones(described.scale.shape, np.float32))
    codes, scale = jax.device_put(values, shardings(described, mesh, rules))
    assert {part.data.shape for part in codes.addressable_shards} == {(2, 8, 4)}
    rows = scale.shape[0] // 8 or 1
    assert {part.data.shape for part in scale.addressable_shards} == {(rows, *scale.shape[1:])}
    assert bytes_per_device(described, mesh, rules) == local_bytes((codes, scale)) == 64 + 4 * rows * scale[0].size


def test_a_quantized_weight_is_described_as_it_is_made():
    made, said = quantize_rows(jnp.ones((6, 4))), quantized(Param((6, 4), ("f", "d"), jnp.bfloat16))
    assert [(a.shape, a.dtype) for a in made] == [(p.shape, jnp.dtype(p.dtype)) for p in said]
    assert [p.axes for p in said] == [("f", "d"), ("f", None)]


def test_arrays_of_all_makes_agree_with_the_params():
    params = model_params(Config.tiny("deepseek_v3", num_hidden_layers=2), jnp.bfloat16)
    trees = params, initialize(params, jax.random.key(0)), zeros(params), abstract(params)
    assert len({jax.tree.structure(tree) for tree in trees}) == 1
    for leaves in zip(*map(jax.tree.leaves, trees), strict=True):
        assert len({(leaf.shape, jnp.dtype(leaf.dtype)) for leaf in leaves}) == 1


def test_abstract_arrays_carry_the_placement(mesh):
    params = {"w": PARAM}
    placement = shardings(params, mesh, {"e": "die"})
    assert abstract(params, placement)["w"].sharding == placement["w"]
    assert abstract(params)["w"].sharding is None


def test_initial_values_have_the_mean_and_deviation_of_the_param():
    params = {"a": Param((64, 64), ("d", "f"), std=0.5), "b": Param((64, 64), ("d", "f"), mean=3.0, std=0.5)}
    values = jax.tree.map(np.asarray, initialize(params, jax.random.key(1)))
    assert values["a"].std() == pytest.approx(0.5, rel=0.05) and values["a"].mean() == pytest.approx(0, abs=0.03)
    assert values["b"].mean() == pytest.approx(3.0, abs=0.03)
    assert np.abs(values["b"] - 3.0 - values["a"]).max() > 0.1  # each array has its own key


def test_random_int8_weights_are_spread_like_those_in_floats():
    param = Param((64, 512), ("f", "d"), std=0.02)
    drawn = initialize(quantized(param), jax.random.key(2))
    codes = np.asarray(drawn.codes, np.float64)
    assert drawn.codes.dtype == np.int8 and drawn.scale.dtype == np.float32
    assert abs(codes).max() <= 127 and abs(codes).max() > 100
    assert (codes * np.asarray(drawn.scale)).std() == pytest.approx(param.std, rel=0.02)


def test_values_without_deviation_are_the_mean_and_zeros_are_zero():
    params = Param((3,), ("d",), jnp.bfloat16, mean=1.0)
    np.testing.assert_array_equal(initialize(params, jax.random.key(0)), np.ones(3))
    np.testing.assert_array_equal(zeros(params), np.zeros(3))


def test_the_same_key_gives_the_same_values():
    params = {"a": Param((4,), ("d",), std=1.0)}
    first, again, other = (initialize(params, jax.random.key(seed))["a"] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
