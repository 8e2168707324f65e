"""How XLA compiles programs: once on a machine, and such that exchanges overlap with what doesn't wait for them."""

import os
import tempfile
from pathlib import Path

import jax

OPTIONS = {"cpu": {"xla_cpu_prefer_vector_width": 512}}
"""By platform, XLA's options for all programs. By default it makes vectors half as wide as the widest there may be."""

OVERLAP = {
    # The first from https://docs.jax.dev/en/latest/gpu_performance_tips.html. Without the others, XLA would make one
    # product of two with the same weight, and one collective of two small ones: it would wait for both microbatches.
    "gpu": {
        "xla_gpu_enable_latency_hiding_scheduler": True,
        "xla_gpu_dot_merger_threshold_mb": 0,
        "xla_gpu_all_gather_combine_threshold_bytes": 0,
        "xla_gpu_all_reduce_combine_threshold_bytes": 0,
    },
    # As JAX's own tests and https://github.com/apple/axlearn compiler_options.py give them.
    "tpu": {"xla_tpu_enable_latency_hiding_scheduler": "true", "xla_tpu_enable_async_all_to_all": "true"},
}
"""By platform, XLA's options for programs whose exchanges are to run beside computations."""


def executables_folder() -> Path | None:
    """Where programs are kept as they run: in the folder of JAX's cache, where that is one, and in use.

    None where processes share a mesh: each would have to find the same there as the others.
    """
    folder = jax.config.jax_compilation_cache_dir
    if not (folder and jax.config.jax_enable_compilation_cache) or "://" in folder or jax.process_count() > 1:
        return None
    return Path(folder) / "executables"


def cache_folder() -> Path:
    """Where what can be made again is kept for the user. Raises RuntimeError if there is no home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxserve"


def enable_cache() -> str | None:
    """Keeps compiled programs in the user's cache folder, unless another was chosen for JAX, or none.

    Returns why it can't, if so: JAX itself would find out again with every program.
    """
    if jax.config.jax_compilation_cache_dir is not None or not jax.config.jax_enable_compilation_cache:
        return None
    try:
        folder = cache_folder() / "jax"
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, RuntimeError) as error:  # a user need not have a home
        return str(error)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", 2**32)  # with a limit, processes that share it take turns
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    return None
