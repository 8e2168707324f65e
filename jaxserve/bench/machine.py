"""On what a measurement was made: machine, versions, commit."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jaxserve


def software() -> dict[str, Any]:
    """Date, versions, and the commit of a checkout."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "jaxserve": jaxserve.__version__,
        "commit": commit(),
        "python": platform.python_version(),
    }


def hardware() -> dict[str, Any]:
    """The device that JAX uses, the processor, and JAX's own versions."""
    import jax

    device = jax.devices()[0]
    return {
        "backend": jax.default_backend(),
        "device": device.device_kind,
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": platform.platform(),
        **{name: version(name) for name in ("jax", "jaxlib", "numpy")},
    }


def processor() -> str:
    """Its name, as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def commit() -> str | None:
    """Of the checkout that the package is in, `-dirty` if files differ from it; None if it is in none."""
    root = Path(jaxserve.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
