"""jaxserve: large mixture-of-experts language models, served with JAX."""

import importlib as _importlib
import time as _time
from typing import TYPE_CHECKING as _TYPE_CHECKING

from jaxserve.parallel.errors import CheckpointError, ConfigError, JaxserveError, RequestError, ShardingError
from jaxserve.request import CompletionOutput, Logprob, Output, RequestOutput, SamplingParams, StructuredOutputs

if _TYPE_CHECKING:
    from jaxserve.llm import LLM
    from jaxserve.options import EngineConfig

    __version__: str

__all__ = [
    "CheckpointError",
    "CompletionOutput",
    "ConfigError",
    "EngineConfig",
    "JaxserveError",
    "LLM",
    "Logprob",
    "Output",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "ShardingError",
    "StructuredOutputs",
    "__version__",
]

_BEGAN = _time.time()
"""When this package was loaded, in seconds since 1970: source that is newer isn't what runs."""

_WITH_JAX = {"LLM": "jaxserve.llm", "EngineConfig": "jaxserve.options"}


def __getattr__(name: str):
    """Makes what imports JAX, and `__version__`, when first used: help and errors shouldn't wait for them."""
    if name in _WITH_JAX:
        return getattr(_importlib.import_module(_WITH_JAX[name]), name)
    if name == "__version__":
        return _version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("jaxserve")
    except PackageNotFoundError:  # a checkout that is only on the path
        return "0+unknown"
