"""Forms that an answer must have: what the embedded model says at a high temperature still has them."""

import contextlib
import functools
import itertools
import json
import os
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from llguidance import LLMatcher

from jaxserve import LLM, RequestError, SamplingParams
from jaxserve.checkpoints.hub import EMBEDDED
from jaxserve.guidance import Guide, Guides
from jaxserve.request import Output, Request, StructuredOutputs
from jaxserve.tokenizer import Tokenizer
from tests.jaxserve.conftest import tokens, word_tokenizer
from tests.jaxserve.test_product import engine

pytestmark = pytest.mark.xdist_group("embedded")  # compiled in one process
VOCABULARY, EOS = 4096, 1
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
LARK = """
start: call
call: NAME "(" (NAME ("," NAME)*)? ")"
NAME: /[a-z]{1,5}/
"""


def is_person(text):
    found = json.loads(text)
    return set(found) == {"name", "age"} and len(found["name"]) <= 8 and 0 <= found["age"] <= 99


def is_object(text):
    return isinstance(json.loads(text), dict)


FORMS = {
    "schema": ({"json": SCHEMA}, is_person),
    "schema as text": ({"json": json.dumps(SCHEMA)}, is_person),
    "object": ({"json_object": True}, is_object),
    "regex": ({"regex": r"[a-f]{3}-\d{1,4}(\.\d\d)?"}, re.compile(r"[a-f]{3}-\d{1,4}(\.\d\d)?").fullmatch),
    "choice": (
        {"choice": ["red", "reddish", "dark\ngreen", 'a\x7f"\\é😀']},
        {"red", "reddish", "dark\ngreen", 'a\x7f"\\é😀'}.__contains__,
    ),
    "grammar": ({"grammar": LARK}, re.compile(r"[a-z]{1,5}\(([a-z]{1,5}(,[a-z]{1,5})*)?\)").fullmatch),
}
FREE = SamplingParams(temperature=1.0, seed=3, max_tokens=12, ignore_eos=True)


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(EMBEDDED)


@functools.cache
def guides() -> Guides:
    return Guides(tokenizer(), VOCABULARY, [EOS])


def guided(form: str, seed=0, max_tokens=60, **more) -> SamplingParams:
    wanted = StructuredOutputs(**FORMS[form][0])
    return SamplingParams(structured_outputs=wanted, temperature=1.5, seed=seed, max_tokens=max_tokens, **more)


def guide(**form):
    found = guides().make(SamplingParams(structured_outputs=StructuredOutputs(**form)))
    assert found is not None
    return found


def serve(guessing: bool, params: list[SamplingParams]) -> list[list[Output]]:
    """All outputs for one prompt with each of some params, together; guesses are always verified, or never."""
    subject, outputs = engine("embedded", 1), [[] for _ in params]
    gate = subject._gate
    subject._gate = gate._replace(entropy=jnp.float32(jnp.inf), rows=jnp.int32(16 if guessing else 0))
    for i, p in enumerate(params):
        subject.add(Request(str(i), (0, 70, 71), p))
    for count in itertools.count():
        if not subject.busy:
            subject._gate = gate
            return outputs
        assert count < 2000
        for output in subject.step():
            outputs[int(output.request_id)].append(output)


def text(outputs: list[Output]) -> str:
    return "".join(output.text for output in outputs)


def spelled(word: str) -> list[int]:
    """A token for each character."""
    return [next(i for i in range(VOCABULARY) if tokenizer().decode([i]) == letter) for letter in word]


def encoded(word: str) -> list[int]:
    return tokenizer().encode(word, add_special_tokens=False)


def allowed(row: np.ndarray) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist())


@functools.cache
def answers(guessing: bool) -> dict[tuple[str, int], list[Output]]:
    """Of every form with several seeds, sixteen at a time, one of them free."""
    cases = [(form, seed) for form in FORMS for seed in range(5)]
    found = {}
    for start in range(0, len(cases), 15):
        part = cases[start : start + 15]
        *outputs, free = serve(guessing, [*(guided(form, seed) for form, seed in part), FREE])
        found |= dict(zip(part, outputs, strict=True))
        found["free", start] = free
    return found


@pytest.mark.parametrize("form", FORMS)
def test_what_ends_by_itself_has_the_form_and_what_is_cut_off_begins_like_it(form):
    ended = [o for (name, _), o in answers(False).items() if name == form]
    assert {o[-1].finish_reason for o in ended} <= {"stop", "length"}
    for outputs in ended:
        if outputs[-1].finish_reason == "stop":
            assert FORMS[form][1](text(outputs)), text(outputs)
        else:
            assert len(tokens(outputs)) == 60
            assert guide(**FORMS[form][0]).push(tokens(outputs)) == 60


