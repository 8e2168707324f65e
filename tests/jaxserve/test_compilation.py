from pathlib import Path

import jax
import pytest

from jaxserve.compilation import OVERLAP, enable_cache, executables_folder

OPTIONS = (
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_enable_compilation_cache",
    "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture(autouse=True)
def no_cache_chosen():
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_programs_are_kept_in_the_user_s_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert enable_cache() is None
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "jaxserve" / "jax")
    assert list((tmp_path / "jaxserve" / "jax").iterdir()) == []
    assert jax.config.jax_persistent_cache_min_compile_time_secs > 0


def test_without_a_cache_folder_it_is_below_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    enable_cache()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / ".cache" / "jaxserve" / "jax")


def test_a_folder_that_can_not_be_written_is_told_and_not_used(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert str(tmp_path / "file") in (enable_cache() or "")
    assert jax.config.jax_compilation_cache_dir is None


def test_a_user_without_a_home_is_told(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert enable_cache() == "Could not determine home directory."


def test_the_choice_made_for_jax_is_left(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", "/chosen")
    assert enable_cache() is None
    assert jax.config.jax_compilation_cache_dir == "/chosen"
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", False)
    assert enable_cache() is None
    assert list(tmp_path.iterdir()) == []


def test_executables_are_kept_in_the_folder_of_the_cache_where_that_is_in_use():
    assert executables_folder() is None
    jax.config.update("jax_compilation_cache_dir", "/chosen")
    assert executables_folder() == Path("/chosen/executables")
    jax.config.update("jax_enable_compilation_cache", False)
    assert executables_folder() is None
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", "gs://bucket/cache")
    assert executables_folder() is None


def test_processes_that_share_a_mesh_keep_no_executables(monkeypatch):
    jax.config.update("jax_compilation_cache_dir", "/chosen")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert executables_folder() is None


def test_xla_knows_the_options_for_gpus():
    """All platforms whose source is open have the same ones, and refuse a name that is none."""

    def compile_with(**options):
        return jax.jit(lambda x: x + 1, compiler_options=options).lower(1.0).compile()

    compile_with(**OVERLAP["gpu"])
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        compile_with(xla_gpu_enable_nothing=True)
