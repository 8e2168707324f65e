import functools
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve import executables as subject
from jaxserve.executables import Executables
from jaxserve.packing import Packer
from jaxserve.parallel.devices import Devices
from jaxserve.parallel.mesh import make_mesh
from jaxserve.parallel.ranks import Ranks
from jaxserve.programs import Programs
from jaxserve.slots import empty, mark
from jaxserve.spmd import Call
from tests.waiting import SOON

OPTIONS = {"xla_cpu_prefer_vector_width": 512}


@functools.partial(jax.jit, static_argnames="factor", donate_argnums=0)
def scale(x, y, *, factor):
    return x * factor + jnp.sin(y)


def call(factor=3, size=8, program=scale) -> Call:
    x, y = np.arange(size, dtype=np.float32), np.ones(size, np.float32)
    return Call(program, None, Ranks(), tuple(jax.device_put((x, y))), {"factor": factor})


EXPECTED = 3 * np.arange(8) + np.sin(1)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Nothing is found in JAX's cache, and everything may be kept."""
    monkeypatch.setattr(subject, "_compile", lambda lowered, options: (lowered.compile(options), True))
    return tmp_path / "executables"


def compile_new(kept: Executables, which: Call, options=OPTIONS):
    program = kept.program(which, options)
    assert program.load() is None
    return program.lower()()


def load(folder: Path | None, which: Call) -> Any:
    return Executables(folder).program(which, OPTIONS).load()


def entries(folder: Path) -> list[Path]:
    """The largest is the program."""
    return sorted(folder.iterdir(), key=lambda file: file.stat().st_size)


def test_what_one_has_compiled_another_loads_and_it_takes_over_what_is_donated(folder):
    compile_new(Executables(folder), call())
    program: Any = load(folder, call())
    given = call().given
    np.testing.assert_allclose(program(*given), EXPECTED, rtol=1e-6)
    assert [x.is_deleted() for x in given] == [True, False]


@pytest.mark.parametrize(("wait", "count"), [(60.0, 1), (0.1, 2)])
def test_of_several_that_want_the_same_at_once_one_compiles_and_the_others_wait_but_not_for_ever(
    folder, monkeypatch, wait, count
):
    began, go, done = threading.Semaphore(0), threading.Event(), []

    def slow(lowered, options):
        began.release()
        assert go.wait(SOON)
        return lowered.compile(options), True

    monkeypatch.setattr(subject, "_compile", slow)
    monkeypatch.setattr(subject, "WAIT", wait)
    makers = [Executables(folder).program(call(), OPTIONS).lower() for _ in range(2)]
    threads = [threading.Thread(target=lambda make=make: done.append(make())) for make in makers]
    for thread in threads:
        thread.start()
    assert all(began.acquire(timeout=SOON) for _ in range(count))
    assert not began.acquire(timeout=0.5)  # nobody else begins
    go.set()
    for thread in threads:
        thread.join(SOON)
    for program in done:
        np.testing.assert_allclose(program(*call().given), EXPECTED, rtol=1e-6)
    assert len(done) == 2 and not began.acquire(blocking=False)


CHILD = """
import sys
from jaxserve import LLM, SamplingParams
from jaxserve.spmd import Call
lowered, trace = [], Call.trace
Call.trace = lambda call: lowered.append(call) or trace(call)
llm = LLM(sys.argv[1], max_model_len=32, max_num_batched_tokens=16, max_num_seqs=1)
tokens = llm.generate([[3, 5]], SamplingParams(temperature=0, max_tokens=4))[0].outputs[0].token_ids
print(len(lowered), llm.engine.counters.compiled, llm.engine.counters.late_compiled, *tokens)
"""


def start(model: Path, cache: Path) -> list[int]:
    """A process that loads a model and generates: programs lowered, compiled, compiled late, and tokens."""
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    ended = subprocess.run(
        [sys.executable, "-c", CHILD, str(model)], env=environment, capture_output=True, text=True, check=True
    )
    return [int(word) for word in ended.stdout.split()]


def test_a_model_s_second_start_lowers_nothing_and_gives_the_same_tokens(tiny_folder, tmp_path):
    lowered, compiled, late, *tokens = start(tiny_folder, tmp_path)
    assert (lowered, late, len(tokens)) == (compiled, 0, 4)
    assert start(tiny_folder, tmp_path) == [0, compiled, 0, *tokens]
    for file in entries(tmp_path / "jaxserve" / "jax" / "executables"):
        file.write_bytes(b"damaged")
    assert start(tiny_folder, tmp_path) == [compiled, compiled, 0, *tokens]


@pytest.mark.parametrize("damage", [b"", b"short", None])
@pytest.mark.parametrize("which", [0, 1])
def test_what_is_damaged_is_dropped_and_compiled_anew(folder, which, damage):
    compile_new(Executables(folder), call())
    file = entries(folder)[which]
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]) if damage is None else damage)
    np.testing.assert_allclose(compile_new(Executables(folder), call())(*call().given), EXPECTED, rtol=1e-6)
    assert load(folder, call()) is not None


def test_what_is_whole_but_no_program_is_dropped(folder):
    kept = Executables(folder)
    compile_new(kept, call())
    kept._write(entries(folder)[-1].name, b"no program")
    compile_new(kept, call())
    assert load(folder, call()) is not None


def test_a_program_that_is_lowered_to_the_same_is_not_compiled_again(folder, monkeypatch):
    compile_new(Executables(folder), call())
    monkeypatch.setattr(subject, "origin", lambda call, options: "another source")
    monkeypatch.setattr(subject, "_compile", None)
    program = compile_new(Executables(folder), call())
    np.testing.assert_allclose(program(*call().given), EXPECTED, rtol=1e-6)
    assert load(folder, call()) is not None


