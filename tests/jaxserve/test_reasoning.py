import functools
import json
import re
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.chat import render_chat
from jaxserve.checkpoints.hub import EMBEDDED
from jaxserve.guidance import Guides
from jaxserve.reasoning import ReasoningParser, Said, after_thoughts, is_open, thinks
from jaxserve.request import SamplingParams, StructuredOutputs
from jaxserve.tokenizer import Tokenizer

GOLDENS = Path(__file__).parents[1] / "oracles/chat"
QWEN = json.loads((GOLDENS / "qwen.json").read_text())["template"]


def split(prompt: str, *pieces: str, skipped=()) -> Said:
    parser = ReasoningParser(prompt, skipped)
    parts = [*map(parser.push, pieces), parser.finish()]
    return Said("".join(p.reasoning for p in parts), "".join(p.content for p in parts))


CASES = [
    ("<think>\nSo.\n\nYes. \n</think>\n\nIt is. \n", Said("So.\n\nYes.", "It is. \n")),
    ("So.</think>It is.", Said("", "So.</think>It is.")),
    (" \nNo <think>thoughts</think> here", Said("", " \nNo <think>thoughts</think> here")),
    ("\n<think>a</think>b<think>c</think>", Said("a", "b<think>c</think>")),
    ("<think>a<think>b</think>c</think>", Said("a<think>b", "c</think>")),
    ("<think>\n\n</think>\n\nIt is.", Said("", "It is.")),
    ("<think>cut off ", Said("cut off ", "")),
    ("<think>cut </thi", Said("cut </thi", "")),
    ("<think> \n", Said("", "")),
    ("", Said("", "")),
    (" \n", Said("", " \n")),
]


@pytest.mark.parametrize(("answer", "expected"), CASES)
def test_thoughts_are_what_stands_between_the_marks_where_an_answer_begins(answer, expected):
    assert split("<|im_start|>assistant\n", answer) == expected


@pytest.mark.parametrize(("answer", "expected"), [case for case in CASES if case[0].startswith("<think>")])
def test_thoughts_may_be_opened_by_the_prompt(answer, expected):
    assert split("<｜Assistant｜><think>\n", answer.removeprefix("<think>")) == expected


@pytest.mark.parametrize("answer", ["It is.", "<think>It</think> is.", "</think>"])
def test_thoughts_may_be_left_out_by_the_prompt(answer):
    assert split("assistant\n<think>\n\n</think>\n\n", answer) == split("</think>", f"\n{answer}") == Said("", answer)


def expected(prompt: str, text: str) -> Said:
    """By a regular expression, of the whole text."""
    begins = {"": r"\s*<think>", "<think>": ""}
    found = prompt in begins and re.fullmatch(begins[prompt] + "(.*?)(</think>.*)?", text, re.DOTALL)
    if not found:
        return Said("", text.lstrip() if prompt else text)
    thoughts, rest = found[1].lstrip(), found[2]
    return Said(thoughts, "") if rest is None else Said(thoughts.rstrip(), rest.removeprefix("</think>").lstrip())


@given(
    st.sampled_from(["", "<think>", "</think>"]),
    st.lists(st.sampled_from(["<think>", "</think>", "<|x|>", "<th", "a", "b", " ", "\n", "<"])).map("".join),
    st.data(),
)
def test_however_the_text_is_cut_the_same_is_said_and_nothing_is_lost(prompt, text, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert split(prompt, *pieces) == expected(prompt, text)
    assert split(prompt, *pieces, skipped=["<|x|>"]) == expected(prompt, text.replace("<|x|>", ""))


def test_thoughts_and_content_are_returned_as_they_come():
    parser = ReasoningParser("")
    said = [parser.push(piece) for piece in ("<thi", "nk>\nSo", " I\n", "</think", ">\n\n", "Yes", ". \n")]
    assert said == [("", ""), ("So", ""), (" I", ""), ("", ""), ("", ""), ("", "Yes"), ("", ".")]
    assert parser.finish() == ("", " \n")


def test_a_template_tells_whether_its_model_thinks_and_the_prompt_whether_it_does_already():
    assert thinks(QWEN) and not thinks("{{ messages[0]['content'] }}")
    prompts = [render_chat(QWEN, [{"role": "user", "content": "<think>"}], enable_thinking=t) for t in (True, False)]
    assert [is_open(prompt) for prompt in [*prompts, "<｜Assistant｜><think>\n", ""]] == [False, False, True, False]
    assert [split(prompt, "<think>a</think>b") for prompt in prompts] == [("a", "b"), ("", "<think>a</think>b")]


@functools.cache
def tokenizer(special: bool | None) -> Tokenizer:
    """The embedded model's, with a token for the end of thoughts: special, ordinary, or (None) without."""
    backend = tokenizers.Tokenizer.from_file(str(EMBEDDED / "tokenizer.json"))
    if special is not None:
        backend.add_tokens([tokenizers.AddedToken("</think>", normalized=False, special=special)])
    return Tokenizer(backend)


@pytest.mark.parametrize("special", [True, False, None])
@pytest.mark.parametrize(
    ("answer", "allowed"),
    [
        ('I.\n</thin></think>\n\n{"a": 1}', True),
        ('</think>{"a": "<think>"}', True),
        ("I.</think>\n\n\n{}", False),
        ("I.</think>I.</think>{}", False),
        ("{}", False),
    ],
)
def test_a_form_may_come_after_thoughts(special, answer, allowed):
    subject = tokenizer(special)
    grammar = after_thoughts('start: %json {"type": "object"}', subject.added)
    params = SamplingParams(structured_outputs=StructuredOutputs(grammar=grammar))
    guide = Guides(subject, 4128, [1]).make(params)
    assert guide is not None
    tokens = [*subject.encode(answer, add_special_tokens=False), 1]
    rows = guide.bits(tokens)
    assert all(row[token // 32] >> (token % 32) & 1 for token, row in zip(tokens, rows, strict=False)) == allowed
