"""Tools and thoughts over HTTP, with a model of random weights: forced calls are right whatever it would say."""

import json

import openai
import pytest

from jaxserve import LLM
from jaxserve.server.protocol import ChatRequest
from jaxserve.server.speech import Manner, messages_of
from jaxserve.tools import FORMATS
from tests.jaxserve.conftest import EMBEDDED_SHAPES, EMBEDDED_SIZE, with_few_shapes
from tests.jaxserve.server.conftest import running

pytestmark = pytest.mark.xdist_group("server")

HERMES = """{% for tool in tools or [] %}{{ tool | tojson }}
{% endfor %}{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}{% for c in m.tool_calls or [] %}
<tool_call>
{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}
</tool_call>{% endfor %}
{% endfor %}{% if add_generation_prompt %}<assistant>{{ opening or '' }}{% endif %}{# </think> #}"""
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Bern", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": NOTHING}}
ASK = [{"role": "user", "content": "weather"}]


@pytest.fixture(scope="module")
def server():
    llm = LLM(dtype="float32", **EMBEDDED_SIZE | {"max_model_len": 512})
    with_few_shapes(llm.engine, EMBEDDED_SHAPES)
    llm.tokenizer.chat_templates = {"default": HERMES}
    with running(llm) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_demanded_call_is_made_with_arguments_that_fit(client, choice):
    asked = {"messages": ASK, "tools": [WEATHER], "tool_choice": choice, "max_tokens": 100, "temperature": 0}
    answer = client.chat.completions.create(model="tiny", parallel_tool_calls=False, **asked)
    (call,) = answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason == "tool_calls"
    assert answer.choices[0].message.content is None
    assert call.function.name == "weather" and call.id.startswith("call_")
    arguments = json.loads(call.function.arguments)
    assert arguments["city"] in ("Bern", "Rome") and 1 <= arguments["days"] <= 9


def test_a_call_streams_as_a_chunk(client):
    asked = {"messages": ASK, "tools": [CLOCK, WEATHER], "tool_choice": "required", "max_tokens": 100, "seed": 4}
    chunks = list(client.chat.completions.create(model="tiny", stream=True, parallel_tool_calls=False, **asked))
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert [call.index for call in calls] == [0] and calls[0].function.name in ("clock", "weather")
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_a_conversation_with_calls_and_their_results_goes_on(client):
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Bern", "days": 2}'},
    }
    messages = [
        *ASK, {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]  # fmt: skip
    answer = client.chat.completions.create(model="tiny", messages=messages, tools=[WEATHER], max_tokens=2)
    assert answer.usage.completion_tokens == 2


def test_arguments_are_objects_for_templates_that_write_them_as_json(server):
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
    body = ChatRequest(messages=[{"role": "assistant", "tool_calls": [call]}])
    (message,) = messages_of(server.llm.tokenizer, body)
    assert message["tool_calls"][0]["function"]["arguments"] == {"city": "Bern"}
    assert body.messages[0]["tool_calls"][0]["function"]["arguments"] == '{"city": "Bern"}'


@pytest.mark.parametrize(("template", "role"), [("{{ messages }}", "system"), ("developer", "developer")])
def test_what_developers_say_is_the_system_s_for_a_template_that_knows_only_that(server, monkeypatch, template, role):
    monkeypatch.setattr(server.llm.tokenizer, "chat_templates", {"default": template})
    said = [{"role": "developer", "content": "Be brief."}, *ASK]
    first, second = messages_of(server.llm.tokenizer, ChatRequest(messages=said))
    assert (first, second) == ({"role": role, "content": "Be brief."}, ASK[0])


def test_thoughts_that_the_prompt_opens_are_told_from_the_answer_which_keeps_its_form(client):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["yes", "no"]}}}
    opened = {"chat_template_kwargs": {"opening": "<think>"}}
    asked = {"messages": ASK, "max_tokens": 200, "temperature": 0, "response_format": form, "extra_body": opened}
    answer = client.chat.completions.create(model="tiny", **asked)
    message = answer.choices[0].message
    assert message.reasoning_content
    assert answer.choices[0].finish_reason == "length" or json.loads(message.content) in ("yes", "no")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"tools": [WEATHER, WEATHER]}, "tools[1].function.name is 'weather', as that of another tool is"),
        ({"tool_choice": "required"}, "tool_choice must be"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice must be"),
        (
            {"tools": [WEATHER], "tool_choice": "required", "response_format": {"type": "json_object"}},
            "response_format and a tool_choice that demands a call exclude each other",
        ),
    ],
)
def test_what_is_wrong_with_tools_is_said(client, asked, message):
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="tiny", messages=ASK, max_tokens=5, **asked)
    assert message in error.value.message


def test_tools_are_refused_where_the_template_knows_none(server, client, monkeypatch):
    monkeypatch.setattr(server.llm.tokenizer, "chat_templates", {"default": "{{ messages[0].content }}"})
    with pytest.raises(openai.BadRequestError, match="tools: the model's chat template shows it none"):
        client.chat.completions.create(model="tiny", messages=ASK, tools=[WEATHER])
    answer = client.chat.completions.create(
        model="tiny", messages=ASK, tools=[WEATHER], tool_choice="none", max_tokens=2
    )
    assert answer.usage.completion_tokens == 2


def pieces(text, manner, size):
    speech = manner.speech(True)
    parts = [text[at : at + size] for at in range(0, len(text), size)]
    said = [speech.push(part, last=i == len(parts) - 1) for i, part in enumerate(parts)]
    calls = [(call.index, call.function.name, call.function.arguments) for each in said for call in each.calls]
    return "".join(s.reasoning for s in said), "".join(s.content for s in said), calls


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("parallel", [True, False])
def test_thoughts_content_and_calls_are_told_apart_however_the_text_comes(size, parallel):
    manner = Manner(True, "<assistant>", FORMATS[0], parallel, frozenset({"<end>"}))
    call = '<tool_call>\n{"name": "clock", "arguments": {"n": %d}}\n</tool_call>'
    text = f"<think>why\nnot</think>\n\nLet me see.<end>\n{call % 1}\n{call % 2}"
    calls = [(0, "clock", '{"n": 1}'), (1, "clock", '{"n": 2}')][: 2 if parallel else 1]
    assert pieces(text, manner, size) == ("why\nnot", "Let me see.", calls)
