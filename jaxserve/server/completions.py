"""`/v1/completions`: texts or tokens go on."""

import time
from collections.abc import Iterable, Sequence
from typing import cast

from jaxserve.parallel.errors import RequestError
from jaxserve.request import Output, Request, TokenLogprobs
from jaxserve.server.protocol import Completion, CompletionChoice, CompletionLogprobs, CompletionRequest, Usage
from jaxserve.server.sampling import sampling_params
from jaxserve.server.service import Service
from jaxserve.tokenizer import TextStream, Tokenizer

DEFAULT_MAX_TOKENS = 16
Entry = tuple[int, TokenLogprobs | None]
"""A token, and how probable it was."""


async def make_call(service: Service, body: CompletionRequest, id: str) -> "CompletionCall":
    """The requests of a body. Raises RequestError or ApiError that names what is wrong."""
    service.check_model(body.model)
    prompts = _prompts(body.prompt)
    service.check_count(len(prompts) * (body.n or 1))  # before what takes long
    texts = [prompt if isinstance(prompt, str) else None for prompt in prompts]
    tokens = [await service.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    only_echo = body.max_tokens == 0
    if only_echo and not body.echo:
        raise RequestError("max_tokens = 0: it must be 1 or more, unless echo is true")
    max_tokens = service.most_tokens(1 if only_echo else body.max_tokens, DEFAULT_MAX_TOKENS)
    params = sampling_params(body, max_tokens, body.logprobs, body.logprobs if body.echo else None)
    requests = [
        Request(f"{id}-{number}", tuple(ids), params, text, body.priority or 0, body.cache_salt or "")
        for number, (ids, text) in enumerate(zip(tokens, texts, strict=True))
    ]
    return CompletionCall(id, service.names[0], body, requests, service.loaded.tokenizer, only_echo)


def _prompts(given: str | list[str | int | list[int]]) -> list[str | list[int]]:
    """A text, or tokens, or several of either."""
    if isinstance(given, str):
        return [given]
    if not given:
        raise RequestError("prompt has nothing in it; give a text, token ids, or a list of such")
    if set(map(type, given)) == {int}:
        return [cast("list[int]", given)]
    prompts = [each for each in given if not isinstance(each, int)]
    if len(prompts) < len(given):
        raise RequestError("prompt has token ids beside other things; give a text, token ids, or a list of such")
    return prompts


class CompletionCall:
    """A request for completions; each of its prompts has `n` choices."""

    def __init__(
        self, id: str, model: str, body: CompletionRequest, requests: list[Request], tokenizer: Tokenizer,
        only_echo: bool,
    ):  # fmt: skip
        self.requests, self.stream = requests, bool(body.stream)
        self.include_usage = bool(body.stream_options and body.stream_options.include_usage)
        self._said = {"id": id, "created": int(time.time()), "model": model}
        self.only_echo = only_echo
        self._n, self._echo, self._tokenizer = body.n or 1, bool(body.echo), tokenizer
        self._logprobs, self._skip = body.logprobs is not None, body.skip_special_tokens is not False
        self._known: dict[int, tuple[TokenLogprobs | None, ...]] = {}  # of prompts' tokens
        self._waiting: dict[int, list[Output]] = {}  # for that, by prompt
        self._offsets: dict[int, Offsets] = {}
        self._choices: dict[int, CompletionChoice] = {}

    def open(self) -> Sequence[CompletionChoice]:
        return ()

    def grow(self, number: int, output: Output) -> Sequence[CompletionChoice]:
        if output.prompt_logprobs is not None:  # of a prompt's choices, the first alone has them
            self._known[number] = output.prompt_logprobs
        waiting = self._waiting.setdefault(number, [])
        waiting.append(output)
        if self._echo and self._logprobs and number not in self._known:
            return ()
        self._waiting[number] = []
        return [self._grow(number, each) for each in waiting]

    def _grow(self, number: int, output: Output) -> CompletionChoice:
        index = number * self._n + output.index
        begins = index not in self._choices
        text, ids, scores, reason = output.text, output.token_ids, output.logprobs, output.finish_reason
        if self.only_echo:
            text, ids, scores, reason = "", (), (), reason and "length"
        entries: list[Entry] = list(zip(ids, scores, strict=True)) if self._logprobs else []
        if self._echo and begins:
            text = self._prompt(number) + text
            entries = [*self._prompt_entries(number), *entries]
        added = CompletionChoice(index, text, finish_reason=reason, stop_reason=output.stop_reason)
        if self._logprobs:
            offsets = self._offsets.setdefault(index, Offsets(self._tokenizer.stream(self._skip)))
            added.logprobs = _logprobs(entries, offsets, self._tokenizer)
        if begins:
            self._choices[index] = CompletionChoice(index, logprobs=added.logprobs and CompletionLogprobs())
        _extend(self._choices[index], added)
        return added

    def chunk(self, choices: Sequence[CompletionChoice], usage: Usage | None = None) -> Completion:
        return Completion(**self._said, choices=list(choices), usage=usage)

    def whole(self, usage: Usage) -> Completion:
        return self.chunk([self._choices[index] for index in sorted(self._choices)], usage)

    def _prompt(self, number: int) -> str:
        request = self.requests[number]
        return self._tokenizer.decode(request.prompt_token_ids) if request.prompt is None else request.prompt

    def _prompt_entries(self, number: int) -> list[Entry]:
        known = self._known.get(number)
        return list(zip(self.requests[number].prompt_token_ids, known, strict=True)) if known else []


class Offsets:
    """Where tokens begin in a text, as they come."""

    def __init__(self, stream: TextStream):
        self._stream, self._length = stream, 0

    def next(self, token: int) -> int:
        begin = self._length
        self._length += len(self._stream.push([token]))
        return begin


def _logprobs(entries: Iterable[Entry], offsets: Offsets, tokenizer: Tokenizer) -> CompletionLogprobs:
    found = CompletionLogprobs()
    for token, scores in entries:
        found.text_offset.append(offsets.next(token))
        found.tokens.append(tokenizer.decode([token], skip_special_tokens=False))
        found.token_logprobs.append(scores[token].logprob if scores else None)
        found.top_logprobs.append(_by_text(scores) if scores else None)
    return found


def _by_text(scores: TokenLogprobs) -> dict[str, float]:
    """The most probable first; of tokens that look alike, as parts of characters do, that one."""
    best: dict[str, float] = {}
    for each in sorted(scores.values(), key=lambda each: -each.logprob):
        best.setdefault(each.decoded_token, each.logprob)
    return best


def _extend(whole: CompletionChoice, added: CompletionChoice) -> None:
    whole.text += added.text
    whole.finish_reason, whole.stop_reason = added.finish_reason, added.stop_reason
    if whole.logprobs and added.logprobs:
        for name in CompletionLogprobs.__struct_fields__:
            getattr(whole.logprobs, name).extend(getattr(added.logprobs, name))
