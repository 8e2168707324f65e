"""All that a compiled program comes from, as far as it is known before the program is traced."""

import functools
import hashlib
import os
import platform
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxserve import __version__
from jaxserve.spmd import Call

Options = Mapping[str, Any] | None
"""XLA's, for a program."""

SOURCE = Path(__file__).parent
BEGAN = time.time()


def origin(call: Call, options: Options) -> str | None:
    """A digest of the program's source, what it is for, and where it runs. None: it can't be told."""
    found = source(SOURCE, BEGAN)
    return found and digest(found, surroundings(options), describe(call), repr(sorted(call.static.items())))


def lowered_origin(call: Call, lowered: Any, options: Options) -> str:
    """The same of a lowered program, which says what came of its source."""
    return digest(surroundings(options), describe(call), lowered.as_text())


def devices_of(call: Call) -> list[Any]:
    """On which the program runs, in the order of its ranks."""
    return list(call.mesh.devices.flat) if isinstance(call.mesh, Mesh) else jax.local_devices()[:1]


def describe(call: Call) -> str:
    """Which program it is, on which devices, for arrays of which shapes, and where they lie."""
    leaves, tree = jax.tree.flatten(call.given)
    devices = [device.id for device in devices_of(call)]
    arrays = [(x.shape, x.dtype, x.weak_type, x.committed, x.sharding) for x in leaves]
    return repr((call.program.__module__, call.program.__name__, call.mesh, devices, call.ranks, tree, arrays))


def surroundings(options: Options) -> str:
    """Versions, the machine, and what is set for JAX and XLA."""
    versions = __version__, sys.version, jax.__version__, version("jaxlib"), np.__version__
    device = jax.local_devices()[0]
    devices = device.device_kind, device.client.platform_version, jax.device_count()
    config = {name: value for name, value in jax.config.values.items() if "cache" not in name}
    flags = [os.environ.get(name) for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    return repr((versions, processor(), devices, sorted(config.items()), flags, sorted((options or {}).items())))


@functools.cache
def processor() -> str:
    """What the host can do, for which XLA compiles; where it doesn't say that, which host it is."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        told = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
        return repr((platform.machine(), os.cpu_count(), sorted(told)))
    return repr((platform.uname(), os.cpu_count()))


@functools.cache
def source(package: Path, began: float) -> str | None:
    """A digest of the files of which programs are traced. None: some have changed since, or aren't there."""
    files = sorted(file for part in ("", "layers", "parallel") for file in (package / part).glob("*.py"))
    if not files or max(file.stat().st_ctime for file in files) > began:
        return None
    return digest(*(f"{file.relative_to(package)}\n{file.read_text('utf-8')}" for file in files))


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
