"""A request's answer as it grows: its text, and when it ends."""

from collections.abc import Iterable

from jaxserve.request import FinishReason, Logprob, Output, Request
from jaxserve.tokenizer import TextStream


class Completion:
    """Collects the tokens of one request.

    Text that may turn out to be the beginning of a stop text is held back; a stop text is never part of the answer.
    """

    def __init__(self, request: Request, stream: TextStream, eos_ids: Iterable[int], room: int):
        """`room` is the number of tokens the engine can hold after the prompt."""
        self.request = request
        self.count = 0
        self._stream = stream
        self._ends = ends(request, eos_ids)
        self._eos_ids = frozenset(eos_ids)
        self._limit = min(request.params.max_tokens, room)
        self._held = ""

    def push(self, token: int, logprobs: dict[int, Logprob] | None = None) -> Output:
        """Adds a token; the output says whether it was the last."""
        self.count += 1
        reason, cause = self._ended_by(token)
        ended_by_token = reason == "stop"
        self._held += "" if ended_by_token else self._stream.push([token])
        if reason:
            self._held += self._stream.finish()
        text, stop = self._release(final=reason is not None)
        if stop is not None:
            reason, cause = "stop", stop
        found = () if logprobs is None else (logprobs,)
        return Output(self.request.id, text, (token,), found, reason, cause)

    def _ended_by(self, token: int) -> tuple[FinishReason | None, int | None]:
        if token in self._ends and self.count > self.request.params.min_tokens:
            return "stop", None if token in self._eos_ids else token
        return ("length" if self.count >= self._limit else None), None

    def _release(self, final: bool) -> tuple[str, str | None]:
        """The text that is certain, and the stop text that ended it."""
        found = [(at, s) for s in self.request.params.stop if (at := self._held.find(s)) >= 0]
        if found and self.count >= self.request.params.min_tokens:
            at, stop = min(found)
            return self._held[:at], stop
        keep = 0 if final else max((_overlap(self._held, s) for s in self.request.params.stop), default=0)
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text, None


def ends(request: Request, eos_ids: Iterable[int]) -> frozenset[int]:
    """The tokens that end a request's answer."""
    own = () if request.params.ignore_eos else eos_ids
    return frozenset(own) | frozenset(request.params.stop_token_ids)


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of `text` are the first of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