def test_most_forms_are_completed():
    reasons = [o[-1].finish_reason for (name, _), o in answers(False).items() if name not in ("free", "object")]
    assert reasons.count("stop") > len(reasons) / 2


def test_seeds_give_different_answers_of_the_same_form():
    assert len({text(answers(False)["regex", seed]) for seed in range(5)}) == 5


def test_guesses_change_no_answer():
    before = engine("embedded", 1).counters.accepted[0]
    guessed = {case: tokens(o) for case, o in answers(True).items()}
    assert guessed == {case: tokens(o) for case, o in answers(False).items()}
    assert engine("embedded", 1).counters.accepted[0] > before


@pytest.mark.parametrize("form", ["schema", "grammar"])
def test_an_answer_alone_is_that_of_a_batch(form):
    for guessing in (False, True):
        (alone,) = serve(guessing, [guided(form, 2)])
        assert tokens(alone) == tokens(answers(False)[form, 2])


def test_those_beside_guided_ones_say_what_they_say_alone():
    (alone,) = serve(False, [FREE])
    for guessing in (False, True):
        beside = [tokens(o) for (name, _), o in answers(guessing).items() if name == "free"]
        assert beside == [tokens(alone)] * 2


def test_an_answer_that_is_too_long_is_a_beginning_of_one():
    for (outputs,) in (serve(guessing, [guided("schema", 1, max_tokens=4)]) for guessing in (False, True)):
        assert outputs[-1].finish_reason == "length"
        assert tokens(outputs) == tokens(answers(False)["schema", 1])[:4]
        assert text(outputs).startswith("{")


@pytest.mark.parametrize("form", ["regex", "grammar"])
def test_a_complete_form_ends_the_answer_even_if_the_model_s_end_is_ignored(form):
    outputs = serve(True, [guided(form, seed, ignore_eos=True, skip_special_tokens=False) for seed in range(4)])
    for answer in outputs:
        assert answer[-1].finish_reason == "stop"
        assert FORMS[form][1](text(answer)), text(answer)


def test_samples_of_one_request_follow_the_form_each_by_itself():
    params = SamplingParams(**vars(guided("regex")) | {"n": 4})
    subject, texts = engine("embedded", 1), [""] * 4
    subject.add(Request("n", (0, 70, 71), params))
    while subject.busy:
        for output in subject.step():
            texts[output.index] += output.text
    assert all(map(FORMS["regex"][1], texts))
    assert texts == [text(answers(False)["regex", seed]) for seed in range(4)]


def test_bad_words_hold_within_a_form():
    word = next(w for w in map("".join, itertools.permutations("abcdef", 2)) if encoded(w) == spelled(w))
    how = {"allowed_token_ids": spelled(word), "temperature": 1.5, "max_tokens": 20}
    free, bad = (
        [SamplingParams(structured_outputs=StructuredOutputs(regex=f"[{word}]{{8}}"), seed=s, bad_words=bad, **how)
         for s in range(4)] for bad in (None, [word])
    )  # fmt: skip
    assert any(word in text(outputs) for outputs in serve(True, free))
    for guessing in (False, True):
        for outputs in serve(guessing, bad):
            assert len(text(outputs)) == 8 and word not in text(outputs)


@pytest.mark.parametrize("guessing", [False, True])
def test_an_answer_is_over_where_its_form_is_complete_though_nothing_could_follow(guessing):
    """A guess may reach past that place, where no token is allowed."""
    how = {"allowed_token_ids": spelled("a"), "temperature": 0.0, "max_tokens": 20}
    lengths = [6, 7, 8, 9, 12]
    forms = [StructuredOutputs(regex=f"a{{{n}}}") for n in lengths]
    found = serve(guessing, [SamplingParams(structured_outputs=form, **how) for form in forms])
    assert [(text(o), o[-1].finish_reason) for o in found] == [("a" * n, "stop") for n in lengths]


def test_an_answer_that_fails_keeps_what_it_had_said():
    form = StructuredOutputs(regex="aa[bc]{8}")
    params = SamplingParams(structured_outputs=form, allowed_token_ids=spelled("a"), stop=["aaa"], max_tokens=20)
    for guessing in (False, True):
        (stuck,) = serve(guessing, [params])
        assert (text(stuck), stuck[-1].finish_reason) == ("aa", "error")


