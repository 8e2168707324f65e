"""jaxserve: large mixture-of-experts language models, served with JAX."""

from typing import TYPE_CHECKING as _TYPE_CHECKING

from jaxserve.parallel.errors import CheckpointError, ConfigError, JaxserveError, RequestError, ShardingError
from jaxserve.request import CompletionOutput, Logprob, Output, RequestOutput, SamplingParams, StructuredOutputs

if _TYPE_CHECKING:
    from jaxserve.llm import LLM

    __version__: str

__all__ = [
    "CheckpointError",
    "CompletionOutput",
    "ConfigError",
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


def __getattr__(name: str):
    """Makes `LLM`, and imports JAX, and `__version__` when first used: help and errors shouldn't wait for them."""
    if name == "LLM":
        from jaxserve.llm import LLM

        return LLM
    if name == "__version__":
        return _version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("jaxserve")
    except PackageNotFoundError:  # a checkout that is only on the path
        return "0+unknown"
