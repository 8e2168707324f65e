"""JAX's persistent compilation cache: a program is compiled once on a machine."""

import os
import tempfile
from pathlib import Path

import jax


def enable_cache() -> str | None:
    """Keeps compiled programs in the user's cache folder, unless another was chosen for JAX, or none.

    Returns why it can't, if so: JAX itself would find out again with every program.
    """
    if jax.config.jax_compilation_cache_dir is not None or not jax.config.jax_enable_compilation_cache:
        return None
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxserve" / "jax"
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, RuntimeError) as error:  # a user need not have a home
        return str(error)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", 2**32)  # with a limit, processes that share it take turns
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    return None
