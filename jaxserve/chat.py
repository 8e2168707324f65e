"""Chat templates: the Jinja program with which a checkpoint turns messages into the text of a prompt.

Templates come with weights from the internet, so they run in Jinja's sandbox and see copies of plain data: no
attributes of Python's objects, no files, no network. A template can still loop or allocate for as long as it likes.
"""

import json
import traceback
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from jaxserve.parallel.errors import CheckpointError, RequestError


def read_templates(folder: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """The folder's chat templates by name, of which one is mostly alone and called `default`.

    As in transformers, the files `chat_template.jinja` and `additional_chat_templates/NAME.jinja` displace what
    `tokenizer_config.json` says.
    """
    files = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    if files:
        return {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    said = tokenizer_config.get("chat_template") or []
    try:
        return {"default": said} if isinstance(said, str) else {entry["name"]: entry["template"] for entry in said}
    except (KeyError, TypeError):
        raise CheckpointError(
            f"{folder / 'tokenizer_config.json'}: chat_template must be a string or a list of "
            "{'name': …, 'template': …}; correct it, or put a chat_template.jinja beside it"
        ) from None


def choose_template(templates: Mapping[str, str], tools: Any = None) -> str:
    """The template `tool_use` if there are tools and it exists, else `default`; RequestError if that doesn't exist."""
    if tools and "tool_use" in templates:
        return templates["tool_use"]
    if "default" not in templates:
        raise RequestError(
            f"the model has no default chat template (it has: {', '.join(sorted(templates)) or 'none'}); "
            "put a chat_template.jinja beside its tokenizer.json, or send the prompt as text"
        )
    return templates["default"]


def render_chat(
    template: str,
    messages: Any,
    /,
    *,
    tools: Any = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    **variables: Any,
) -> str:
    """The prompt that `template` makes of `messages`, a list of `{"role": …, "content": …}`.

    It is, character for character, that of transformers' `apply_chat_template`. A message's content is a string, a
    list of `{"type": "text", "text": …}` (joined by newlines), or, beside `tool_calls`, None. `tools` is a list of JSON
    schemas; `variables` are the template's own, such as `enable_thinking` and `bos_token`. The prompt ends where an
    answer begins, or, with `continue_final_message`, within the last message, for the model to go on with it.

    Raises RequestError if the messages are malformed or the template refuses them, CheckpointError if the template
    itself is at fault.
    """
    given = {"documents": None, **variables, "add_generation_prompt": add_generation_prompt}
    given = {name: _plain(name, value) for name, value in given.items()}
    given |= {"messages": _checked_messages(messages), "tools": _checked_tools(tools)}
    return _render_open(template, given) if continue_final_message else _render(template, given)


def _render(template: str, variables: dict[str, Any]) -> str:
    compiled = _compile(template)
    try:
        return compiled.render(**variables)
    except _Refusal as refusal:
        raise RequestError(f"the chat template refuses these messages: {refusal}") from None
    except SecurityError as error:
        fact = f"{_line(error)}: {str(error).rstrip('.')}"
        raise CheckpointError(f"the chat template does what the sandbox forbids{fact}. Use another template") from None
    except Exception as error:  # a template can raise anything that an expression of Python can
        raise RequestError(
            f"the chat template failed{_line(error)}: {type(error).__name__}: {error}. Compare the messages' fields, "
            "tools and variables with those that the template reads"
        ) from error


_END = "CONTINUE_FINAL_MESSAGE_TAG "
"""Marks the end of the message to go on with. Its space tells whether the template trims messages."""


def _render_open(template: str, variables: dict[str, Any]) -> str:
    """The prompt up to where the last message ends, and without the space there if the template trims messages."""
    if variables["add_generation_prompt"]:
        raise RequestError(
            "continue_final_message goes on with the last message, add_generation_prompt begins another; "
            "give add_generation_prompt=False beside continue_final_message=True"
        )
    *_, last = variables["messages"]
    if last["content"] is None:
        raise RequestError("continue_final_message: the last message has no content to go on with; give it some")
    last["content"] += _END
    text, found, rest = _render(template, variables).rpartition(_END.rstrip())
    if not found:
        raise RequestError(
            "continue_final_message: the chat template leaves out the end of the last message; send the prompt as text"
        )
    return text if rest.startswith(" ") else text.rstrip()


def _checked_messages(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list | tuple) or not messages:
        got = f"a {type(messages).__name__}" if messages else repr(messages)
        raise RequestError(f"messages must be a list of at least one {{'role': …, 'content': …}}; got {got}")
    return [_checked_message(f"messages[{i}]", message) for i, message in enumerate(messages)]


def _checked_message(at: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(f"{at} must be a dict with 'role' and 'content'; got a {type(message).__name__}")
    if not isinstance(message.get("role"), str):
        raise RequestError(f"{at}['role'] must be a string such as 'user'; got {message.get('role')!r}")
    content = message.get("content")
    if content is None and not message.get("tool_calls"):
        raise RequestError(
            f"{at}['content'] is missing; give a string or a list of text parts. Only a message with tool_calls may "
            "leave it out"
        )
    said = {name: value for name, value in message.items() if value is not None}  # clients send tool_calls: null
    # DeepSeek's templates ask whether the content of a message with tool_calls is none, so here it stays.
    return _plain(at, said | {"content": _text(f"{at}['content']", content)})


def _text(at: str, content: Any) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise RequestError(f"{at} must be a string or a list of text parts; got a {type(content).__name__}")
    for i, part in enumerate(content):
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise RequestError(
                f"{at}[{i}] must be {{'type': 'text', 'text': …}}; got {kind!r}. The model reads nothing but text"
            )
    return "\n".join(part["text"] for part in content)


def _checked_tools(tools: Any) -> list[dict[str, Any]] | None:
    if not isinstance(tools, list | tuple | None):
        raise RequestError(f"tools must be a list of JSON schemas; got a {type(tools).__name__}")
    for i, tool in enumerate(tools or ()):
        if not isinstance(tool, Mapping):
            raise RequestError(f"tools[{i}] must be a dict, a JSON schema; got a {type(tool).__name__}")
    return _plain("tools", list(tools)) if tools else None


def _plain(name: str, value: Any) -> Any:
    """A copy made of JSON's types alone: methods of any other object would be open to the template."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{name} must be JSON data; {error}") from None


def _line(error: Exception) -> str:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
    return f" in its line {lines[-1]}" if lines else ""


class _Refusal(TemplateError):
    """What a template's `raise_exception` raises."""


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks what an assistant said, for training; here it is just its body."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Namespace(Namespace):
    """Refuses names that begin with an underscore, through which a template could pass for another Python type."""

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace cannot hold {name!r}, which begins with an underscore")
        super().__setitem__(name, value)


@lru_cache(maxsize=16)
def _compile(template: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise_exception,
        strftime_now=lambda format: datetime.now().strftime(format),
        namespace=_Namespace,
        dict=lambda *args, **kwargs: dict(*args, **kwargs),  # not the class, whose methods change what they are given
    )
    try:
        return environment.from_string(template)
    except TemplateSyntaxError as error:
        raise CheckpointError(
            f"the chat template is not valid Jinja in its line {error.lineno}: {error.message}. Correct "
            "chat_template.jinja or tokenizer_config.json, or use another template"
        ) from None


def _raise_exception(message: str) -> None:
    raise _Refusal(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Unlike Jinja's own, escapes no HTML; the options are those of `json.dumps`."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
