import math

import numpy as np
import pytest

from jaxserve import LLM, RequestError, SamplingParams
from jaxserve.request import StructuredOutputs

NAN, INF = math.nan, math.inf
NUMBERS = {
    "temperature": ("a finite number, 0 or more", [-0.1, 1e300]),
    "top_p": ("a number above 0 and at most 1", [0.0, 0, -0.5, 1.1]),
    "min_p": ("a number from 0 to 1", [-0.1, 1.5]),
    "repetition_penalty": ("a number above 0", [0.0, -1.0, 1e-40, 1e7]),
    "presence_penalty": ("a number from -2 to 2", [-2.1, 2.1]),
    "frequency_penalty": ("a number from -2 to 2", [-2.1, 2.1]),
}
WHOLE = {
    "n": ("a whole number from 1 to 1024", [0, -1, 1025, None]),
    "top_k": ("a whole number, 0 (off) or more", [-2, 2**40, None]),
    "seed": ("a whole number from 0 to 2**32 - 1, or None", [-1, 2**32]),
    "max_tokens": ("a whole number, 1 or more, or None", [0, -5]),
    "min_tokens": ("a whole number from 0 to max_tokens (16)", [-1, 17, None]),
    "logprobs": ("a whole number from 0 to 20, or None", [-1, 21]),
    "prompt_logprobs": ("a whole number from 0 to 20, or None", [-1, 21]),
}
FLAGS = ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output")
TEXTS = "a text or several, none empty, or None"
IDS = "a list of token ids"
OTHERS = {
    "logit_bias": (
        "a dict from token ids to a number from -100 to 100 each, or None",
        [{5: 101}, {5: -101.0}, {5: NAN}, {5: "1"}, {5: True}, {"5": 1.0}, {-1: 1.0}, {5: None}, [(5, 1.0)], 5],
    ),
    "allowed_token_ids": (IDS + ", not empty, or None", [[], [-1], ["5"], [1.0], [True], "12", b"12", 5, {5}, {5: 1}]),
    "stop_token_ids": (IDS + " (whole numbers), or None", [[-1], ["x"], [None], [2.0], [True], "12", 5, {5}]),
    "bad_words": (TEXTS, ["", ["a", ""], [3], 5, b"a", [b"a"], {"a"}, [["a"]], [None]]),
    "stop": (TEXTS, ["", ["a", ""], [3], 5, b"a", [b"a"], {"a"}, [["a"]], [None], True]),
    "structured_outputs": ("StructuredOutputs(...), or None", [{"regex": "a"}, "a", True, StructuredOutputs]),
}
BAD = [
    *(
        (name, value, rule)
        for name, (rule, some) in NUMBERS.items()
        for value in [*some, NAN, INF, True, None, "1", [1]]
    ),
    *((name, value, rule) for name, (rule, some) in WHOLE.items() for value in [*some, 2.5, 1.0, NAN, True, "1", [1]]),
    *((name, value, "True or False") for name in FLAGS for value in (None, 0, 1, "yes", np.True_)),
    *((name, value, rule) for name, (rule, some) in OTHERS.items() for value in some),
]


@pytest.mark.parametrize(("field", "value", "rule"), BAD, ids=lambda v: str(v)[:20])
def test_a_field_out_of_range_is_refused_with_its_name_and_range(field, value, rule):
    with pytest.raises(RequestError) as error:
        SamplingParams(**{field: value})
    message = str(error.value)
    assert message.startswith(f"{field} = ")
    assert rule in message.partition(": it must be ")[2]
    assert len(message) < 160


def test_every_field_is_in_the_table_of_bad_values():
    assert {name for name, _, _ in BAD} == set(vars(SamplingParams()))


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        ({"max_tokens": 3, "min_tokens": 4}, "min_tokens = 4: it must be a whole number from 0 to max_tokens (3)"),
        ({"max_tokens": None, "min_tokens": -1}, "min_tokens = -1: it must be a whole number from 0 to 2**31 - 1"),
        ({"min_tokens": 2, "structured_outputs": StructuredOutputs(regex="a")}, "min_tokens can't be set with struct"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(given, rule):
    with pytest.raises(RequestError) as error:
        SamplingParams(**given)
    assert str(error.value).startswith(rule)


def test_a_long_value_is_shortened_in_the_message():
    with pytest.raises(RequestError) as error:
        SamplingParams(stop_token_ids=[*range(100_000), -1])
    assert str(error.value).startswith("stop_token_ids = [0, 1, 2, ")
    assert len(str(error.value)) < 200


def test_an_unknown_field_is_refused():
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=1.0)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="jsn"):
        StructuredOutputs(jsn={})  # type: ignore[call-arg]


EDGES = [
    {"temperature": 0}, {"temperature": 1e-300}, {"temperature": 1e6}, {"top_k": -1}, {"top_k": 2**31 - 1},
    {"top_p": 1}, {"top_p": 1e-9}, {"min_p": 1}, {"seed": 0}, {"seed": 2**32 - 1}, {"presence_penalty": -2},
    {"repetition_penalty": 1e-6}, {"logit_bias": {}}, {"logit_bias": {0: -100, 5: 100}}, {"stop": []}, {"stop": ("a",)},
    {"stop_token_ids": ()}, {"allowed_token_ids": range(3)}, {"bad_words": "a"}, {"max_tokens": None, "min_tokens": 99},
    {"max_tokens": 4, "min_tokens": 4}, {"logprobs": 0}, {"prompt_logprobs": 20}, {"n": 1024},
]  # fmt: skip


