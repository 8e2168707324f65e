"""What the host allows a sequence to say next: the form its answer must have, and words it must not say.

The device chooses tokens; these masks reach it with each step, for the token to come and for those after each guess.
Plain Python and NumPy; grammars are llguidance's.
"""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from jaxserve.parallel.errors import RequestError
from jaxserve.request import SamplingParams, StructuredOutputs
from jaxserve.tokenizer import Tokenizer


class Guide:
    """The allowed tokens of one answer as it grows."""

    def __init__(self, vocabulary: int, matcher: LLMatcher | None, banned: Sequence[tuple[int, ...]]):
        """`banned` are runs of tokens whose last one must not follow the others."""
        self._words = -(-vocabulary // 32)
        self._matcher, self._banned = matcher, banned
        self._said: list[int] = []
        self.guesses: list[int] = []  # of the device, at what comes next

    @property
    def over(self) -> bool:
        """Whether the form is complete, and nothing can follow."""
        return self._matcher is not None and self._matcher.is_stopped() and not self._matcher.is_error()

    def push(self, tokens: Sequence[int]) -> int:
        """Notes what was said, up to where the form is complete; returns how many tokens that is."""
        taken = 0
        while taken < len(tokens) and not self.over:
            self._said.append(tokens[taken])
            self._take(tokens[taken])
            taken += 1
        return taken

    def bits(self, guesses: Sequence[int]) -> np.ndarray:
        """uint32[1 + guesses, words]: the tokens allowed next, and after each guess, 32 a word.

        After a guess that is not allowed itself, anything is: it will not come to that.
        """
        rows = np.full((1 + len(guesses), self._words), 0xFFFFFFFF, np.uint32)
        taken = 0
        for place, row in enumerate(rows):
            if self._matcher is not None:
                row[:] = _allowed(self._matcher, self._words)
            self._ban(row, [*self._said, *guesses[:place]])
            if place == len(guesses) or not _has(row, guesses[place]) or not self._take(guesses[place]):
                break
            taken += 1
        if self._matcher is not None and taken:
            self._matcher.rollback(taken)
        return rows

    def _take(self, guess: int) -> bool:
        return self._matcher is None or self._matcher.try_consume_tokens([guess]) == 1

    def _ban(self, row: np.ndarray, said: list[int]) -> None:
        for *before, last in self._banned:
            if said[len(said) - len(before) :] == before:
                row[last // 32] &= ~np.uint32(1 << (last % 32))


def _allowed(matcher: LLMatcher, words: int) -> np.ndarray:
    """The matcher's mask; nothing is allowed if it gave up, as it does when a form takes too long to follow."""
    bits = np.frombuffer(matcher.compute_bitmask(), np.uint32)
    return np.zeros(words, np.uint32) if matcher.is_error() else bits[:words]  # it may have a word more


def _has(row: np.ndarray, token: int) -> bool:
    return bool(row[token // 32] >> np.uint32(token % 32) & np.uint32(1))


class Guides:
    """Makes a guide for each answer that needs one."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, eos_ids: Sequence[int]):
        self._tokenizer, self._vocabulary, self._eos_ids = tokenizer, vocabulary, list(eos_ids)
        self._ll: LLTokenizer | None = None
        self._matcher = lru_cache(64)(self._new_matcher)

    def make(self, params: SamplingParams) -> Guide | None:
        """The guide of an answer; None if the device forbids by itself all that is forbidden.

        Raises RequestError if the form is none that can be followed.
        """
        banned = [run for run in self._runs(params) if len(run) > 1]
        form = params.structured_outputs
        if form is None and not banned:
            return None
        matcher = None if form is None else self._matcher(_grammar(form), form.name).deep_copy()
        return Guide(self._vocabulary, matcher, banned)

    def bias(self, params: SamplingParams) -> np.ndarray | None:
        """float32[vocabulary] to be added to the scores, -inf where a token is not allowed; None if it were all 0."""
        words = [run[0] for run in self._runs(params) if len(run) == 1]
        if not words and params.allowed_token_ids is None and not params.logit_bias:
            return None
        bias_u = np.full(self._vocabulary, 0.0 if params.allowed_token_ids is None else -np.inf, np.float32)
        bias_u[list(params.allowed_token_ids or ())] = 0.0
        for token, value in (params.logit_bias or {}).items():
            bias_u[token] += value
        bias_u[words] = -np.inf
        return bias_u

    def _runs(self, params: SamplingParams) -> list[tuple[int, ...]]:
        """Bad words as tokens, at the beginning of a text and after a space."""
        encode = self._tokenizer.encode
        spelled = [text.lstrip() or text for text in params.bad_texts]
        runs = [tuple(encode(space + text, add_special_tokens=False)) for text in spelled for space in ("", " ")]
        return list(dict.fromkeys(run for run in runs if run))

    def _new_matcher(self, grammar: str, name: str) -> LLMatcher:
        if self._ll is None:
            self._ll = self._new_tokenizer()
        fault = LLMatcher.validate_grammar(grammar, self._ll, limits=_LIMITS)
        if fault and not fault.startswith("WARNING"):
            raise RequestError(f"structured_outputs.{name} can't be followed: {_short(fault, name)}")
        matcher = LLMatcher(self._ll, grammar, log_level=0, limits=_LIMITS)
        if not _allowed(matcher, -(-self._vocabulary // 32)).any():
            raise RequestError(f"structured_outputs.{name} can't be followed: no text has this form")
        return matcher

    def _new_tokenizer(self) -> LLTokenizer:
        try:
            return LLTokenizer(self._tokenizer.to_json(), n_vocab=self._vocabulary, eos_token=self._eos_ids)
        except ValueError as error:
            raise RequestError(f"structured_outputs can't be followed with this model's tokenizer: {error}") from None


_LIMITS = LLParserLimits(initial_lexer_fuel=300_000)
"""A form that explodes, `(a{1000}){1000}`, keeps some 10 MB then, and more than 100 with llguidance's own million."""


def _short(fault: str, name: str) -> str:
    """Where and why, without the excerpt of the source; of a regex without the place in the grammar that it became."""
    lines = [line.strip() for line in fault.splitlines()]
    reasons = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return " ".join(reasons if reasons and name == "regex" else [lines[0], *reasons])


def _grammar(form: StructuredOutputs) -> str:
    """The form as llguidance writes it."""
    try:
        if form.json_object:
            return LLMatcher.grammar_from_json_schema(schema_text({"type": "object"}))
        if form.json is not None:
            schema = json.loads(form.json) if isinstance(form.json, str) else dict(form.json)
            return LLMatcher.grammar_from_json_schema(schema_text(schema))
        if form.regex is not None:
            return LLMatcher.grammar_from_regex(form.regex)
        if form.choice is not None:
            return LLMatcher.grammar_from_lark("start: " + " | ".join(map(quoted, form.choice)))
        return LLMatcher.grammar_from_lark(form.grammar or "")
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"structured_outputs.{form.name} can't be followed: {error}") from None


_WHITE_SPACE = r" |\r?\n[ \t]{0,40}"
"""Between the tokens of JSON, where llguidance would let a model write white space for ever: what compact, spaced and
indented texts have there."""


def schema_text(schema: Any) -> str:
    """A JSON schema as llguidance reads it, with white space bounded unless its own `x-guidance` says how it is."""
    schema = {} if schema is True else schema
    own = schema.get("x-guidance", {}) if isinstance(schema, Mapping) else None
    if isinstance(own, Mapping) and not own.keys() & {"whitespace_pattern", "whitespace_flexible"}:
        schema = {**schema, "x-guidance": {**own, "whitespace_pattern": _WHITE_SPACE}}
    return json.dumps(schema, allow_nan=False)


def quoted(text: str) -> str:
    """A text as Lark writes it."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")  # raw, it is no character of Lark's
