"""Whatever is said arrives as it was."""

import math
import socket
import threading
from contextlib import closing
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.counters import Counters
from jaxserve.fleet.instance import About, Gone, Refused, Said, Signs
from jaxserve.fleet.wire import (
    Abort,
    Add,
    Alive,
    Hello,
    Knock,
    Leave,
    Line,
    Pulse,
    Welcome,
    decode,
    encode,
    receive,
    send,
)
from jaxserve.identity import Identity
from jaxserve.parallel.errors import RequestError, TransferError
from jaxserve.parallel.frames import Frames
from jaxserve.request import Handover, Logprob, Output, Request, SamplingParams, StructuredOutputs
from jaxserve.serving import Memory
from jaxserve.tiers.counters import TierCounters
from tests.waiting import SOON

names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=5)
wholes, floats = st.integers(0, 2**31 - 1), st.floats(allow_nan=False)
tokens = st.lists(wholes, min_size=1, max_size=4)
counts = st.none() | st.integers(0, 20)
forms = st.one_of(
    st.builds(StructuredOutputs, json=names | st.dictionaries(names, st.lists(floats | names | st.none()))),
    st.builds(StructuredOutputs, regex=names),
    st.builds(StructuredOutputs, choice=st.lists(names, min_size=1)),
    st.builds(StructuredOutputs, grammar=names),
    st.just(StructuredOutputs(json_object=True)),
)
GIVEN = {
    "n": st.integers(1, 8),
    "temperature": st.floats(0, 2),
    "top_k": st.integers(-1, 100),
    "top_p": st.floats(0.01, 1),
    "min_p": st.floats(0, 1),
    "seed": st.none() | st.integers(0, 2**32 - 1),
    "repetition_penalty": st.floats(0.1, 9),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "logit_bias": st.none() | st.dictionaries(wholes, st.floats(-100, 100)),
    "allowed_token_ids": st.none() | tokens,
    "bad_words": st.none() | names | st.lists(names),
    "structured_outputs": st.none() | forms,
    "stop": st.none() | names | st.lists(names),
    "stop_token_ids": st.none() | tokens,
    "ignore_eos": st.booleans(),
    "max_tokens": st.none() | st.integers(1, 99),
    "min_tokens": st.just(0),
    "logprobs": counts,
    "prompt_logprobs": counts,
    "skip_special_tokens": st.booleans(),
    "include_stop_str_in_output": st.booleans(),
}
params = st.fixed_dictionaries(GIVEN).map(lambda given: SamplingParams(**given))
handovers = st.none() | st.builds(Handover, names, wholes, names, wholes)
requests = st.builds(
    Request, id=names, prompt_token_ids=tokens.map(tuple), params=params, prompt=st.none() | names,
    priority=st.integers(-9, 9), cache_salt=names, answered=tokens.map(tuple), export=st.booleans(), handover=handovers,
)  # fmt: skip
logprobs = st.dictionaries(wholes, st.builds(Logprob, floats, wholes, names), max_size=3)
outputs = st.builds(
    Output, request_id=names, index=wholes, text=names, token_ids=tokens.map(tuple),
    logprobs=st.lists(logprobs, max_size=2).map(tuple),
    finish_reason=st.sampled_from([None, "stop", "length", "error"]),
    stop_reason=st.none() | names | wholes, error=st.none() | names,
    prompt_logprobs=st.none() | st.lists(st.none() | logprobs, max_size=2).map(tuple), num_cached_tokens=wholes,
    queue_seconds=floats, handover=handovers, lost=st.booleans(),
)  # fmt: skip
tiers = st.builds(TierCounters, **{f.name: floats if f.type is float else wholes for f in fields(TierCounters)})
NESTED = {"accepted": st.lists(wholes), "tiers": st.dictionaries(names, tiers, max_size=2)}
PLAIN = {f.name: floats if f.type is float else wholes for f in fields(Counters) if f.name not in NESTED}
counters = st.builds(Counters, **PLAIN | NESTED)
signs = st.builds(Signs, wholes, st.booleans(), counters, st.builds(Memory, wholes, wholes), floats)
abouts = st.builds(
    About, names, st.sampled_from(["prefill", "decode"]),
    st.builds(Identity, names, wholes, names, names, names, wholes), wholes, wholes, wholes, wholes,
)  # fmt: skip
messages = st.one_of(
    st.builds(Hello, abouts, signs),
    st.builds(Knock, st.none() | wholes),
    st.builds(Welcome, floats, floats),
    st.builds(Add, requests),
    st.builds(Abort, names),
    st.builds(Pulse, signs),
    st.just(Alive()),
    st.just(Leave()),
    st.builds(Said, st.lists(outputs), st.booleans()),
    st.builds(Refused, names, names),
    st.builds(Gone, names),
)


