"""Make the golden prompts: chat templates and what Hugging Face transformers renders with them.

`python tests/oracles/make_chat_goldens.py` rewrites `tests/oracles/chat/*.json` in a second. It needs transformers
(made with 5.23), which jaxserve does not depend on, and imports nothing of jaxserve. The templates are ours, written
with the constructs of the published ones: namespaces, loops with `loop.index0` and `break`, reversed slices, string
methods, `tojson`, `is defined`, undefined fields.

They are rendered by what is inside `apply_chat_template`, which itself, since transformers 5, drops a `content` of None
first; DeepSeek's templates ask for that None.

A file is `{"template": …, "cases": [{"messages": …, "kwargs": …, "prompt": …}, …]}`.
"""

import json
from pathlib import Path
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

FOLDER = Path(__file__).parent / "chat"
DEFAULTS = {"add_generation_prompt": True, "bos_token": "<｜begin｜>", "eos_token": "<｜end｜>"}

CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

DEEPSEEK = """\
{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif -%}
{% set ns = namespace(is_first=false, is_tool=false, system='', first_system=true) -%}
{%- for message in messages if message['role'] == 'system' %}
    {%- if ns.first_system %}
        {%- set ns.system = ns.system + message['content'] %}
        {%- set ns.first_system = false %}
    {%- else %}
        {%- set ns.system = ns.system + '\\n\\n' + message['content'] %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}{{ ns.system }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {%- set ns.is_tool = false %}
        {{- '<｜User｜>' + message['content'] }}
    {%- elif message['role'] == 'assistant' and message['content'] is none %}
        {%- for call in message['tool_calls'] %}
            {%- if loop.first %}{{ '<｜Assistant｜><｜calls▁begin｜>' }}{% else %}{{ '\\n' }}{% endif %}
            {{- '<｜call｜>' + call['type'] + '<｜sep｜>' + call['function']['name'] }}
            {{- '\\n```json\\n' + call['function']['arguments'] + '\\n```<｜call▁end｜>' }}
        {%- endfor %}
        {{- '<｜calls▁end｜>' + eos_token }}
    {%- elif message['role'] == 'assistant' %}
        {%- set content = message['content'] %}
        {%- if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
        {%- if ns.is_tool %}{{ '<｜results▁end｜>' + content + eos_token }}
        {%- else %}{{ '<｜Assistant｜>' + content + eos_token }}{% endif %}
        {%- set ns.is_tool = false %}
    {%- elif message['role'] == 'tool' %}
        {{- ('' if ns.is_tool else '<｜results▁begin｜>') + '<｜result｜>' + message['content'] + '<｜result▁end｜>' }}
        {%- set ns.is_tool = true %}
    {%- elif message['role'] != 'system' %}
        {{- raise_exception('unknown role ' + message['role']) }}
    {%- endif %}
{%- endfor %}
{%- if ns.is_tool %}{{ '<｜results▁end｜>' }}{% endif %}
{%- if add_generation_prompt and not ns.is_tool %}{{ '<｜Assistant｜>' }}{% endif %}
"""

QWEN = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n\\nSignatures within <tools></tools>:\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last_query=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == "user" and not (message.content.startswith('<tool_response>')) %}
        {%- set ns.last_query = index %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content if message.content is string else '' %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last_query and (loop.last or reasoning) %}
            {{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {% generation %}{{- content }}{%- endgeneration %}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if tool_call.function %}{% set tool_call = tool_call.function %}{% endif %}
            {{- '\\n<tool_call>\\n{"name": "' + tool_call.name + '", "arguments": ' }}
            {{- tool_call.arguments if tool_call.arguments is string else tool_call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{ '<|im_start|>user' }}{% endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{ '<|im_end|>\\n' }}{% endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

SYNTAX = """\
{# what is not in the others: trimmed blocks, macros, filters, documents #}
{% macro show(item, indent=none) %}
  {{ item | tojson(indent=indent) }}
{% endmacro %}
{% for message in messages %}
    {% if loop.index > 2 %}
        {% continue %}
    {% endif %}
  {{ loop.cycle('a', 'b') }}: {{ message.content | upper | replace('<', '&lt;') }} {{ message.absent }}
    {% set inner = dict(role=message.role, n=loop.index) %}
{{ show(inner, indent=2) }}{{ show(message) }}
{% endfor %}
{{ documents is none }} {{ tools is none }} {{ level | default('no level') }} {{ messages | map(attribute='role') | join(', ') }}
  {{ ['b', 'a'] | sort | first }} {{ range(3) | list }} {{ bos_token }}
"""  # noqa: E501

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  Wie geht's? <b>你好</b> 👩‍🚀\n"},
    {"role": "assistant", "content": "<think>\nA greeting.\n</think>\n\nGut & \"schön\"."},
    {"role": "system", "content": "Be briefer."},
    {"role": "user", "content": "Und jetzt?"},
]  # fmt: skip
TOOLS = [
    {"type": "function", "function": {"name": "wetter", "description": "Größe: <°C> & 'wind'",
     "parameters": {"type": "object", "properties": {"ort": {"type": "string"}}, "required": ["ort"]}}},
    {"type": "function", "function": {"name": "zeit", "parameters": {}}},
]  # fmt: skip
CALLS = [
    {"role": "user", "content": "Wetter in Zürich?"},
    {"role": "assistant", "content": None, "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "wetter", "arguments": '{"ort": "Zürich"}'}},
        {"id": "2", "type": "function", "function": {"name": "zeit", "arguments": "{}"}}]},
    {"role": "tool", "content": '{"grad": 21}'},
    {"role": "tool", "content": "12:00"},
]  # fmt: skip
PARSED = [
    CALLS[0],
    {"role": "assistant", "content": "Moment.", "reasoning_content": "\nI should look.\n",
     "tool_calls": [{"name": "wetter", "arguments": {"ort": "Zürich", "tage": [1, 2.5, None, True]}}]},
    CALLS[2],
]  # fmt: skip
ANSWERED = [*CALLS, {"role": "assistant", "content": "21 Grad, zwölf Uhr."}]

CASES: dict[str, tuple[str, list[tuple[list[dict[str, Any]], dict[str, Any]]]]] = {
    "chatml": (CHATML, [(TALK, {}), (TALK[:2], {"add_generation_prompt": False})]),
    "deepseek": (DEEPSEEK, [(TALK, {}), (CALLS, {}), (ANSWERED, {"add_generation_prompt": False}), (TALK[1:2], {})]),
    "qwen": (
        QWEN,
        [
            (TALK, {}),
            (TALK, {"tools": TOOLS, "enable_thinking": False}),
            (CALLS, {"tools": TOOLS, "enable_thinking": True}),
            (PARSED, {"tools": TOOLS}),
            (TALK[:3], {"add_generation_prompt": False}),
        ],
    ),
    "syntax": (SYNTAX, [(TALK, {}), (TALK[:2], {"tools": TOOLS, "documents": [{"title": "t"}], "level": 3})]),
}


def main() -> None:
    """Writes one file for each template."""
    FOLDER.mkdir(exist_ok=True)
    for name, (template, inputs) in CASES.items():
        cases = []
        for messages, changes in inputs:
            kwargs = DEFAULTS | changes
            prompts, _ = render_jinja_template([messages], chat_template=template, **kwargs)
            cases.append({"messages": messages, "kwargs": kwargs, "prompt": prompts[0]})
        text = json.dumps({"template": template, "cases": cases}, ensure_ascii=False, indent=1)
        (FOLDER / f"{name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
