"""Every test runs strict and on eight emulated devices."""

import functools
import gc
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

# Inherited by the processes that tests start.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XDG_CACHE_HOME"] = str(Path(__file__).parents[1] / ".cache")  # not the user's
# Before NumPy is loaded: OpenBLAS's threads spin while they wait, and those of two workers stop each other.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import hypothesis
import jax
import jaxtyping
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# A repeated run compiles nothing that takes long. Only with a size limit does JAX lock the cache, which the workers of
# xdist share; and then it looks at all entries to add one, so small programs stay out.
jax.config.update("jax_compilation_cache_dir", os.path.join(os.environ["XDG_CACHE_HOME"], "jax"))
jax.config.update("jax_compilation_cache_max_size", 2**30)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# Before anything imports jaxserve: modules that are loaded already are not checked. The host's side checks what it is
# given by itself, with messages for people, and is tested with values of wrong types.
NUMERIC = ["jaxserve.parallel", "jaxserve.layers", "jaxserve.checkpoints", "jaxserve.steps"]
jaxtyping.install_import_hook(NUMERIC, "beartype.beartype")

# The first example compiles, the others do not: a deadline would call that flaky.
hypothesis.settings.register_profile("jaxserve", deadline=None)
hypothesis.settings.load_profile("jaxserve")


MAPPINGS = 30_000
CACHED = type(functools.cache(lambda: None))


@pytest.fixture(autouse=True)
def optimization(request: pytest.FixtureRequest) -> Iterator[None]:
    """The engine's programs are those of users. Others run once or twice, and to optimize them would take longer."""
    folder = request.path.relative_to(Path(__file__).parent).parts[0]
    jax.config.update("jax_disable_most_optimizations", folder != "jaxserve")
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True, scope="module")
def few_mappings() -> Iterator[None]:
    """Lets go of compiled programs before the process has 65,530 mappings, all that Linux grants it: some for each.

    Most belong to engines that tests of several modules share, in caches of functools: they are made anew.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > MAPPINGS:
        for each in gc.get_objects():
            if isinstance(each, CACHED) and each.__module__.startswith("tests."):
                each.cache_clear()
        jax.clear_caches()
        gc.collect()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests of a module run in one process, which compiles once for all, unless they belong to another group."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.module.__name__))


@pytest.fixture
def key(request: pytest.FixtureRequest) -> jax.Array:
    """A random key that depends on nothing but the test's name (with its parameters)."""
    return jax.random.key(zlib.crc32(request.node.name.encode()))
