"""Who answers a conversation: a model in this process, or one behind a server."""

import signal
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from jaxserve.chat import choose_template
from jaxserve.conversation import Message, Piece, Speak
from jaxserve.parallel.errors import RequestError
from jaxserve.reasoning import TAIL, ReasoningParser, thinks
from jaxserve.request import Output, SamplingParams
from jaxserve.tokenizer import Tokenizer

if TYPE_CHECKING:
    from jaxserve.client import Client
    from jaxserve.llm import LLM


def of_model(llm: "LLM", params: SamplingParams) -> Speak:
    """Answers of a model in this process. Ctrl-C stops them between two steps."""

    def speak(messages: Sequence[Message]) -> Generator[Piece, None, None]:
        prompt = llm.tokenizer.apply_chat_template(messages)
        parser = _parser(llm.tokenizer, prompt)
        outputs = llm.stream([prompt], replace(params, skip_special_tokens=parser is None))
        outputs = cast("Generator[Output, None, None]", outputs)
        try:
            while True:
                with _uninterrupted():
                    output = next(outputs, None)
                if output is None:
                    return
                if output.finish_reason == "error":
                    raise RequestError(f"the answer failed: {output.error}")
                yield _piece(output, parser)
        finally:
            with _uninterrupted():
                outputs.close()

    return speak


def of_server(client: "Client", model: str, params: SamplingParams) -> Speak:
    """Answers of a server. What is off is not sent: not every server knows all of vLLM's names."""
    off = {"max_tokens": None, "temperature": None, "top_p": None, "seed": None, "top_k": 0, "min_p": 0, "stop": None}
    common = {name: getattr(params, name) for name, none in off.items() if getattr(params, name) != none}

    def speak(messages: Sequence[Message]) -> Generator[Piece, None, None]:
        body = {"model": model, "messages": list(messages), **common}
        for chunk in client.stream("/v1/chat/completions", body):
            for choice in chunk.get("choices") or ():
                said, cut = choice.get("delta") or {}, choice.get("finish_reason") == "length"
                yield Piece(said.get("content") or "", said.get("reasoning_content") or "", cut)

    return speak


def _parser(tokenizer: Tokenizer, prompt: Sequence[int]) -> ReasoningParser | None:
    """Of thoughts, if the model has any. It sees special tokens, for its marks may be such, and leaves them out."""
    if not thinks(choose_template(tokenizer.chat_templates)):
        return None
    return ReasoningParser(tokenizer.decode(prompt[-TAIL:], skip_special_tokens=False), tokenizer.special)


def _piece(output: Output, parser: ReasoningParser | None) -> Piece:
    """What an output adds, thoughts told from text."""
    cut = output.finish_reason == "length"
    if parser is None:
        return Piece(output.text, cut=cut)
    said = [parser.push(output.text), *([parser.finish()] if output.finish_reason else [])]
    return Piece("".join(one.content for one in said), "".join(one.reasoning for one in said), cut)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Holds Ctrl-C back until the end: broken off amid a step, an engine would have lost count."""
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt
