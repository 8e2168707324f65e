import jax
import numpy as np
import pytest

from jaxserve import LLM, RequestError, footprint
from jaxserve.describe import human
from jaxserve.footprint import check_room, device_bytes
from jaxserve.layers.config import Config
from jaxserve.layers.int8 import in_int8
from jaxserve.layers.transformer import model_params
from jaxserve.options import EngineConfig
from jaxserve.parallel.errors import ShardingError
from jaxserve.parallel.mesh import make_mesh
from jaxserve.tracing import describe

CFG = Config.tiny("deepseek_v3", n_routed_experts=64)


def need(options: EngineConfig, mesh=None) -> footprint.Footprint:
    return footprint.footprint(describe(CFG, options, np.float32, mesh))


@pytest.fixture
def device_of(monkeypatch):
    """Has devices hold so many bytes."""
    return lambda size: monkeypatch.setattr(footprint, "device_bytes", lambda mesh: size)


def test_a_mesh_splits_the_experts_and_each_rank_has_a_cache_of_its_own():
    alone, spread = need(EngineConfig()), need(EngineConfig(), make_mesh(2, 4))
    assert spread.weights < alone.weights / 2
    assert spread.cache == alone.cache
    assert alone.total == alone.weights + alone.cache + alone.slots


def test_what_fits_is_served_and_a_byte_less_is_refused_with_the_options_that_help(device_of):
    options = EngineConfig(max_num_seqs=32)
    wanted = need(options)
    device_of(wanted.total)
    check_room(CFG, options, np.float32, None)
    device_of(wanted.total - 1)
    with pytest.raises(RequestError) as caught:
        check_room(CFG, options, np.float32, None)
    for word in (human(wanted.total), human(wanted.cache), "Lower max_num_seqs, num_pages or cache_bytes", "mesh"):
        assert word in str(caught.value)
    check_room(CFG, EngineConfig(max_num_seqs=1), np.float32, None)
    check_room(CFG, options, np.float32, make_mesh(2, 4))


def test_weights_in_int8_need_less(device_of):
    params = in_int8(model_params(CFG))
    device_of(need(EngineConfig()).total - 1)
    with pytest.raises(RequestError):
        check_room(CFG, EngineConfig(), np.float32, None)
    check_room(CFG, EngineConfig(), np.float32, None, params)
    found = footprint.footprint(describe(CFG, EngineConfig(), np.float32, None, params))
    assert found.weights == sum(param.nbytes for param in jax.tree.leaves(params))


def test_weights_that_do_not_fit_alone_ask_for_another_mesh_or_dtype(device_of):
    device_of(need(EngineConfig()).weights - 1)
    with pytest.raises(ShardingError, match="the weights alone do not fit. Take a larger mesh, .* fewer bits"):
        check_room(CFG, EngineConfig(), np.float32, None)
    with pytest.raises(ShardingError, match="Take a device with more memory, a dtype of fewer bits, or quant"):
        device_of(10)
        check_room(Config.tiny("qwen3"), EngineConfig(), np.float32, None)


@pytest.mark.parametrize("mesh", [None, "2x4"])
def test_a_model_that_does_not_fit_is_not_loaded(tiny_folder, monkeypatch, device_of, mesh):
    monkeypatch.setattr("jaxserve.checkpoints.hf.Checkpoint.read", lambda *_, **__: pytest.fail("weights were read"))
    device_of(1 << 20)
    with pytest.raises(RequestError, match="each device needs .* and has 1 MiB"):
        LLM(tiny_folder, mesh=mesh)


class Device:
    def __init__(self, stats):
        self.memory_stats = lambda: stats


@pytest.mark.parametrize(
    ("stats", "limit"),
    [([None], None), ([{}], None), ([{"bytes_limit": 7}], 7), ([{"bytes_limit": 7}, {"bytes_limit": 5}], 5)],
)
def test_the_smallest_device_counts_and_one_that_does_not_say_is_not_asked(monkeypatch, stats, limit):
    class Mesh:
        local_devices = [Device(one) for one in stats]

    assert device_bytes(Mesh()) == limit
    monkeypatch.setattr(jax, "local_devices", lambda: Mesh.local_devices)
    assert device_bytes(None) == (stats[0] or {}).get("bytes_limit")


def test_the_cpu_does_not_say():
    assert device_bytes(None) is None and device_bytes(make_mesh(2, 4)) is None