def test_a_form_that_can_go_on_nowhere_fails_alone():
    (stuck, free) = serve(False, [SamplingParams(
        structured_outputs=StructuredOutputs(regex="[ab]{8}"), allowed_token_ids=spelled("c")), FREE])  # fmt: skip
    assert (stuck[-1].finish_reason, tokens(stuck)) == ("error", [])
    assert "no token is allowed here" in (stuck[-1].error or "")
    assert free[-1].finish_reason == "length"


def test_bits_are_the_tokens_that_may_come_next_and_after_each_guess():
    a, b, c = spelled("abc")
    rows = guide(regex="abc|ac").bits([a, b])
    assert rows.shape == (3, VOCABULARY // 32)
    assert {a} <= allowed(rows[0])
    assert all(tokenizer().decode([t]) in ("a", "ab", "abc", "ac") for t in allowed(rows[0]))
    assert {tokenizer().decode([t]) for t in allowed(rows[1])} <= {"b", "c", "bc"}
    assert {b, c} <= allowed(rows[1])
    assert allowed(rows[2]) == {c}


def test_after_a_guess_that_is_wrong_anything_is_allowed():
    a, b, c = spelled("abc")
    rows = guide(regex="abc").bits([a, c, b])
    assert [len(allowed(row)) < VOCABULARY for row in rows] == [True, False, False, False]


@pytest.mark.parametrize("guesses", ["b", "bc", "bcc", "c", "bb", ""])
def test_guesses_leave_the_guide_where_it_was(guesses):
    a, b, c = spelled("abc")
    subject, untouched = guide(regex="ab+c"), guide(regex="ab+c")
    assert subject.push([a]) == untouched.push([a]) == 1
    subject.bits(spelled(guesses))
    np.testing.assert_array_equal(subject.bits([b, c]), untouched.bits([b, c]))
    assert subject.push([b, b, c, a]) == 3
    assert subject.over


def test_what_follows_a_complete_form_is_not_taken():
    subject = guide(choice=["ab"])
    assert subject.push(spelled("abab")) == 2
    assert subject.over
    assert subject.push(spelled("a")) == 0


def test_the_model_s_end_is_allowed_where_the_form_may_end_and_nowhere_else():
    subject = guide(regex="ab*")
    assert EOS not in allowed(subject.bits([])[0])
    subject.push(spelled("a"))
    assert EOS in allowed(subject.bits([])[0])
    assert subject.push([EOS]) == 1
    assert subject.over


@pytest.mark.parametrize("vocabulary", [4096, 4100, 4128])
def test_a_mask_has_a_word_for_each_32_tokens_of_the_model(vocabulary):
    subject = Guides(tokenizer(), vocabulary, [EOS]).make(guided("regex"))
    assert subject.bits([]).shape == (1, -(-vocabulary // 32))
    assert max(allowed(subject.bits([])[0])) < 4096


def test_a_word_of_several_tokens_is_bad_only_after_its_beginning():
    a, b, c = spelled("abc")
    subject = Guide(VOCABULARY, None, [(a, b, c)])
    assert [c in allowed(row) for row in subject.bits([a, b, a])] == [True, True, False, True]
    subject.push([a])
    assert [c in allowed(row) for row in subject.bits([b])] == [True, False]
    assert not subject.over


def test_a_form_that_the_matcher_gives_up_allows_nothing_and_is_not_complete():
    guide(regex="a")
    matcher = LLMatcher(guides()._ll, LLMatcher.grammar_from_regex("[^\x00-\U0010ffff]"), log_level=0)
    subject = Guide(VOCABULARY, matcher, [])
    assert not subject.bits([]).any()
    assert not subject.over


PEOPLE = {"type": "array", "items": SCHEMA | {"additionalProperties": True}}
VALUE = [{"name": "Ann", "age": 3}, {"name": "", "age": 99, "more": {"deep": [1, [], {}], "b": None}}]


def follows(text: str, **form) -> bool:
    """Whether a text has the form, and is complete."""
    ids = [*encoded(text), EOS]
    return all(token in allowed(row) for token, row in zip(ids, guide(**form).bits(ids), strict=False))


@pytest.mark.parametrize("indent", [None, 0, 1, 2, 4, 8, "\t"])
@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": "), (",", ": "), (" , ", " : ")])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_json_may_be_compact_spaced_or_indented(indent, separators, end):
    value = {"people": VALUE}
    form = {"type": "object", "properties": {"people": PEOPLE}, "required": ["people"]}
    separators = separators if indent is None else (separators[0].rstrip(), separators[1])
    written = json.dumps(value, indent=indent, separators=separators).replace("\n", end)
    assert follows(written, json=form)
    assert follows(written, json=json.dumps(form))
    assert follows(written, json_object=True)


