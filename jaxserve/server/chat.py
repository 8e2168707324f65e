"""`/v1/chat/completions`: a conversation goes on."""

import asyncio
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace

from jaxserve.parallel.errors import RequestError
from jaxserve.request import Logprob, Output, Request
from jaxserve.server import speech
from jaxserve.server.protocol import (
    Candidate,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatRequest,
    Delta,
    Message,
    TokenLogprob,
    ToolCall,
    Usage,
)
from jaxserve.server.sampling import sampling_params
from jaxserve.server.service import Service
from jaxserve.server.speech import Manner, Said
from jaxserve.tokenizer import Tokenizer


async def make_call(service: Service, body: ChatRequest, id: str) -> "ChatCall":
    """The request of a body. Raises RequestError or ApiError that names what is wrong."""
    service.check_model(body.model)
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise RequestError("max_tokens and max_completion_tokens are two names of one limit; give one of them")
    asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("top_logprobs has an effect only with logprobs; set it to true, or leave top_logprobs out")
    params = sampling_params(body, service.most_tokens(asked), (body.top_logprobs or 0) if body.logprobs else None)
    tokenizer = service.loaded.tokenizer
    ids = await asyncio.to_thread(render, tokenizer, body)
    manner = speech.manner(tokenizer, body, ids)
    form = manner.form(body, params.structured_outputs, tokenizer.added)
    skip = params.skip_special_tokens and not manner.shows_special
    params = replace(params, structured_outputs=form, skip_special_tokens=skip)
    request = Request(id, tuple(ids), params, None, body.priority or 0, body.cache_salt or "")
    return ChatCall(id, service.names[0], body, request, tokenizer, manner)


def render(tokenizer: Tokenizer, body: ChatRequest) -> list[int]:
    """The prompt that the model's chat template makes of a conversation."""
    goes_on = bool(body.continue_final_message)
    begins = not goes_on if body.add_generation_prompt is None else body.add_generation_prompt
    return tokenizer.apply_chat_template(
        speech.messages_of(tokenizer, body),
        tools=speech.tools_of(body),
        add_generation_prompt=begins,
        continue_final_message=goes_on,
        chat_template_kwargs=body.chat_template_kwargs,
    )


class ChatCall:
    """A request for a message; it has `n` choices."""

    only_echo = False

    def __init__(
        self, id: str, model: str, body: ChatRequest, request: Request, tokenizer: Tokenizer, manner: Manner
    ):  # fmt: skip
        self.requests, self.stream = [request], bool(body.stream)
        self.include_usage = bool(body.stream_options and body.stream_options.include_usage)
        self._said = {"id": id, "created": int(time.time()), "model": model}
        self._tokenizer, self._logprobs, self._top = tokenizer, bool(body.logprobs), body.top_logprobs or 0
        scores = lambda: ChatLogprobs([]) if self._logprobs else None  # noqa: E731
        self._choices = [ChatChoice(index, Message(), scores()) for index in range(request.params.n)]
        hidden = body.skip_special_tokens is not False and manner.shows_special
        self._speeches = [manner.speech(hidden) for _ in self._choices]

    def open(self) -> Sequence[ChatDelta]:
        return [ChatDelta(choice.index, Delta(role="assistant", content="")) for choice in self._choices]

    def grow(self, number: int, output: Output) -> Sequence[ChatDelta]:
        whole, reason = self._choices[output.index], output.finish_reason
        said = self._speeches[output.index].push(output.text, last=reason is not None)
        delta = Delta(
            content=said.content or None, reasoning_content=said.reasoning or None, tool_calls=said.calls or None
        )
        _extend(whole.message, said, last=reason is not None)
        reason = "tool_calls" if reason == "stop" and whole.message.tool_calls else reason
        scores = ChatLogprobs(list(self._scores(output))) if whole.logprobs else None
        if whole.logprobs and scores:
            whole.logprobs.content += scores.content
        whole.finish_reason, whole.stop_reason = reason, output.stop_reason
        added = ChatDelta(output.index, delta, scores, reason, output.stop_reason)
        return [added] if said or reason or (scores and scores.content) else ()

    def chunk(self, choices: Sequence[ChatDelta], usage: Usage | None = None) -> ChatChunk:
        return ChatChunk(**self._said, choices=list(choices), usage=usage)

    def whole(self, usage: Usage) -> ChatCompletion:
        return ChatCompletion(**self._said, choices=self._choices, usage=usage)

    def _scores(self, output: Output) -> Iterable[TokenLogprob]:
        for token, scores in zip(output.token_ids, output.logprobs, strict=True):
            top = sorted((each.rank, id) for id, each in scores.items() if each.rank <= self._top)
            own = self._candidate(token, scores[token])
            yield TokenLogprob(own.token, own.logprob, own.bytes, [self._candidate(id, scores[id]) for _, id in top])

    def _candidate(self, token: int, found: Logprob) -> Candidate:
        return Candidate(found.decoded_token, found.logprob, list(self._tokenizer.token_bytes(token)))


def _extend(message: Message, said: Said, last: bool) -> None:
    """Adds a piece; a call of a tool is whole, and has no index then."""
    message.content = (message.content or "") + said.content
    if said.reasoning:
        message.reasoning_content = (message.reasoning_content or "") + said.reasoning
    if said.calls:
        whole = [ToolCall(call.id, call.type, call.function) for call in said.calls]
        message.tool_calls = [*(message.tool_calls or ()), *whole]
    if last and message.tool_calls:
        message.content = message.content or None
