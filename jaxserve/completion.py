"""An answer as it grows: its text, and when it ends."""

from collections.abc import Iterable, Sequence

from jaxserve.request import FinishReason, Output, Request, TokenLogprobs
from jaxserve.tokenizer import TextStream


class Completion:
    """Collects the tokens of one answer.

    Text that may turn out to be the beginning of a stop text is held back; a stop text is no part of the answer, unless
    it is asked for.
    """

    def __init__(self, request: Request, index: int, stream: TextStream, eos_ids: Iterable[int], limit: int):
        """`limit` is the number of tokens that the answer can have."""
        self.request, self.index = request, index
        self.count = 0
        self._stream = stream
        self._ends = ends(request, eos_ids)
        self._eos_ids = frozenset(eos_ids)
        self._stops = request.params.stops
        self._limit = limit
        self._held = ""

    def push(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs] = (), over: bool = False) -> Output:
        """Adds tokens up to the first that ends the answer; the output says whether there was one.

        `over`: nothing can follow the last of them.
        """
        text, reason, cause, taken = "", None, None, 0
        for token in tokens:
            taken += 1
            piece, reason, cause = self._push(token, over and taken == len(tokens))
            text += piece
            if reason:
                break
        found = tuple(logprobs[:taken])
        return Output(self.request.id, self.index, text, tuple(tokens[:taken]), found, reason, cause)

    def rest(self) -> str:
        """The text that was held back, for an answer that ends before its time."""
        self._held += self._stream.finish()
        return self._held

    def _push(self, token: int, over: bool) -> tuple[str, FinishReason | None, str | int | None]:
        self.count += 1
        reason, cause = self._ended_by(token)
        self._held += "" if reason == "stop" else self._stream.push([token])
        reason = "stop" if over else reason
        if reason:
            self._held += self._stream.finish()
        text, stop = self._release(final=reason is not None)
        return (text, reason, cause) if stop is None else (text, "stop", stop)

    def _ended_by(self, token: int) -> tuple[FinishReason | None, int | None]:
        if token in self._ends and self.count > self.request.params.min_tokens:
            return "stop", None if token in self._eos_ids else token
        return ("length" if self.count >= self._limit else None), None

    def _release(self, final: bool) -> tuple[str, str | None]:
        """The text that is certain, and the stop text that ended it."""
        found = [(at, s) for s in self._stops if (at := self._held.find(s)) >= 0]
        if found and self.count >= self.request.params.min_tokens:
            at, stop = min(found)
            end = at + len(stop) if self.request.params.include_stop_str_in_output else at
            return self._held[:end], stop
        keep = 0 if final else max((_overlap(self._held, s) for s in self._stops), default=0)
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text, None


def ends(request: Request, eos_ids: Iterable[int]) -> frozenset[int]:
    """The tokens that end a request's answer. A form allows the model's own only where it is complete: it counts."""
    p = request.params
    own = () if p.ignore_eos and p.structured_outputs is None else eos_ids
    return frozenset(own) | frozenset(p.stop_token_ids or ())


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of `text` are the first of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
