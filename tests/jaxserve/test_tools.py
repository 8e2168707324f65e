"""Calls of tools in each family's own format, as its templates and model cards write them."""

import functools
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.chat import render_chat
from jaxserve.checkpoints.hub import EMBEDDED
from jaxserve.guidance import Guides
from jaxserve.parallel.errors import RequestError
from jaxserve.request import SamplingParams, StructuredOutputs
from jaxserve.tokenizer import Tokenizer
from jaxserve.tools import FORMATS, ToolCall, ToolFormat, find_format

QWEN = json.loads((Path(__file__).parents[1] / "oracles/chat/qwen.json").read_text())["template"]
NAMES = {format.name: format for format in FORMATS}
VOCABULARY, EOS = 4200, 1


def hermes(name: str, arguments: str, index: int = 0) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def deepseek_v3(name: str, arguments: str, index: int = 0) -> str:
    return f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```<｜tool▁call▁end｜>"


def deepseek_v31(name: str, arguments: str, index: int = 0) -> str:
    return f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜>"


def kimi_k2(name: str, arguments: str, index: int = 0) -> str:
    call = f"functions.{name}:{index}<|tool_call_argument_begin|>{arguments}"
    return f"<|tool_call_begin|>{call}<|tool_call_end|>"


WRITERS = {"hermes": hermes, "deepseek_v3": deepseek_v3, "deepseek_v31": deepseek_v31, "kimi_k2": kimi_k2}
SECTIONS = {
    "hermes": ("", "\n", ""),
    "deepseek_v3": ("<｜tool▁calls▁begin｜>", "\n", "<｜tool▁calls▁end｜>"),
    "deepseek_v31": ("<｜tool▁calls▁begin｜>", "", "<｜tool▁calls▁end｜>"),
    "kimi_k2": ("<|tool_calls_section_begin|>", "", "<|tool_calls_section_end|>"),
}
each_format = pytest.mark.parametrize("name", WRITERS)


def section(name: str, *calls: str) -> str:
    opens, between, closes = SECTIONS[name]
    return opens + between.join(calls) + closes


def parsed(format: ToolFormat, *pieces: str, skipped=()) -> list[str | ToolCall]:
    """Of text that comes in these pieces; content that comes in pieces is joined."""
    parser, found = format.parser(skipped), []
    for delta in [*(delta for piece in pieces for delta in parser.push(piece)), *parser.finish()]:
        if isinstance(delta, str) and found and isinstance(found[-1], str):
            found[-1] += delta
        else:
            found.append(delta)
    return found


def plain(found: list[str | ToolCall]) -> list[str | tuple[int, str, str]]:
    return [d if isinstance(d, str) else (d.index, d.name, d.arguments) for d in found]


def test_there_is_a_writer_for_each_format():
    assert list(WRITERS) == list(NAMES)


@each_format
@pytest.mark.parametrize("arguments", ["{}", '{"a": 1}', '{"a": {"b": ["}", "\\"", "\\\\"]}}', '{"città":"Zürich 😀"}'])
def test_calls_are_found_and_what_is_around_them_is_content(name, arguments):
    calls = WRITERS[name]("get_time", arguments), WRITERS[name]("f-2", '{"x":  2}', 1)
    text = f"One moment.\n\n{section(name, *calls)}\n"
    assert plain(parsed(NAMES[name], text)) == ["One moment.", (0, "get_time", arguments), (1, "f-2", '{"x":  2}')]


@each_format
def test_ids_are_kimi_s_own_or_random(name):
    write = WRITERS[name]
    calls = parsed(NAMES[name], section(name, write("f", "{}", 0), write("f", "{}", 1)))
    ids = [call.id for call in calls if isinstance(call, ToolCall)]
    if name == "kimi_k2":
        assert ids == ["functions.f:0", "functions.f:1"]
    else:
        assert len(set(ids)) == 2 and all(re.fullmatch("call_[0-9a-f]{24}", id) for id in ids)


@each_format
def test_the_end_of_a_call_in_a_string_of_its_arguments_is_no_end(name):
    format = NAMES[name]
    arguments = json.dumps({"code": f'"\\{format.end}{format.begin}"'}, ensure_ascii=False)
    text = section(name, WRITERS[name]("f", arguments))
    assert plain(parsed(format, text)) == plain(parsed(format, *text)) == [(0, "f", arguments)]


DEEP = 50_000 * '{"a":' + "1" + 50_000 * "}"
BROKEN = ["", "{", "{}}", "[]", '"{}"', '{"a": }', "{'a': 1}", '{"a": NaN}', '{"a": "\n"}', DEEP]


@each_format
@pytest.mark.parametrize("arguments", BROKEN, ids=range(len(BROKEN)))
def test_a_call_that_is_malformed_is_content(name, arguments):
    text = f"a \n{section(name, WRITERS[name]('f', arguments))} \n"
    assert parsed(NAMES[name], text) == [text]


@each_format
def test_a_call_that_is_cut_off_is_content(name):
    whole = "So:\n" + section(name, WRITERS[name]("f", '{"a": "b"}'))
    for length in range(whole.index(NAMES[name].end) + len(NAMES[name].end)):
        assert parsed(NAMES[name], whole[:length]) == ([whole[:length]] if length else [])


@each_format
def test_a_malformed_call_spoils_none_beside_it(name):
    call, broken = WRITERS[name]("f", "{}"), WRITERS[name]("f", "{a}")
    found = plain(parsed(NAMES[name], section(name, call, broken, call)))
    assert [d for d in found if not isinstance(d, str)] == [(0, "f", "{}"), (1, "f", "{}")]
    assert [d.strip() for d in found if isinstance(d, str)] == [broken]


@each_format
def test_content_is_returned_as_it_comes_and_a_call_when_it_is_complete(name):
    format, call = NAMES[name], WRITERS[name]("f", "{}")
    parser = format.parser()
    assert parser.push("Let me <b>look") == ["Let me <b>look"]
    assert parser.push(" up \n" + SECTIONS[name][0] + call[:-1]) == [" up"]
    (found,) = parser.push(call[-1])
    assert plain([found]) == [(0, "f", "{}")]
    assert parser.push("\n") == []
    assert parser.finish() == []


@each_format
def test_content_may_follow_a_call_and_keeps_its_white_space_and_marks(name):
    rest = f"\n And {SECTIONS[name][2]} so on. \n"
    assert plain(parsed(NAMES[name], section(name, WRITERS[name]("f", "{}")) + rest)) == [(0, "f", "{}"), rest]


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"name":"f","arguments":{"a":1}}</tool_call>',
        '<tool_call>\n{ "arguments": {"a":1}, "name": "f"}\n</tool_call> ',
        '<tool_call>\n{"arguments":{"a":1},"name":"f"}</tool_call>',
    ],
)
def test_hermes_calls_may_be_compact_and_begin_with_the_arguments(text):
    assert plain(parsed(NAMES["hermes"], text)) == [(0, "f", '{"a":1}')]


def test_what_a_template_writes_is_parsed_back():
    """The template of Qwen3's kind writes calls that were made, as the model is to write them."""
    calls = [{"type": "function", "function": {"name": n, "arguments": {"ort": "Zürich"}}} for n in ("wetter", "zeit")]
    said = {"role": "assistant", "content": "Moment.", "tool_calls": calls}
    prompt = render_chat(QWEN, [{"role": "user", "content": "?"}, said], add_generation_prompt=False)
    answer = prompt.rpartition("</think>\n\n")[2].removesuffix("<|im_end|>\n")
    arguments = '{"ort": "Zürich"}'
    assert plain(parsed(NAMES["hermes"], answer)) == ["Moment.", (0, "wetter", arguments), (1, "zeit", arguments)]


@each_format
def test_special_tokens_are_left_out_but_for_the_marks(name):
    format = NAMES[name]
    text = f"a<|x|>b<| <|x|>{section(name, WRITERS[name]('f', '{}'))}<|x|>"
    assert plain(parsed(format, *text, skipped=["<|x|>", *format.marks])) == ["ab<|", (0, "f", "{}")]


@each_format
def test_marks_are_all_that_a_model_may_have_a_token_for(name):
    text = section(name, WRITERS[name]("f", "{}"))
    assert sorted(NAMES[name].marks) == sorted(re.findall("<[^>]*>", text))


@given(st.data())
def test_however_the_text_is_cut_the_same_is_found_and_nothing_is_lost(data):
    name = data.draw(st.sampled_from(sorted(WRITERS)))
    format, write = NAMES[name], WRITERS[name]
    calls = [write("f", "{}"), write("g", '{"a": "' + format.end + '"}', 7), write("h", "{"), "<|x|>"]
    marks = [format.begin, format.end, *SECTIONS[name], *format.marks]
    pieces = st.sampled_from([*calls, *calls, *marks, *'ab \n<{}"\\', "<tool", "<｜", "<|"])
    text = "".join(data.draw(st.lists(pieces, max_size=8)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    skipped = data.draw(st.sampled_from([(), ("<|x|>",)]))
    found = parsed(format, *(text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)), skipped=skipped)
    assert plain(found) == plain(parsed(format, text, skipped=skipped))
    index = {"f": 0, "g": 7}
    said = "".join(d if isinstance(d, str) else write(d.name, d.arguments, index[d.name]) for d in found)
    layout = "|".join(map(re.escape, filter(None, [*"\n ", SECTIONS[name][0], SECTIONS[name][2], *skipped])))
    assert re.sub(layout, "", said) == re.sub(layout, "", text)


@each_format
def test_text_without_a_call_is_content_to_the_letter(name):
    text = f" a\n {NAMES[name].end} \n <to{''.join(filter(None, SECTIONS[name]))} b \n"
    assert parsed(NAMES[name], text) == parsed(NAMES[name], *text) == [text]


KNOWN = [  # excerpts of what the models' own templates, or those that vLLM has for them, say
    (
        r"""XML tags:\n<tool_call>\n{\"name\": <function-name>, \"arguments\": <args-json-object>}\n</tool_call>""",
        "hermes",
    ),
    (r"""{{- '\n<tool_call>\n{"name": "' }}""", "hermes"),
    ("""{{- "<tool_call>\n" }}\n    {{- '{"name": <function-name>, "arguments": <args-dict>}\n' }}""", "hermes"),
    ("""<tool_call>\n{"arguments": <args-dict>, "name": <function-name>}\n</tool_call>""", "hermes"),
    (r"""tool['type'] + '<｜tool▁sep｜>' + tool['function']['name'] + '\n' + '```json' + '\n' + """, "deepseek_v3"),
    (r"""<｜tool▁call▁begin｜>function<｜tool▁sep｜><function_name>\n```json\n<arguments>\n```""", "deepseek_v3"),
    ("""'<｜tool▁call▁begin｜>'+ tool['function']['name'] + '<｜tool▁sep｜>' + arguments""", "deepseek_v31"),
    ("<|tool_call_begin|>{{ tool_call['id'] }}<|tool_call_argument_begin|>{% if", "kimi_k2"),
    ("{{ '<|im_system|>tool_declare<|im_middle|>' -}}", "kimi_k2"),
    (r"<tool_call>\n<function=example_function_name>\n<parameter=example_parameter_1>", None),  # Qwen3-Coder
    ("<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>\n<arg_value>", None),  # GLM-4.6
    ('<｜DSML｜function_calls>\n<｜DSML｜invoke name="$TOOL_NAME">', None),  # DeepSeek-V3.2
    ("[TOOL_CALLS]", None),  # Mistral
]


