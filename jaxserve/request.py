"""What is asked for and what comes back. Plain Python: no arrays, no JAX."""

import math
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple

from jaxserve.parallel.errors import RequestError

FinishReason = Literal["stop", "length", "error"]
MAX_LOGPROBS = 20


@dataclass(frozen=True, kw_only=True)
class StructuredOutputs:
    """A form that the answer must have; exactly one of these."""

    json: str | Mapping[str, Any] | None = None  # a JSON schema
    regex: str | None = None
    choice: Sequence[str] | None = None  # one of these texts
    grammar: str | None = None  # in Lark's notation
    json_object: bool = False  # any JSON object

    def __post_init__(self):
        given = [name for name in _FORMS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise RequestError(
                f"structured_outputs has {' and '.join(given) or 'nothing'}; give one of {', '.join(_FORMS)}"
            )
        for name, (kinds, rule) in _FORMS.items():
            value = getattr(self, name)
            texts = name != "choice" or (not isinstance(value, str) and bool(value) and _is_texts(value))
            if value is not None and not (value != "" and isinstance(value, kinds) and texts):
                raise RequestError(f"structured_outputs.{name} = {reprlib.repr(value)}: it must be {rule}")

    @property
    def name(self) -> str:
        """Which form it is."""
        return next(name for name in _FORMS if getattr(self, name) not in (None, False))


_FORMS: dict[str, tuple[tuple[type, ...], str]] = {
    "json": ((str, Mapping), "a JSON schema, as a text or a dict"),
    "regex": ((str,), "a text, not empty"),
    "choice": ((Sequence,), "a list of texts, none empty"),
    "grammar": ((str,), "a text in Lark's notation, not empty"),
    "json_object": ((bool,), "True or False"),
}
"""The types each may have, and what they must be."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to continue a prompt. Names and defaults are vLLM's.

    With `temperature=0` each token is the most probable one. Otherwise the logits are divided by the temperature, and
    tokens are drawn from those that `min_p`, then `top_k`, then `top_p` keep. A `seed` makes the draw repeatable: it
    then depends on nothing but the seed and the position; of `n` samples the i-th has seed + i.
    """

    n: int = 1  # answers to the prompt
    temperature: float = 1.0
    top_k: int = 0  # the k most probable tokens; 0 or -1: all
    top_p: float = 1.0  # the most probable tokens that together reach this mass
    min_p: float = 0.0  # tokens at least this probable, relative to the most probable
    seed: int | None = None
    repetition_penalty: float = 1.0  # divides (if negative, multiplies) scores of tokens in the prompt or the answer
    presence_penalty: float = 0.0  # is subtracted from scores of tokens in the answer
    frequency_penalty: float = 0.0  # likewise, times how often they are in it
    logit_bias: Mapping[int, float] | None = None  # is added to the scores of these tokens
    allowed_token_ids: Sequence[int] | None = None  # only these may be chosen
    bad_words: str | Sequence[str] | None = None  # texts of which the last token is never chosen after the others
    structured_outputs: StructuredOutputs | None = None
    stop: str | Sequence[str] | None = None  # texts that end the answer
    stop_token_ids: Sequence[int] | None = None  # tokens that end the answer
    ignore_eos: bool = False  # go on after the model's own end
    max_tokens: int | None = 16  # None: as many as there is room for
    min_tokens: int = 0  # before this many, no token that would end the answer is chosen
    logprobs: int | None = None  # report the chosen token's log-probability, and those of this many most probable
    prompt_logprobs: int | None = None  # likewise for each token of the prompt but the first
    skip_special_tokens: bool = True  # in the text
    include_stop_str_in_output: bool = False

    def __post_init__(self):
        for name, ok, rule in self._rules():
            if not ok:
                raise RequestError(f"{name} = {reprlib.repr(getattr(self, name))}: it must be {rule}")
        if self.structured_outputs and self.min_tokens:
            raise RequestError("min_tokens can't be set with structured_outputs: the form decides where an answer ends")
        for name, value in list(vars(self).items()):
            if isinstance(value, Real) and not isinstance(value, int | float):  # NumPy's: sums of small ones overflow
                object.__setattr__(self, name, int(value) if isinstance(value, Integral) else float(value))

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end the answer."""
        return _texts(self.stop)

    @property
    def bad_texts(self) -> tuple[str, ...]:
        return _texts(self.bad_words)

    @property
    def penalizes(self) -> bool:
        """Whether the choice of a token depends on those before it in ways the scores don't know."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    def _rules(self) -> Iterator[tuple[str, bool, str]]:
        yield "n", _whole(self.n, 1, 1024), "a whole number from 1 to 1024"
        yield "temperature", _number(self.temperature, 0, 1e6), "a finite number, 0 or more (1e6 at most)"
        yield "top_k", _whole(self.top_k, -1, 2**31 - 1), "a whole number, 0 (off) or more; -1 is off too"
        yield "top_p", _number(self.top_p, 0, 1) and self.top_p > 0, "a number above 0 and at most 1"
        yield "min_p", _number(self.min_p, 0, 1), "a number from 0 to 1"
        given = self.seed is None or _whole(self.seed, 0, 2**32 - 1)
        yield "seed", given, "a whole number from 0 to 2**32 - 1, or None"
        fits = _number(self.repetition_penalty, 1e-6, 1e6)
        yield "repetition_penalty", fits, "a number above 0 (from 1e-6 to 1e6; 1 is off)"
        yield "presence_penalty", _number(self.presence_penalty, -2, 2), "a number from -2 to 2"
        yield "frequency_penalty", _number(self.frequency_penalty, -2, 2), "a number from -2 to 2"
        rule = "a dict from token ids to a number from -100 to 100 each, or None"
        yield "logit_bias", _is_bias(self.logit_bias), rule
        few = self.allowed_token_ids is None or (_ids(self.allowed_token_ids) and len(self.allowed_token_ids) > 0)
        yield "allowed_token_ids", few, "a list of token ids, not empty, or None"
        yield "bad_words", _is_texts(self.bad_words), "a text or several, none empty, or None"
        form = self.structured_outputs is None or isinstance(self.structured_outputs, StructuredOutputs)
        yield "structured_outputs", form, "StructuredOutputs(...), or None"
        yield "stop", _is_texts(self.stop), "a text or several, none empty, or None"
        ends = self.stop_token_ids is None or _ids(self.stop_token_ids)
        yield "stop_token_ids", ends, "a list of token ids (whole numbers), or None"
        yield "max_tokens", self.max_tokens is None or _whole(self.max_tokens, 1), "a whole number, 1 or more, or None"
        most, named = (2**31 - 1, "2**31 - 1") if self.max_tokens is None else (self.max_tokens, "max_tokens ({})")
        rule = f"a whole number from 0 to {named.format(most)}"
        yield "min_tokens", _whole(self.min_tokens, 0, most), rule
        for name in ("logprobs", "prompt_logprobs"):
            fits = getattr(self, name) is None or _whole(getattr(self, name), 0, MAX_LOGPROBS)
            yield name, fits, f"a whole number from 0 to {MAX_LOGPROBS}, or None"
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            yield name, isinstance(getattr(self, name), bool), "True or False"


def _number(value: Any, low: float, high: float) -> bool:
    return _is_number(value) and bool(low <= value <= high)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _whole(value: object, low: int = 0, high: float = math.inf) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and low <= int(value) <= high


def _ids(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes) and all(_whole(t) for t in value)


def _texts(value: str | Sequence[str] | None) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value or ())