@pytest.mark.parametrize("form", [{"json": SCHEMA}, {"json_object": True}, {"json": "true"}, {"json": {}}])
@pytest.mark.parametrize("space", ["  ", "\t", "\n\n", "\n" + 41 * " ", " \n"])
def test_white_space_in_json_ends(form, space):
    assert follows('{"name": "a", "age": 1}', **form)
    assert not follows(f'{{{space}"name": "a", "age": 1}}', **form)
    assert not follows(f'{{"name":{space}"a", "age": 1}}', **form)


@pytest.mark.parametrize(
    ("own", "compact", "spaced", "loose"),
    [
        ({}, True, True, False),
        ({"coerce_one_of": True}, True, True, False),
        ({"item_separator": ";"}, False, False, False),
        ({"whitespace_flexible": False}, True, False, False),
        ({"whitespace_flexible": True}, True, True, True),
        ({"whitespace_pattern": " +"}, True, True, True),
    ],
)
def test_a_schema_says_itself_how_llguidance_reads_it(own, compact, spaced, loose):
    form = {"json": SCHEMA | {"x-guidance": own}}
    written = ['{"name":"a","age":1}', '{"name": "a", "age": 1}', '{"name":   "a",   "age":   1}']
    assert [follows(text, **form) for text in written] == [compact, spaced, loose]


REFUSED = [
    ({"json": "{"}, "json", "Expecting property name"),
    ({"json": '{}, "x": 1'}, "json", "Extra data"),
    ({"json": "[1]"}, "json", "schema must be an object"),
    ({"json": {"type": "banana"}}, "json", "Invalid type: banana"),
    ({"json": {"x-guidance": 1}}, "json", "invalid type"),
    ({"json": {"type": {1, 2}}}, "json", "set is not JSON serializable"),
    ({"json": {"const": float("nan")}}, "json", "not JSON compliant"),
    ({"json": {"not": {"type": "string"}}}, "json", 'Unimplemented keys: ["not"]'),
    ({"json": {"type": "integer", "minimum": 5, "maximum": 3}}, "json", "minimum (5) is greater than maximum (3)"),
    ({"json": {"type": "string", "pattern": "("}}, "json", "unclosed group"),
    ({"json": "[" * 100_000}, "json", "recursion"),
    ({"regex": "("}, "regex", "can't be followed: unclosed group"),
    ({"regex": r"(a)\1"}, "regex", "backreferences are not supported"),
    ({"regex": "(?=a)b"}, "regex", "look-around"),
    ({"regex": "[^\x00-\U0010ffff]"}, "regex", "no text has this form"),
    ({"regex": "\ud800"}, "regex", "surrogates not allowed"),
    ({"choice": ["\ud800"]}, "choice", "surrogates not allowed"),
    ({"grammar": "start: word"}, "grammar", 'unknown name: "word"'),
    ({"grammar": 'begin: "a"'}, "grammar", "no start rule"),
    ({"grammar": 'start: "a" ('}, "grammar", "1(13): Expected token ')'"),
    ({"grammar": "\n\nstart: /(/"}, "grammar", "at 3(8): invalid regex"),
    ({"grammar": 'start: start "a"'}, "grammar", "no text has this form"),
]


@pytest.fixture(scope="module")
def llm():
    return LLM(max_model_len=512, max_num_seqs=4, warmup=False)


@pytest.mark.parametrize(("form", "name", "reason"), REFUSED)
def test_a_form_that_can_not_be_followed_is_refused_before_anything_is_queued(llm, form, name, reason):
    with pytest.raises(RequestError) as error:
        llm.generate(["a", "b"], [FREE, SamplingParams(structured_outputs=StructuredOutputs(**form))])
    message = str(error.value)
    assert message.startswith(f"structured_outputs.{name} can't be followed: ")
    assert reason in message
    assert "\n" not in message and len(message) < 200
    assert not llm.engine.busy


def test_a_tokenizer_that_forms_can_not_be_followed_with_is_said_so():
    with pytest.raises(RequestError, match="structured_outputs can't be followed with this model's tokenizer: .*Fuse"):
        Guides(word_tokenizer(97), 97, [EOS]).make(guided("regex"))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_forms_that_explode_keep_little_memory():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    guide(json_object=True)
    before = resident()
    for regex in ("(a{1000}){998}", "(a{1000}){999}", "(a{1000}){1000}"):
        with contextlib.suppress(RequestError):
            guide(regex=regex).bits(())
    assert resident() - before < 200 << 20