@pytest.mark.parametrize(("excerpt", "name"), KNOWN)
def test_a_template_shows_its_format(excerpt, name):
    found = find_format("{%- if tools %}{{ tools | tojson }}" + excerpt + "{% endif %}")
    assert (found and found.name) == name


@pytest.mark.parametrize(("excerpt", "name"), KNOWN)
def test_a_template_that_shows_the_model_no_tools_has_no_format(excerpt, name):
    assert find_format("{% for tool in message['tool_calls'] %}" + excerpt + "{% endfor %}") is None


def test_a_whole_template_shows_its_format():
    assert find_format(QWEN) is NAMES["hermes"]


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"$ref": "#/$defs/city"},
                    "days": {"type": "integer", "minimum": 1, "maximum": 9},
                },
                "required": ["city", "days"],
                "additionalProperties": False,
                "$defs": {"city": {"type": "string", "maxLength": 6}},
            },
        },
    },
    {"type": "function", "function": {"name": "now", "description": "The time."}},
]
NOW = {"type": "function", "function": {"name": "now"}}


def satisfies(call: ToolCall) -> bool:
    arguments = json.loads(call.arguments)
    if call.name == "now":
        return arguments == {}
    city, days = arguments.pop("city"), arguments.pop("days")
    return call.name == "get_weather" and len(city) <= 6 and days in range(1, 10) and not arguments


