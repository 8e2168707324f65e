import datetime
import json
from pathlib import Path

import pytest

from jaxserve.chat import choose_template, read_templates, render_chat
from jaxserve.parallel.errors import CheckpointError, RequestError

GOLDENS = {path.stem: json.loads(path.read_text()) for path in (Path(__file__).parents[1] / "oracles/chat").glob("*")}
CASES = [(name, i) for name, golden in sorted(GOLDENS.items()) for i in range(len(golden["cases"]))]
HI = [{"role": "user", "content": "hi"}]
CALL = {"type": "function", "function": {"name": "f", "arguments": "{}"}}


def test_there_are_goldens():
    assert sorted(GOLDENS) == ["chatml", "deepseek", "qwen", "syntax"]


@pytest.mark.parametrize(("name", "i"), CASES)
def test_the_prompt_is_that_of_transformers(name, i):
    case = GOLDENS[name]["cases"][i]
    assert render_chat(GOLDENS[name]["template"], case["messages"], **case["kwargs"]) == case["prompt"]


@pytest.mark.parametrize("name", sorted(GOLDENS))
def test_content_in_parts_is_their_text_joined_by_newlines(name):
    template = GOLDENS[name]["template"]
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    whole = render_chat(template, [{"role": "user", "content": "one\ntwo"}], bos_token="<s>")
    assert render_chat(template, [{"role": "user", "content": parts}], bos_token="<s>") == whole


def test_the_messages_are_left_as_they_were():
    messages = [{"role": "user", "content": [{"type": "text", "text": "hi"}], "tool_calls": None}]
    before = json.dumps(messages)
    render_chat("{{ messages | length }}", messages)
    assert json.dumps(messages) == before


def test_a_field_that_is_none_is_absent_but_for_the_content_of_a_tool_call():
    messages = [
        {"role": "user", "content": "hi", "tool_calls": None},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
    ]
    template = "{% for m in messages %}{{ 'tool_calls' in m }} {{ m['content'] is none }} {% endfor %}"
    assert render_chat(template, messages) == "False False True True True True "


def test_no_tools_and_an_empty_list_of_tools_are_the_same():
    assert render_chat("{{ tools is none }}", HI) == render_chat("{{ tools is none }}", HI, tools=[]) == "True"


def test_the_date_is_todays():
    now = render_chat("{{ strftime_now('%Y-%m-%d') }}", HI)
    assert abs(datetime.date.fromisoformat(now) - datetime.date.today()) <= datetime.timedelta(days=1)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], r"messages must be a list of at least one .*; got \[\]"),
        (None, "messages must be a list"),
        ("hi", "messages must be a list .*; got a str"),
        ({"role": "user", "content": "hi"}, "messages must be a list .*; got a dict"),
        ([*HI, "hi"], r"messages\[1\] must be a dict with 'role' and 'content'; got a str"),
        ([{"content": "hi"}], r"messages\[0\]\['role'\] must be a string such as 'user'; got None"),
        ([{"role": 3, "content": "hi"}], r"messages\[0\]\['role'\] .*; got 3"),
        ([*HI, {"role": "user"}], r"messages\[1\]\['content'\] is missing; give a string"),
        ([{"role": "assistant", "content": None, "tool_calls": []}], r"messages\[0\]\['content'\] is missing"),
        ([{"role": "user", "content": 3}], r"messages\[0\]\['content'\] must be a string or a list .*; got a int"),
        ([{"role": "user", "content": ["hi"]}], r"messages\[0\]\['content'\]\[0\] must be .*; got 'str'"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "image_url", "image_url": {}}]}],
            r"messages\[0\]\['content'\]\[1\] must be .*; got 'image_url'. The model reads nothing but text",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], r"messages\[0\]\['content'\]\[0\] must be"),
        ([{"role": "user", "content": "hi", "extra": {1, 2}}], r"messages\[0\] must be JSON data; .*set"),
    ],
)
def test_malformed_messages_are_refused_with_their_place(messages, said):
    with pytest.raises(RequestError, match=said):
        render_chat("{{ messages }}", messages)


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"tools": {"type": "function"}}, "tools must be a list of JSON schemas; got a dict"),
        ({"tools": [{}, print]}, r"tools\[1\] must be a dict, a JSON schema; got a builtin_function_or_method"),
        ({"tools": [{"name": print}]}, "tools must be JSON data"),
        ({"helper": print}, "helper must be JSON data"),
    ],
)
def test_tools_and_variables_must_be_plain_data(kwargs, said):
    with pytest.raises(RequestError, match=said):
        render_chat("{{ messages }}", HI, **kwargs)


TURNS = "{% for m in messages %}<{{ m.content BODY }}>{% endfor %}{% if add_generation_prompt %}<{% endif %}"


