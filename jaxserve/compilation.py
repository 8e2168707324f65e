"""JAX's persistent compilation cache, on by default: a program is compiled once on a machine."""

import os
from pathlib import Path

import jax


def enable_cache() -> None:
    """Keeps compiled programs in the user's cache folder, unless another was chosen for JAX."""
    if jax.config.jax_compilation_cache_dir is not None:
        return
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(home / "jaxserve" / "jax"))
    jax.config.update("jax_compilation_cache_max_size", 2**32)  # with a limit, processes that share it take turns
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