@functools.cache
def tokenizer(special: bool | None) -> Tokenizer:
    """The embedded model's, with a token for each mark: special ones, ordinary ones, or (None) without."""
    backend = tokenizers.Tokenizer.from_file(str(EMBEDDED / "tokenizer.json"))
    marks = sorted({mark for format in FORMATS for mark in format.marks})
    if special is not None:
        backend.add_tokens([tokenizers.AddedToken(mark, normalized=False, special=special) for mark in marks])
    return Tokenizer(backend)


@functools.cache
def guides(special: bool | None) -> Guides:
    return Guides(tokenizer(special), VOCABULARY, [EOS])


def sample(grammar: str, special: bool | None, seed: int, limit: int = 400) -> list[int] | None:
    """Tokens drawn from those allowed, each as likely; None if they don't end."""
    guide = guides(special).make(SamplingParams(structured_outputs=StructuredOutputs(grammar=grammar)))
    assert guide is not None
    draw, said = random.Random(seed), []
    while not guide.over and len(said) < limit:
        (row,) = guide.bits([])
        said.append(draw.choice(np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist()))
        guide.push(said[-1:])
    return [token for token in said if token != EOS] if guide.over else None


@each_format
@pytest.mark.parametrize("special", [True, False, None])
@pytest.mark.parametrize(("choice", "parallel"), [("required", True), ("required", False), (NOW, True)])
def test_whatever_is_said_under_the_grammar_is_calls_that_satisfy_the_schemas(name, special, choice, parallel):
    format, subject = NAMES[name], tokenizer(special)
    grammar = format.grammar(TOOLS, choice, subject.added, parallel)
    assert grammar is not None
    answers = [tokens for seed in range(8) if (tokens := sample(grammar, special, seed)) is not None]
    assert len(answers) > 4
    counts, names = set(), set()
    for tokens in answers:
        calls = parsed(format, subject.decode(tokens, skip_special_tokens=False), skipped=subject.special)
        assert calls and all(isinstance(call, ToolCall) and satisfies(call) for call in calls), calls
        counts.add(len(calls))
        names |= {call.name for call in calls if isinstance(call, ToolCall)}
        if special is not None:
            assert sum(subject.id_to_token(token) == format.end for token in tokens) == len(calls)
    assert (counts == {1}) == (choice is NOW or not parallel)
    assert names == ({"now"} if choice is NOW else {"now", "get_weather"})