def test_the_round_trip_covers_every_field():
    assert set(GIVEN) == {field.name for field in fields(SamplingParams)}
    for kind, strategy in {Request: requests, Output: outputs, Counters: counters}.items():
        drawn = strategy.wrapped_strategy.kwargs
        assert set(drawn) == {field.name for field in fields(kind)}


@given(messages)
def test_every_message_arrives_as_it_was(message):
    assert decode(encode(message)) == message


def test_scores_that_are_no_numbers_arrive_too():
    given = {1: Logprob(math.nan, 1, "a"), 2: Logprob(-math.inf, 2, "b")}
    (output,) = decode(encode(Said([Output("x", logprobs=(given,))]))).outputs
    assert math.isnan(output.logprobs[0][1].logprob) and output.logprobs[0][2] == given[2]


def test_numbers_of_numpy_and_lists_of_other_kinds_arrive_as_plain_ones():
    p = SamplingParams(
        logit_bias={np.int64(3): np.float32(0.5)}, allowed_token_ids=range(4), stop_token_ids=(np.int32(7),)
    )
    found = decode(encode(Add(Request("x", (5,), p)))).request.params
    assert (found.logit_bias, found.allowed_token_ids, found.stop_token_ids) == ({3: 0.5}, [0, 1, 2, 3], [7])


def test_text_that_no_wire_can_carry_is_refused():
    request = Request("x", (5,), SamplingParams(stop="\ud800"))
    with pytest.raises(RequestError, match="can't be written as UTF-8"):
        encode(Add(request))
    with pytest.raises(RequestError, match="can't be sent to an instance"):
        encode(Add(replace(request, params=SamplingParams(structured_outputs=StructuredOutputs(json={"a": object()})))))


@pytest.fixture
def ends():
    """Of a connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    with closing(Frames(ours, 5.0)) as sender, closing(Frames(theirs, 5.0)) as receiver:
        yield sender, receiver


@pytest.mark.parametrize("words", [{"size": -1}, {"size": 2**40}, {"size": "x"}, {}])
def test_a_message_that_makes_no_sense_ends_the_line(ends, words):
    sender, receiver = ends
    sender.send(0, words)
    with pytest.raises(TransferError, match="a message has"):
        receive(receiver)
    sender.send(0, {"size": 3}, [memoryview(b"\xc1\xc1\xc1")])
    with pytest.raises(TransferError, match="makes no sense"):
        receive(receiver)


@pytest.mark.parametrize("begun", [b"", b"\0", b"\0\0\0\0\x0bnot all of"])
def test_a_line_that_falls_silent_ends_in_time_be_it_amid_a_message(ends, begun):
    sender, receiver = ends
    send(sender, Alive())
    sender._push(memoryview(begun))
    heard = []
    assert str(Line(receiver, Alive, 60.0, 0.3).run(heard.append)) == "nothing was heard of it for 0.3 s"
    assert heard == [Alive()]


def test_a_line_on_which_silence_is_somebody_else_s_to_judge_ends_with_the_connection(ends):
    sender, receiver = ends
    sender._push(memoryview(b"\0"))
    line, reasons = Line(receiver, Alive, 0.01), []
    thread = threading.Thread(target=lambda: reasons.append(line.run(lambda _: None)))
    thread.start()
    assert receive(sender) == Alive()
    sender.close()
    thread.join(SOON)
    assert "the other end has closed it" in str(reasons[0]) or "reset" in str(reasons[0])
