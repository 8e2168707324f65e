"""What a model means by what it says in a conversation: thoughts, content, calls of tools."""

import json
import re
from typing import Any, NamedTuple

import msgspec

from jaxserve import reasoning, tools
from jaxserve.chat import choose_template
from jaxserve.guidance import schema_text
from jaxserve.parallel.errors import RequestError
from jaxserve.reasoning import ReasoningParser
from jaxserve.request import StructuredOutputs
from jaxserve.server.protocol import CalledFunction, ChatRequest, ToolCall
from jaxserve.tokenizer import Tokenizer
from jaxserve.tools import ToolFormat


class Said(NamedTuple):
    """A piece of what the model says."""

    reasoning: str
    content: str
    calls: list[ToolCall]

    def __bool__(self) -> bool:
        return any(self)


class Manner(NamedTuple):
    """How the model of a conversation speaks, by its chat template."""

    thinks: bool
    prompt: str  # its end
    format: ToolFormat | None  # of calls; None: it has no tools
    parallel: bool  # whether it may call several
    special: frozenset[str]  # texts of special tokens

    @property
    def shows_special(self) -> bool:
        """Whether a mark is a special token, so that texts must be decoded with them."""
        calls = self.format.marks if self.format else ()
        thoughts = (reasoning.OPENS, reasoning.CLOSES) if self.thinks else ()
        return not self.special.isdisjoint((*calls, *thoughts))

    def speech(self, decoded_with_special: bool) -> "Speech":
        """For one answer; special tokens are left out of it, unless they are marks."""
        return Speech(self, self.special if decoded_with_special else frozenset())

    def form(
        self, body: ChatRequest, form: StructuredOutputs | None, tokens: frozenset[str]
    ) -> StructuredOutputs | None:
        """The form of the answer, after thoughts that the prompt has opened. `tokens` are texts that are tokens."""
        asked = _plain(body.tools), _plain(body.tool_choice)
        call = self.format and self.format.grammar(*asked, tokens, self.parallel)
        if call and form:
            raise RequestError("response_format and a tool_choice that demands a call exclude each other; give one")
        if not (self.thinks and reasoning.is_open(self.prompt)):
            return StructuredOutputs(grammar=call) if call else form
        grammar = call or (form and _grammar(form))
        return StructuredOutputs(grammar=reasoning.after_thoughts(grammar, tokens)) if grammar else None


def manner(tokenizer: Tokenizer, body: ChatRequest, ids: list[int]) -> Manner:
    """How the model speaks after this prompt. Raises RequestError if it knows no tools, or tools are malformed."""
    given = tools_of(body)
    template = choose_template(tokenizer.chat_templates, given)
    format = tools.find_format(template) if given else None
    if given and format is None:
        raise RequestError(
            "tools: the model's chat template shows it none, or has them called in a form that is not known here; "
            "serve it with another --chat-template, or leave out tools"
        )
    tools.chosen(tools.read_functions(given or []), _plain(body.tool_choice))
    prompt = tokenizer.decode(ids[-reasoning.TAIL :], skip_special_tokens=False)
    thinks, parallel = reasoning.thinks(template), body.parallel_tool_calls is not False
    return Manner(thinks, prompt, format, parallel, tokenizer.special)


def messages_of(tokenizer: Tokenizer, body: ChatRequest) -> list[dict[str, Any]]:
    """The messages as the template reads them.

    Most know no role `developer`, OpenAI's newer name of `system`, and would leave out what it says; many want a call's
    arguments as an object, where clients send JSON.
    """
    template, messages = choose_template(tokenizer.chat_templates, tools_of(body)), body.messages
    if "developer" not in template:
        messages = [m | {"role": "system"} if m.get("role") == "developer" else m for m in messages]
    if re.search(r"arguments['\"\]]*\s*\|\s*tojson", template):
        messages = [_with_objects(message) for message in messages]
    return messages


def _with_objects(message: dict[str, Any]) -> dict[str, Any]:
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    return message | {"tool_calls": [_with_object(call) for call in calls]}


def _with_object(call: Any) -> Any:
    try:
        arguments = json.loads(call["function"]["arguments"])
    except (KeyError, TypeError, ValueError, RecursionError):  # the template will say what it misses
        return call
    return call | {"function": call["function"] | {"arguments": arguments}}


def tools_of(body: ChatRequest) -> Any:
    """The tools that the model is told of."""
    return None if body.tool_choice == "none" else _plain(body.tools)


class Speech:
    """Tells the parts of one answer, whose text comes in pieces."""

    def __init__(self, manner: Manner, skipped: frozenset[str]):
        format, self._parallel = manner.format, manner.parallel
        marks = frozenset(format.marks if format else ())
        self._thoughts = ReasoningParser(manner.prompt, skipped - marks) if manner.thinks else None
        self._calls = format.parser(skipped) if format else None

    def push(self, text: str, last: bool = False) -> Said:
        """What this text makes certain; of the `last`, all."""
        thoughts, content = "", text
        if self._thoughts:
            thoughts, content = self._thoughts.push(text)
            rest = self._thoughts.finish() if last else None
            thoughts, content = (thoughts + rest.reasoning, content + rest.content) if rest else (thoughts, content)
        if self._calls is None:
            return Said(thoughts, content, [])
        found = [*self._calls.push(content), *(self._calls.finish() if last else ())]
        said = "".join(piece for piece in found if isinstance(piece, str))
        return Said(thoughts, said, [self._call(piece) for piece in found if self._wanted(piece)])

    def _wanted(self, piece: str | tools.ToolCall) -> bool:
        return isinstance(piece, tools.ToolCall) and (self._parallel or piece.index == 0)

    def _call(self, call: Any) -> ToolCall:
        return ToolCall(call.id, "function", CalledFunction(call.name, call.arguments), call.index)


def _grammar(form: StructuredOutputs) -> str:
    """A form in Lark; one in Lark stays as it is."""
    if form.json_object:
        return f"start: %json {schema_text({'type': 'object'})}"
    if form.json is not None:
        return f"start: %json {schema_text(_schema(form.json))}"
    if form.grammar is not None:
        return form.grammar
    raise RequestError(f"structured_outputs.{form.name} can't be followed after thoughts; give json or a grammar")


def _schema(given: Any) -> Any:
    try:
        return json.loads(given) if isinstance(given, str) else given
    except ValueError as error:
        raise RequestError(f"structured_outputs.json can't be followed: {error}") from None


def _plain(content: Any) -> Any:
    """As it was sent: dicts and lists, without what was left out."""
    if isinstance(content, msgspec.Struct):
        return {name: _plain(value) for name, value in msgspec.structs.asdict(content).items() if value is not None}
    return [_plain(each) for each in content] if isinstance(content, list) else content