@each_format
@pytest.mark.parametrize("special", [True, False, None])
def test_the_grammar_allows_calls_as_the_format_writes_them(name, special):
    subject = tokenizer(special)
    grammar = NAMES[name].grammar(TOOLS, "required", subject.added)
    guide = guides(special).make(SamplingParams(structured_outputs=StructuredOutputs(grammar=grammar)))
    calls = [WRITERS[name]("get_weather", '{"city": "</b>", "days": 3}', 4), WRITERS[name]("now", "{}", 15)]
    tokens = [*subject.encode(section(name, *calls), add_special_tokens=False), EOS]
    assert guide is not None
    rows = guide.bits(tokens)
    assert all(row[token // 32] >> (token % 32) & 1 for token, row in zip(tokens, rows, strict=False))
    assert rows[-2].sum() < 2**32  # the last token was one of few


@pytest.mark.parametrize("choice", [None, "auto", "none"])
def test_a_model_that_may_choose_follows_no_grammar(choice):
    assert NAMES["hermes"].grammar(TOOLS, choice, ()) is None


@pytest.mark.parametrize(
    ("tools", "choice", "said"),
    [
        ([{"type": "retrieval"}], "auto", r"tools\[0\] must be \{'type': 'function'.*got \{'type': 'retrieval'\}"),
        ([{"type": "function"}], "auto", r"tools\[0\] must be"),
        (["now"], "auto", r"tools\[0\] must be .*; got 'now'"),
        ([*TOOLS, {"type": "function", "function": {}}], "auto", r"tools\[2\]\.function\.name must be .*; got None"),
        ([{"type": "function", "function": {"name": 'a"b'}}], "auto", r"tools\[0\]\.function\.name must be .*a\"b"),
        ([{"type": "function", "function": {"name": "a" * 65}}], "auto", "1 to 64"),
        ([*TOOLS, NOW], "auto", r"tools\[2\]\.function\.name is 'now', as that of another tool is; rename one"),
        (
            [{"type": "function", "function": {"name": "f", "parameters": []}}],
            "auto",
            "parameters must be a JSON schema",
        ),
        (TOOLS, "any", 'tool_choice must be "none", "auto", .*; got \'any\''),
        (TOOLS, {"type": "function", "function": {"name": "later"}}, "tool_choice must be .*later"),
        (TOOLS, {"type": "function"}, "tool_choice must be"),
        (TOOLS, {"type": "function", "function": {"name": []}}, "tool_choice must be"),
        ([], "required", "tool_choice must be"),
    ],
)
def test_malformed_tools_are_refused(tools, choice, said):
    with pytest.raises(RequestError, match=said):
        NAMES["hermes"].grammar(tools, choice, ())
