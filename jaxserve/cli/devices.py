"""Devices for a command: those of this process, or a mesh shared with others."""

import math
import re

from jaxserve.parallel.errors import RequestError


def join(coordinator: str | None, processes: int, process: int, devices: int | None, mesh: str | None) -> None:
    """Meets the other processes; on CPU each emulates its part of the mesh."""
    import jax

    from jaxserve.parallel.mesh import find_shape

    missing = [name for name, value in {"--mesh": mesh, "--coordinator": coordinator}.items() if value is None]
    if mesh is None or coordinator is None:
        raise RequestError(f"{' and '.join(missing)} missing: processes share a mesh, and meet at a coordinator")
    if not re.fullmatch(r".+:\d+", coordinator):
        raise RequestError(f"--coordinator {coordinator}: it must be host:port, like localhost:7000")
    if process >= processes:
        raise RequestError(f"--process-id {process}: it must be less than --num-processes, {processes}")
    size = math.prod(find_shape(mesh))
    if devices is None and size % processes:
        raise RequestError(f"--mesh {mesh} has {size} devices, which {processes} processes can't share evenly")
    jax.config.update("jax_num_cpu_devices", devices or size // processes)
    jax.distributed.initialize(coordinator, processes, process)


def emulate(devices: int | None, mesh: str | None) -> str | None:
    """Has JAX show as many CPU devices as are asked for, and gives the mesh: of devices alone, one node."""
    import jax

    from jaxserve.parallel.mesh import find_shape

    mesh = f"1x{devices}" if devices and not mesh else mesh
    if mesh:
        jax.config.update("jax_num_cpu_devices", devices or math.prod(find_shape(mesh)))  # before a backend starts
    return mesh