@pytest.mark.parametrize(
    ("body", "content", "prompt"),
    [
        ("", "I say", "<hi><I say"),
        ("", "I say ", "<hi><I say "),
        ("", "", "<hi><"),
        ("| trim", "I say \n", "<hi><I say"),
        ("", [{"type": "text", "text": "I"}, {"type": "text", "text": "say"}], "<hi><I\nsay"),
        ("", "CONTINUE_FINAL_MESSAGE_TAG x", "<hi><CONTINUE_FINAL_MESSAGE_TAG x"),
    ],
)
def test_a_prompt_may_end_within_the_last_message(body, content, prompt):
    messages = [*HI, {"role": "assistant", "content": content}]
    before = json.dumps(messages)
    how = {"add_generation_prompt": False, "continue_final_message": True}
    assert render_chat(TURNS.replace("BODY", body), messages, **how) == prompt
    assert json.dumps(messages) == before


@pytest.mark.parametrize(
    ("template", "messages", "how", "said"),
    [
        ("{{ messages }}", HI, {}, "add_generation_prompt begins another; give add_generation_prompt=False"),
        ("{{ messages[0].role }}", HI, {"add_generation_prompt": False}, "leaves out the end of the last message"),
        (
            "{{ messages }}",
            [{"role": "assistant", "tool_calls": [CALL]}],
            {"add_generation_prompt": False},
            "has no content to go on with",
        ),
    ],
)
def test_what_can_not_be_continued_is_refused(template, messages, how, said):
    with pytest.raises(RequestError, match=f"continue_final_message.*{said}"):
        render_chat(template, messages, continue_final_message=True, **how)


def test_what_a_template_refuses_is_a_request_error_with_its_reason():
    with pytest.raises(RequestError, match="refuses these messages: unknown role critic"):
        render_chat(GOLDENS["deepseek"]["template"], [{"role": "critic", "content": "hi"}])


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("\n{{ messages[0].absent.field }}", "failed in its line 2: UndefinedError: .*absent"),
        ("{{ 1 / 0 }}", "failed in its line 1: ZeroDivisionError"),
        ("{{ messages[0].absent | tojson }}", "TypeError: .*Undefined"),
        ("{{ range(10 ** 9) }}", "OverflowError: Range too big"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ dict.update(messages[0], role='x') }}", "UndefinedError: .*update"),
    ],
)
def test_a_template_that_fails_names_its_line_and_the_way_out(template, said):
    with pytest.raises(RequestError, match=f"(?s){said}.*Compare the messages' fields"):
        render_chat(template, HI)


@pytest.mark.parametrize("template", ["\n{% if %}", "\n{{ 'x' | no_such_filter }}", "\n{% generation %}x"])
def test_a_template_that_is_not_jinja_is_a_checkpoint_error_with_its_line(template):
    with pytest.raises(CheckpointError, match="not valid Jinja in its line 2: .*use another template"):
        render_chat(template, HI)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ (messages | attr('__class__')).__base__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ dict.__init__() }}",
        "{% set ns = namespace(__class__=1) %}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
    ],
)
def test_hostile_templates_reach_no_attributes_and_change_nothing(template):
    with pytest.raises(CheckpointError, match="sandbox forbids in its line 1: .* Use another template"):
        render_chat(template, HI)


@pytest.mark.parametrize(
    "template", ["{{ ''.__class__ }}", "{{ lipsum.__globals__ }}", "{{ '{0.__class__}'.format(1) }}"]
)
def test_a_forbidden_attribute_alone_renders_as_nothing(template):
    assert render_chat(template, HI) == ""


def test_one_rendering_leaves_nothing_for_the_next():
    template = "{% set ns = namespace(n=0) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ x }}"
    assert render_chat(template, HI, x="first") == "1first"
    assert render_chat(template, HI) == "1"


def test_the_template_for_tools_is_taken_only_if_there_are_tools():
    templates = {"default": "d", "tool_use": "t"}
    assert [choose_template(templates, tools) for tools in (None, [], [{}])] == ["d", "d", "t"]
    assert choose_template({"default": "d"}, [{}]) == "d"


@pytest.mark.parametrize(("templates", "has"), [({}, "none"), ({"rag": "", "tool_use": ""}, "rag, tool_use")])
def test_without_a_default_template_the_way_out_is_named(templates, has):
    with pytest.raises(RequestError, match=rf"no default chat template \(it has: {has}\); put a chat_template.jinja"):
        choose_template(templates)


def test_templates_are_read_from_the_config(tmp_path):
    assert read_templates(tmp_path, {}) == {}
    assert read_templates(tmp_path, {"chat_template": None}) == {}
    assert read_templates(tmp_path, {"chat_template": "a"}) == {"default": "a"}
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    assert read_templates(tmp_path, {"chat_template": named}) == {"default": "a", "tool_use": "b"}


def test_template_files_displace_the_config(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("ä", encoding="utf-8")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates/tool_use.jinja").write_text("t")
    assert read_templates(tmp_path, {"chat_template": "config"}) == {"default": "ä", "tool_use": "t"}


@pytest.mark.parametrize("said", [["a"], [{"name": "default"}], 3])
def test_a_malformed_list_of_templates_names_its_file(tmp_path, said):
    with pytest.raises(CheckpointError, match="tokenizer_config.json: chat_template must be"):
        read_templates(tmp_path, {"chat_template": said})
