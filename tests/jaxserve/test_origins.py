import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve import origins
from jaxserve.layers.config import Config
from jaxserve.origins import lowered_origin, origin, processor, source
from jaxserve.parallel.mesh import AXES, make_mesh
from jaxserve.parallel.ranks import Ranks
from jaxserve.slots import mark
from jaxserve.spmd import Call
from jaxserve.steps import decode

CFG = Config.tiny("deepseek_v3")


def call(shape=(4, 2), dtype=jnp.float32, **other) -> Call:
    given = (jnp.zeros(shape, dtype), (jnp.zeros(3),))
    return Call(decode, None, Ranks(), given, {"cfg": CFG, "drafts": 0})._replace(**other)


def over(mesh: Mesh, *spec: str) -> Call:
    return call(mesh=mesh, given=(jax.device_put(np.zeros((8, 8)), NamedSharding(mesh, PartitionSpec(*spec))),))


DEVICES = jax.devices()
REVERSED = Mesh(make_mesh(2, 4).devices[::-1], AXES, axis_types=make_mesh(2, 4).axis_types)
CALLS = {
    "as it is": call(),
    "program": call(program=mark),
    "shape": call((2, 4)),
    "dtype": call(dtype=jnp.int32),
    "tree": call(given=tuple(jax.tree.leaves(call().given))),
    "device": call(given=jax.device_put(call().given, DEVICES[1])),
    "drafts": call(static={"cfg": CFG, "drafts": 1}),
    "config": call(static={"cfg": Config.tiny("deepseek_v3", rms_norm_eps=1e-4), "drafts": 0}),
    "ranks": call(ranks=Ranks(payload="int8")),
    "mesh": over(make_mesh(2, 4)),
    "another mesh": over(make_mesh(4, 2)),
    "another order": over(REVERSED),
    "placement": over(make_mesh(2, 4), "die"),
}


def test_each_thing_that_a_program_comes_from_is_told_apart():
    assert len({origin(each, None) for each in CALLS.values()}) == len(CALLS)


def test_what_is_the_same_has_the_same_origin_whatever_the_arrays_hold():
    assert origin(call(), None) == origin(call(given=jax.tree.map(lambda x: x + 1, call().given)), None)


@pytest.mark.parametrize(
    ("name", "value"), [("jax_default_matmul_precision", "highest"), ("jax_numpy_rank_promotion", "warn")]
)
def test_what_is_set_for_jax_is_told_apart(name, value):
    before, found = getattr(jax.config, name), origin(call(), None)
    jax.config.update(name, value)
    try:
        assert origin(call(), None) != found
    finally:
        jax.config.update(name, before)
    assert origin(call(), None) == found


def test_where_jax_s_cache_is_makes_no_difference(tmp_path):
    before, found = jax.config.jax_compilation_cache_dir, origin(call(), None)
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    try:
        assert origin(call(), None) == found
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_options_flags_versions_and_machines_are_told_apart(monkeypatch):
    found = [origin(call(), options) for options in (None, {"a": 1}, {"a": 2})]
    changes = [
        lambda: monkeypatch.setenv("XLA_FLAGS", "--something"),
        lambda: monkeypatch.setattr(jax, "__version__", "0.0"),
        lambda: monkeypatch.setattr(origins, "__version__", "0.0"),
        lambda: monkeypatch.setattr(origins, "OVERLAP", {}),
        lambda: monkeypatch.setattr(origins, "processor", lambda: "another"),
        lambda: monkeypatch.setattr(origins, "source", lambda *_: "another"),
    ]
    for change in changes:
        change()
        found.append(origin(call(), None))
    assert len(set(found)) == 3 + len(changes)


def test_a_lowered_program_is_told_by_itself_and_not_by_its_source(monkeypatch):
    which = call()
    one, same, other = (jax.jit(lambda x, by=by: x + by).trace(1.0) for by in (1, 1, 2))
    told = lambda traced, options=None: lowered_origin(which, traced, traced.lower(), options)  # noqa: E731
    found = told(one)
    monkeypatch.setattr(origins, "source", lambda *_: "another")
    assert told(same) == found
    assert told(other) != found
    assert told(one, {"a": 1}) != found


@pytest.fixture
def package(tmp_path) -> Path:
    for part in ("layers", "layers/more", "parallel", "bench"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "one.py").write_text("one = 1\n")
    (tmp_path / "steps.py").write_text("steps = 1\n")
    return tmp_path


@pytest.mark.parametrize("file", ["steps.py", "layers/one.py", "layers/more/one.py", "parallel/one.py"])
def test_source_that_is_changed_moved_or_added_is_told_apart(package, file):
    later = time.time() + 1000
    found = [source(package, later)]
    (package / file).write_text("other = 1\n")
    found.append(source(package, later + 1))
    (package / file).rename(package / file.replace(".", "s."))
    found.append(source(package, later + 2))
    (package / file).touch()
    found.append(source(package, later + 3))
    assert len(set(found)) == 4


def test_what_no_program_is_traced_of_makes_no_difference(package):
    later = time.time() + 1000
    found = source(package, later)
    (package / "bench" / "one.py").write_text("other = 1\n")
    assert source(package, later + 1) == found


def test_source_that_has_changed_since_the_process_began_is_not_what_runs(package, monkeypatch):
    began = time.time()
    assert source(package, began) is not None
    time.sleep(0.05)  # a file system's clock may be some milliseconds late
    (package / "steps.py").touch()
    assert source(package, began) is None
    monkeypatch.setattr(origins, "source", lambda *_: None)
    assert origin(call(), None) is None


def test_without_source_there_is_no_origin(tmp_path):
    assert source(tmp_path, time.time() + 1000) is None


def test_our_own_source_is_found():
    later = time.time() + 1000
    found = source(origins.SOURCE, later)
    assert found is not None
    assert source(Path(os.path.realpath(origins.SOURCE)), later) == found


def test_where_a_host_does_not_say_what_it_can_do_programs_are_its_own(monkeypatch):
    def absent(_):
        raise FileNotFoundError

    told = processor()
    monkeypatch.setattr(Path, "read_text", absent)
    alone = processor.__wrapped__()
    assert alone != told
    assert os.uname().nodename in alone
