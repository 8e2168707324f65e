"""What is asked for and what comes back. Plain Python: no arrays, no JAX."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from jaxserve.parallel.errors import RequestError

FinishReason = Literal["stop", "length", "error"]
MAX_LOGPROBS = 20


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to continue a prompt. Names and defaults are vLLM's.

    With `temperature=0` each token is the most probable one. Otherwise the logits are divided by the temperature, and
    tokens are drawn from those that `min_p`, then `top_k`, then `top_p` keep. A `seed` makes the draw repeatable: it
    then depends on nothing but the seed and the position.
    """

    temperature: float = 1.0
    top_k: int = 0  # the k most probable tokens; 0 or -1: all
    top_p: float = 1.0  # the most probable tokens that together reach this mass
    min_p: float = 0.0  # tokens at least this probable, relative to the most probable
    seed: int | None = None
    stop: str | Sequence[str] = ()  # texts that end the answer, and are left out of it
    stop_token_ids: Sequence[int] = ()  # tokens that end the answer
    ignore_eos: bool = False  # go on after the model's own end
    max_tokens: int = 16
    min_tokens: int = 0  # before this many, no token that would end the answer is chosen
    logprobs: int | None = None  # report the sampled token's log-probability, and those of this many most probable

    def __post_init__(self):
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else _tuple("stop", self.stop))
        object.__setattr__(self, "stop_token_ids", _tuple("stop_token_ids", self.stop_token_ids))
        for name, ok, rule in self._rules():
            if not ok:
                raise RequestError(f"{name} = {getattr(self, name)!r}: it must be {rule}")

    def _rules(self):
        warm = _number(self.temperature) and 0 <= self.temperature <= 1e6
        yield "temperature", warm, "a finite number, 0 or more (1e6 at most)"
        few = _whole(self.top_k) and -1 <= self.top_k < 2**31
        yield "top_k", few, "a whole number, 0 (off) or more; -1 is off too"
        yield "top_p", _number(self.top_p) and 0 < self.top_p <= 1, "above 0 and at most 1"
        yield "min_p", _number(self.min_p) and 0 <= self.min_p <= 1, "from 0 to 1"
        yield (
            "seed",
            self.seed is None or (_whole(self.seed) and 0 <= self.seed < 2**32),
            "from 0 to 2**32 - 1, or None",
        )
        yield "stop", all(isinstance(s, str) and s for s in self.stop), "a text or several, none empty"
        yield "stop_token_ids", all(map(_whole, self.stop_token_ids)), "whole numbers"
        yield "max_tokens", _whole(self.max_tokens) and 1 <= self.max_tokens, "a whole number, 1 or more"
        fits = _whole(self.min_tokens) and 0 <= self.min_tokens <= self.max_tokens
        yield "min_tokens", fits, f"from 0 to max_tokens ({self.max_tokens})"
        within = self.logprobs is None or (_whole(self.logprobs) and 0 <= self.logprobs <= MAX_LOGPROBS)
        yield "logprobs", within, f"from 0 to {MAX_LOGPROBS}, or None"


def _tuple(name: str, value: object) -> tuple[Any, ...]:
    if isinstance(value, bytes) or not isinstance(value, Sequence):
        raise RequestError(f"{name} = {value!r}: it must be a list")
    return tuple(value)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class Request:
    """A prompt on its way through the engine."""

    id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    prompt: str | None = None  # None if it came as tokens


class Logprob(NamedTuple):
    """A token's log-probability, before temperature and filters."""

    logprob: float
    rank: int  # 1: the most probable
    decoded_token: str


class Output(NamedTuple):
    """What a step adds to a request's answer."""

    request_id: str
    text: str  # new text; empty while a character or a possible stop text is incomplete
    token_ids: tuple[int, ...]
    logprobs: tuple[dict[int, Logprob], ...]  # one for each token, if asked for
    finish_reason: FinishReason | None  # None: more follows
    stop_reason: str | int | None  # the stop text or token that ended it, or the error; None for the model's own end


@dataclass
class CompletionOutput:
    """An answer so far."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


@dataclass
class RequestOutput:
    """A request and its answer."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]

    @property
    def finished(self) -> bool:
        return all(output.finish_reason is not None for output in self.outputs)
