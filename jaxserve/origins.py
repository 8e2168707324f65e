"""All that a compiled program comes from, as far as it is known before the program is traced."""

import hashlib
import os
import platform
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import cache, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxserve import _BEGAN, __version__
from jaxserve.compilation import OVERLAP
from jaxserve.spmd import Call

Options = Mapping[str, Any] | None
"""XLA's, for a program."""

SOURCE = Path(__file__).parent


def origin(call: Call, options: Options) -> str | None:
    """A digest of the program's source, what it is for, and where it runs. None: it can't be told."""
    found = source(SOURCE, _BEGAN)
    return found and digest(found, surroundings(options), describe(call), repr(sorted(call.static.items())))


def lowered_origin(call: Call, traced: Any, lowered: Any, options: Options) -> str:
    """The same of a lowered program, which says what came of its source.

    It doesn't say which arguments it takes, of those that it is given: what was traced does.
    """
    came = str(traced.jaxpr), str(lowered.out_tree), lowered.as_text()
    return digest(surroundings(options), describe(call), *came)


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
    config |= {name: getattr(jax.config, name, value) for name, value in config.items()}  # as this thread has it
    flags = [os.environ.get(name) for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    told = versions, processor(), devices, sorted(config.items()), flags, jax.sharding.get_abstract_mesh()
    return repr((*told, OVERLAP, sorted((options or {}).items())))


@cache
def processor() -> str:
    """What the host can do, for which XLA compiles; where it doesn't say that, which host it is."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        told = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
        return repr((platform.machine(), os.cpu_count(), sorted(told)))
    return repr((platform.uname(), os.cpu_count()))


def source(package: Path, began: float) -> str | None:
    """A digest of the files of which programs are traced. None: some have changed since, or aren't there."""
    parts = package.glob("*.py"), *((package / part).rglob("*.py") for part in ("layers", "parallel"))
    files = tuple(sorted(file for part in parts for file in part))
    newest = max((file.stat().st_ctime for file in files), default=None)
    return _contents(package, files, newest) if newest is not None and newest <= began else None


@lru_cache(1)
def _contents(package: Path, files: tuple[Path, ...], newest: float) -> str:
    """A digest of files, of which the last has changed then."""
    return digest(*(f"{file.relative_to(package)}\n{file.read_text('utf-8')}" for file in files))


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