@pytest.mark.parametrize("given", EDGES, ids=str)
def test_the_ends_of_each_range_are_accepted(given):
    assert {name: getattr(SamplingParams(**given), name) for name in given} == given


def test_numpy_s_numbers_are_taken_as_python_s():
    params = SamplingParams(
        temperature=np.float32(0.5), top_k=np.uint8(200), seed=np.uint32(2**32 - 1), max_tokens=np.int64(9),
        stop_token_ids=[np.int64(3)], logit_bias={np.int32(4): np.float32(0.5)},
    )  # fmt: skip
    assert (params.temperature, params.top_k, params.seed, params.max_tokens) == (0.5, 200, 2**32 - 1, 9)
    assert [type(v) for v in (params.temperature, params.top_k, params.seed, params.max_tokens)] == [float] + 3 * [int]
    assert params.stop_token_ids == [3] and params.logit_bias == {4: 0.5}
    with pytest.raises(RequestError, match="top_p = .*nan"):
        SamplingParams(top_p=np.float32("nan"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "structured_outputs has nothing; give one of json, regex, choice, grammar, json_object"),
        ({"json_object": False}, "structured_outputs has nothing"),
        ({"json": {}, "regex": "a"}, "structured_outputs has json and regex; give one of"),
        ({"json_object": True, "choice": []}, "structured_outputs has choice and json_object"),
        ({"json": 5}, "structured_outputs.json = 5: it must be a JSON schema, as a text or a dict"),
        ({"json": ["a"]}, "structured_outputs.json = ['a']: it must be a JSON schema"),
        ({"json": True}, "structured_outputs.json = True: it must be a JSON schema"),
        ({"json": ""}, "structured_outputs.json = '': it must be a JSON schema"),
        ({"regex": 5}, "structured_outputs.regex = 5: it must be a text, not empty"),
        ({"regex": b"a"}, "structured_outputs.regex = b'a': it must be a text, not empty"),
        ({"regex": ""}, "structured_outputs.regex = '': it must be a text, not empty"),
        ({"grammar": ""}, "structured_outputs.grammar = '': it must be a text in Lark's notation"),
        ({"grammar": ["a"]}, "structured_outputs.grammar = ['a']: it must be a text in Lark's notation"),
        ({"choice": "red"}, "structured_outputs.choice = 'red': it must be a list of texts, none empty"),
        ({"choice": []}, "structured_outputs.choice = []: it must be a list of texts"),
        ({"choice": ()}, "structured_outputs.choice = (): it must be a list of texts"),
        ({"choice": ["a", ""]}, "structured_outputs.choice = ['a', '']: it must be a list of texts"),
        ({"choice": ["a", 1]}, "structured_outputs.choice = ['a', 1]: it must be a list of texts"),
        ({"choice": {"a"}}, "structured_outputs.choice = {'a'}: it must be a list of texts"),
        ({"choice": b"ab"}, "structured_outputs.choice = b'ab': it must be a list of texts"),
        ({"json_object": 1}, "structured_outputs.json_object = 1: it must be True or False"),
        ({"json_object": "yes"}, "structured_outputs.json_object = 'yes': it must be True or False"),
    ],
)
def test_a_form_must_be_one_and_of_its_kind(given, message):
    with pytest.raises(RequestError) as error:
        StructuredOutputs(**given)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("form", [{"json": "{}"}, {"json": {}}, {"regex": "a"}, {"choice": ("a",)}, {"grammar": "x"}])
def test_a_form_knows_its_name(form):
    assert StructuredOutputs(**form).name == next(iter(form))


def test_one_stop_text_may_be_given_without_a_list():
    assert SamplingParams(stop="END").stops == ("END",)
    assert SamplingParams(bad_words="END").bad_texts == ("END",)


@pytest.fixture(scope="module")
def llm():
    return LLM(max_model_len=512, max_num_seqs=4, warmup=False)


@pytest.mark.parametrize(
    ("prompt", "given", "message"),
    [
        ([5] * 512, {}, "prompt has 512 tokens; this engine accepts 511 (max_model_len 512 less one). Raise max_"),
        ("a", {"stop_token_ids": [4096]}, "stop_token_ids has 4096; the model's tokens are 0 to 4095"),
        ("a", {"allowed_token_ids": [1, 5000]}, "allowed_token_ids has 5000; the model's tokens are 0 to 4095"),
        ("a", {"logit_bias": {9999: 1.0}}, "logit_bias has 9999; the model's tokens are 0 to 4095"),
        ("a", {"structured_outputs": StructuredOutputs(regex="(")}, "structured_outputs.regex can't be followed: "),
    ],
)
def test_what_the_model_can_not_serve_is_refused_before_anything_is_queued(llm, prompt, given, message):
    with pytest.raises(RequestError) as error:
        llm.generate(["fine", prompt], [SamplingParams(), SamplingParams(**given)])
    assert str(error.value).startswith(message)
    assert not llm.engine.busy