def _is_texts(value: object) -> bool:
    if value is None or isinstance(value, str):
        return value != ""
    return isinstance(value, Sequence) and not isinstance(value, bytes) and all(isinstance(t, str) and t for t in value)


def _is_bias(value: object) -> bool:
    return value is None or (
        isinstance(value, Mapping) and all(_whole(t) and _number(b, -100, 100) for t, b in value.items())
    )


class Handover(NamedTuple):
    """Where the pages of a prompt lie that another engine has computed, until they are fetched or too old."""

    host: str
    port: int
    name: str  # of the offer there
    tokens: int  # that are in the pages


@dataclass(frozen=True)
class Request:
    """A prompt on its way through the engine."""

    id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    prompt: str | None = None  # None if it came as tokens
    priority: int = 0  # lower is served sooner; of equals, the one that came first
    cache_salt: str = ""  # what was computed for others is found only by those with the same

    # Between engines.
    answered: tuple[int, ...] = ()  # of its only answer, tokens that another engine has said; it goes on after them
    export: bool = False  # the pages of its prompt are offered to other engines
    handover: Handover | None = None  # its pages come from another engine


class Logprob(NamedTuple):
    """A token's log-probability, before temperature, penalties and filters."""

    logprob: float
    rank: int  # 1: the most probable
    decoded_token: str


TokenLogprobs = dict[int, Logprob]
"""Of the token that stands at a place, and of the most probable ones there."""


@dataclass(frozen=True)
class Output:
    """What a step adds to one answer of a request."""

    request_id: str
    index: int = 0  # which of its `n` answers
    text: str = ""  # new text; empty while a character or a possible stop text is incomplete
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()  # one for each token, if asked for
    finish_reason: FinishReason | None = None  # None: more follows
    stop_reason: str | int | None = None  # the stop text or token that ended it; None for the model's own end
    error: str | None = None  # what went wrong, if finish_reason is "error"
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None  # with the first output, if asked for
    num_cached_tokens: int = 0  # of the prompt, computed by an earlier request
    queue_seconds: float = 0.0  # with the first output: how long it waited to begin
    handover: Handover | None = None  # where its pages are, if the request is to export them
    lost: bool = False  # finish_reason is "error" because pages that it was to begin with did not come


@dataclass
class CompletionOutput:
    """An answer so far."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: str | None = None


@dataclass
class RequestOutput:
    """A request and its answers."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # None for the first token: nothing predicts it
    num_cached_tokens: int = 0

    @property
    def finished(self) -> bool:
        return all(output.finish_reason is not None for output in self.outputs)