def test_a_program_whose_source_can_not_be_told_is_found_when_it_is_lowered(folder, monkeypatch):
    monkeypatch.setattr(subject, "origin", lambda call, options: None)
    compile_new(Executables(folder), call())
    monkeypatch.setattr(subject, "_compile", None)
    compile_new(Executables(folder), call())
    assert len(entries(folder)) == 1


def test_without_a_folder_programs_are_lowered_as_jax_does_it():
    np.testing.assert_allclose(compile_new(Executables(), call())(*call().given), EXPECTED, rtol=1e-6)


def test_a_folder_is_the_user_s_alone(folder):
    Executables(folder)
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_folder_that_others_can_write_to_is_not_used(folder, mode):
    compile_new(Executables(folder), call())
    before = entries(folder)
    folder.chmod(mode)
    compile_new(Executables(folder), call())
    compile_new(Executables(folder), call(factor=4))
    assert entries(folder) == before


def test_a_folder_of_somebody_else_is_not_used(folder, monkeypatch):
    compile_new(Executables(folder), call())
    monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    assert load(folder, call()) is None


def test_a_folder_that_others_can_replace_is_not_used(folder):
    folder.parent.chmod(0o777)
    compile_new(Executables(folder), call())
    compile_new(Executables(folder), call())
    folder.parent.chmod(0o1777)  # as of /tmp
    compile_new(Executables(folder), call())
    assert load(folder, call()) is not None


def test_what_is_set_in_a_thread_alone_is_told_apart(folder):
    with jax.default_matmul_precision("highest"):
        compile_new(Executables(folder), call())
    compile_new(Executables(folder), call())
    with jax.default_matmul_precision("highest"):
        assert load(folder, call()) is not None


@jax.jit
def first(x, y):
    return x + 1


@jax.jit
def second(x, y):
    return y + 1


def test_programs_that_take_one_of_two_arguments_each_are_told_apart(folder, monkeypatch):
    """Lowered they are the same, for what isn't used is left out."""
    monkeypatch.setattr(subject, "origin", lambda call, options: None)
    monkeypatch.setattr(second.__wrapped__, "__name__", "first")
    compiled = [
        compile_new(Executables(folder), call(program=program)._replace(static={})) for program in (first, second)
    ]
    given = call().given
    assert [float(program(*given)[0]) for program in compiled] == [1.0, 2.0]


def test_a_folder_that_can_not_be_made_is_not_used(tmp_path):
    (tmp_path / "file").touch()
    compile_new(Executables(tmp_path / "file" / "executables"), call())


def test_a_disk_that_is_full_is_no_obstacle(folder, monkeypatch):
    def full(file, mode):
        os.close(file)
        raise OSError("No space left on device")

    kept = Executables(folder)
    monkeypatch.setattr(subject.os, "fdopen", full)
    np.testing.assert_allclose(compile_new(kept, call())(*call().given), EXPECTED, rtol=1e-6)
    assert entries(folder) == []


def test_what_was_not_used_for_longest_makes_room(folder):
    for age, factor in ((30, 3), (20, 4), (10, 5)):
        before = set(entries(folder)) if folder.exists() else set()
        compile_new(Executables(folder), call(factor))
        for file in set(entries(folder)) - before:
            os.utime(file, (file.stat().st_atime, file.stat().st_mtime - age))
    assert load(folder, call(3)) is not None  # is used
    room = sum(file.stat().st_size for file in entries(folder))
    compile_new(Executables(folder, limit=room), call(6))
    there = [load(folder, call(factor)) is not None for factor in (3, 4, 5, 6)]
    assert there[0] and there[3] and not there[1]
    assert sum(file.stat().st_size for file in entries(folder)) <= room


def test_what_jax_has_loaded_from_its_cache_is_not_kept(tmp_path):
    """Serialized again it would lack functions, and fail when it runs."""
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    try:
        unique = int.from_bytes(os.urandom(3), "big")  # JAX's cache stays from one run of tests to the next
        lowered = [jax.jit(lambda x: jnp.sin(x) * unique).lower(1.0) for _ in range(2)]
        found = [subject._compile(each, None)[1] for each in lowered]
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before)
    assert found == [True, False]


def test_programs_of_a_mesh_are_loaded_for_its_devices(folder):
    mesh = make_mesh(2, 4)
    devices = Devices(mesh)
    slots = devices.make(lambda: empty(16, 0, 7))
    which = Call(mark, mesh, Ranks(), (slots, *Packer(0, 7, 2, devices).marks()))
    wanted = jax.device_get(which.lower().compile()(devices.make(lambda: empty(16, 0, 7)), *which.given[1:]))
    compile_new(Executables(folder), which)
    program: Any = load(folder, which)
    found = program(*which.given)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), wanted)
    assert load(folder, which._replace(mesh=None)) is None


def test_programs_are_loaded_where_they_are_kept_and_compiled_where_not(folder):
    lowered = []

    class Counted(Call):
        def trace(self):
            lowered.append(self.static["factor"])
            return super().trace()

    calls = {number: Counted(*call(number)) for number in (3, 4, 5)}
    Programs(calls.__getitem__, Executables(folder)).compile([3, 4])
    told, programs = [], Programs(calls.__getitem__, Executables(folder))
    programs.compile([3, 4, 5], lambda *progress: told.append(progress))
    assert (lowered, len(programs), programs.late, told[-1]) == ([3, 4, 5], 3, 0, (3, 3))
    late = Programs(calls.__getitem__, Executables(folder))
    np.testing.assert_allclose(late[3](*call().given), EXPECTED, rtol=1e-6)
    assert (lowered, late.late) == ([3, 4, 5], 1)
