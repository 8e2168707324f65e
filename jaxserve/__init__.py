"""jaxserve: large mixture-of-experts language models, served with JAX."""

from typing import TYPE_CHECKING as _TYPE_CHECKING

from jaxserve.parallel.errors import CheckpointError, ConfigError, JaxserveError, RequestError, ShardingError
from jaxserve.request import CompletionOutput, Logprob, RequestOutput, SamplingParams

if _TYPE_CHECKING:
    from jaxserve.llm import LLM

__all__ = [
    "CheckpointError",
    "CompletionOutput",
    "ConfigError",
    "JaxserveError",
    "LLM",
    "Logprob",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "ShardingError",
]


def __getattr__(name: str):
    """Imports `LLM`, and JAX with it, when it is first used: help and errors shouldn't wait for JAX."""
    if name == "LLM":
        from jaxserve.llm import LLM

        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
