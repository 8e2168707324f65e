import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.completion import Completion
from jaxserve.request import Request, SamplingParams, StructuredOutputs


class Words:
    """A stand-in for a text stream: token i is the i-th of some words."""

    def __init__(self, words):
        self.words = words

    def push(self, ids):
        return "".join(self.words[i] for i in ids)

    def finish(self):
        return ""


def run(words, **params):
    """The outputs of an answer whose tokens are `words`, in order; the last word's token is the end."""
    request = Request("r", (0,), SamplingParams(**{"max_tokens": 1000, **params}))
    completion = Completion(request, 0, Words(words), [len(words) - 1], limit=request.params.max_tokens)
    outputs = []
    for token in range(len(words)):
        outputs.append(completion.push([token]))
        if outputs[-1].finish_reason:
            break
    return outputs


def text(outputs):
    return "".join(output.text for output in outputs)


def test_a_stop_text_that_spans_tokens_is_cut_off_with_what_follows_it():
    outputs = run(["one ", "tw", "o th", "ree", "<end>"], stop="two")
    assert text(outputs) == "one "
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("stop", "two")
    assert len(outputs) == 3


def test_what_may_begin_a_stop_text_is_held_back_until_it_does_not():
    outputs = run(["a", "ST", "OX", "b", "<end>"], stop="STOP")
    assert [output.text for output in outputs[:3]] == ["a", "", "STOX"]


def test_held_back_text_comes_with_the_end():
    outputs = run(["a", "ST", "<end>"], stop="STOP")
    assert text(outputs) == "aST"
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("stop", None)


def test_the_first_of_several_stop_texts_counts():
    assert text(run(["x--y", "++z", "<end>"], stop=["++", "--"])) == "x"


def test_the_end_token_has_no_text():
    assert text(run(["a", "b", "<end>"])) == "ab"


def test_ignoring_the_end_shows_it_and_goes_on_to_the_limit():
    outputs = run(["a", "b", "<end>"], ignore_eos=True, max_tokens=3)
    assert text(outputs) == "ab<end>"
    assert outputs[-1].finish_reason == "length"


def test_a_stop_text_before_min_tokens_does_not_end_the_answer():
    outputs = run(["a", "!", "b", "!", "c", "<end>"], stop="!", min_tokens=4)
    assert text(outputs) == "a!b"


@given(st.lists(st.text("ab", min_size=1, max_size=3), max_size=12), st.text("ab", min_size=1, max_size=4))
def test_text_is_what_stands_before_the_stop_text_however_it_is_cut(words, stop):
    outputs = run([*words, "<end>"], stop=stop)
    assert text(outputs) == "".join(words).split(stop)[0]


@given(st.lists(st.text("ab", min_size=1, max_size=3), max_size=12), st.text("ab", min_size=1, max_size=4))
def test_text_ends_with_the_stop_text_if_that_is_asked_for(words, stop):
    before, found, _ = "".join(words).partition(stop)
    assert text(run([*words, "<end>"], stop=stop, include_stop_str_in_output=True)) == before + found


def test_a_stop_token_of_one_s_own_is_the_reason_and_has_no_text():
    outputs = run(["a", "b", "c", "<end>"], stop_token_ids=[1])
    assert text(outputs) == "a"
    assert (outputs[-1].token_ids, outputs[-1].finish_reason, outputs[-1].stop_reason) == ((1,), "stop", 1)


def test_tokens_after_the_one_that_ends_the_answer_do_not_count():
    completion = Completion(Request("r", (0,), SamplingParams(stop="b")), 0, Words("abcd"), [3], limit=9)
    output = completion.push([0, 1, 2, 3], [{}, {}, {}, {}])
    assert (output.text, output.token_ids, len(output.logprobs), output.stop_reason) == ("a", (0, 1), 2, "b")


def test_what_is_over_ends_with_its_last_token():
    completion = Completion(Request("r", (0,), SamplingParams(stop="bx")), 0, Words("ab"), [], limit=9)
    output = completion.push([0, 1], over=True)
    assert (output.text, output.finish_reason, output.stop_reason) == ("ab", "stop", None)


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_the_end_of_a_form_has_no_text_even_if_the_model_s_end_is_ignored(ignore_eos):
    form = StructuredOutputs(regex="a+")
    outputs = run(["a", "<end>"], structured_outputs=form, ignore_eos=ignore_eos)
    assert (text(outputs), outputs[-1].finish_reason) == ("a", "stop")


@pytest.mark.parametrize("limit", [1, 3])
def test_an_answer_has_at_most_max_tokens(limit):
    outputs = run(["a"] * 5 + ["<end>"], max_tokens=limit)
    assert len(outputs) == limit
    assert outputs[-1].finish_reason == "length"
