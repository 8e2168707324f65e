import signal
from types import SimpleNamespace

import pytest

from jaxserve import speakers
from jaxserve.client import Client
from jaxserve.conversation import Piece
from jaxserve.parallel.errors import RequestError, ServerError
from jaxserve.request import Output, SamplingParams
from tests.jaxserve.openai_server import Fake, serving

HI = [{"role": "user", "content": "Hi"}]
TWO = SamplingParams(max_tokens=2)


def model(*outputs: Output | int, template: str = ""):
    """An LLM that gives these outputs; in place of a number, that signal comes first. Notes when it was closed."""
    closed = []

    def stream(prompts, params):
        assert params.skip_special_tokens == (not template)
        try:
            for output in outputs:
                if isinstance(output, int):
                    signal.raise_signal(output)
                else:
                    yield output
        finally:
            closed.append(prompts)

    tokenizer = SimpleNamespace(
        apply_chat_template=lambda messages: [len(messages)],
        chat_templates={"default": template},
        decode=lambda ids, skip_special_tokens: "<|assistant|><think>\n",
        special={"<think>", "</think>", "<eos>"},
    )
    return SimpleNamespace(tokenizer=tokenizer, stream=stream), closed


def test_a_model_answers_what_its_template_makes_of_the_messages():
    llm, closed = model(Output("0", text="a"), Output("0", text="b", finish_reason="length"))
    assert list(speakers.of_model(llm, TWO)(HI)) == [Piece("a"), Piece("b", cut=True)]
    assert closed == [[[1]]]


def test_thoughts_are_told_from_the_answer_and_special_tokens_left_out():
    said = "so", " be</thi", "nk>\n\nYes", ".", "<eos>"
    outputs = [Output("0", text=text) for text in said[:-1]] + [Output("0", text=said[-1], finish_reason="stop")]
    llm, _ = model(*outputs, template="{{ '</think>' }}")
    pieces = list(speakers.of_model(llm, TWO)(HI))
    assert ("".join(piece.thoughts for piece in pieces), "".join(piece.text for piece in pieces)) == ("so be", "Yes.")


def test_ctrl_c_amid_a_step_waits_for_its_end():
    llm, closed = model(Output("0", text="a"), signal.SIGINT, Output("0", text="b"), Output("0", text="c"))
    before = signal.getsignal(signal.SIGINT)
    pieces = speakers.of_model(llm, TWO)(HI)
    assert next(pieces) == Piece("a")
    with pytest.raises(KeyboardInterrupt):
        next(pieces)
    assert (len(closed), signal.getsignal(signal.SIGINT)) == (1, before)


def test_an_answer_that_failed_is_told():
    llm, _ = model(Output("0", finish_reason="error", error="a grammar without a way on"))
    with pytest.raises(RequestError, match="the answer failed: a grammar without a way on"):
        list(speakers.of_model(llm, TWO)(HI))


def test_a_server_is_sent_the_messages_and_no_option_that_is_off():
    fake = Fake()
    with serving(fake.app()) as url, Client(url) as client:
        pieces = list(speakers.of_server(client, "m", SamplingParams(max_tokens=2, seed=3, top_k=5))(HI))
    assert ("".join(piece.text for piece in pieces), pieces[-1]) == ("w0 w1 ", Piece("", cut=True))
    (body,) = fake.asked
    sent = {"model": "m", "messages": HI, "max_tokens": 2, "temperature": 1.0, "top_p": 1.0, "seed": 3, "top_k": 5}
    assert body == sent | {"stream": True, "stream_options": {"include_usage": True}}


def test_a_server_that_breaks_off_is_an_error_after_what_came():
    with serving(Fake().app()) as url, Client(url) as client:
        pieces = speakers.of_server(client, "m", TWO)([{"role": "user", "content": "break"}])
        assert next(piece.text for piece in pieces if piece.text) == "w0 "
        with pytest.raises(ServerError, match="a step failed"):
            list(pieces)
