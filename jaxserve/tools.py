"""Calls of tools: found in what a model says, and forced upon it.

Each family of models was trained to write calls in a way of its own. Which one it is, its chat template shows.
"""

import json
import re
import reprlib
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxserve.guidance import quoted, schema_text
from jaxserve.marks import marks_of
from jaxserve.parallel.errors import RequestError


@dataclass(frozen=True)
class ToolCall:
    """A call, as the model wrote it."""

    index: int  # among the calls of the answer
    id: str
    name: str
    arguments: str  # a JSON object


@dataclass(frozen=True)
class ToolFormat:
    """How calls are written: what opens them all, then of each its beginning, inside and end, and what closes them."""

    name: str
    sign: str  # a regular expression, found in chat templates of this format and of none that is tried after it
    begin: str
    inside: str  # with $name, $arguments and $index in their places
    end: str
    reads: tuple[str, ...]  # regular expressions of all that may stand inside: name, arguments, sometimes id
    opens: str = ""
    between: str = ""  # a call and the next
    closes: str = ""

    @property
    def marks(self) -> tuple[str, ...]:
        """The texts that may be tokens of their own; a parser must see them, though they be special tokens."""
        return tuple(re.findall(_MARK, self.opens + self.begin + self.inside + self.end + self.closes))

    def parser(self, skipped: Collection[str] = ()) -> "ToolParser":
        """For one answer. `skipped` are texts to leave out: the special tokens, if the answer was decoded with them."""
        return ToolParser(self, skipped)

    def grammar(self, tools: Sequence[Any], choice: Any, tokens: Collection[str], parallel: bool = True) -> str | None:
        """Lark for llguidance, of an answer that is a call of the chosen function, or of any if `choice` is "required".

        `tools` and `choice` are OpenAI's `tools` and `tool_choice`; None if the model may choose whether to call one.
        `tokens` are the texts that are tokens of their own. `parallel`: where any is required, several may be called.
        """
        functions = chosen(read_functions(tools), choice)
        if functions is None:
            return None
        several = parallel and choice == "required"
        more = f"({_lark(self.between, tokens)} call)*" if several else ""
        rules = [f"start: {_lark(self.opens, tokens)} call {more} {_lark(self.closes, tokens)}"]
        rules.append(f"call: {' | '.join(f'call_{i}' for i in range(len(functions)))}")
        for i, (name, schema) in enumerate(functions.items()):
            written = self.begin + self.inside.replace("$name", name) + self.end
            rules.append(f"call_{i}: {_lark(written, tokens, f'arguments_{i}')}")
            rules.append(f"arguments_{i}: %json {schema_text(schema)}")
        return "\n".join(rules)

    def read(self, inside: str, index: int) -> ToolCall | None:
        """The call that this text between `begin` and `end` is, if it is one."""
        for pattern in self.reads:
            found = re.fullmatch(pattern, inside, re.DOTALL)
            if found and _is_json(found["arguments"]):
                id = found.groupdict().get("id") or f"call_{secrets.token_hex(12)}"
                return ToolCall(index, id, found["name"], found["arguments"])
        return None


_MARK = r"<[^<>\s]+>"
_NAME, _ARGUMENTS = r"(?P<name>[\w.-]+)", r"(?P<arguments>\{.*\})"
_DEEPSEEK = {
    "opens": "<｜tool▁calls▁begin｜>",
    "begin": "<｜tool▁call▁begin｜>",
    "end": "<｜tool▁call▁end｜>",
    "closes": "<｜tool▁calls▁end｜>",
}
FORMATS = (
    ToolFormat(
        "hermes",  # and Qwen2.5, Qwen3
        sign=r"""<tool_call>[\s\\n"'{}-]*(name|arguments)\b""",
        begin="<tool_call>",
        inside='\n{"name": "$name", "arguments": $arguments}\n',
        end="</tool_call>",
        reads=(
            rf'\s*\{{\s*"name"\s*:\s*"{_NAME}"\s*,\s*"arguments"\s*:\s*{_ARGUMENTS}\s*\}}\s*',
            rf'\s*\{{\s*"arguments"\s*:\s*{_ARGUMENTS}\s*,\s*"name"\s*:\s*"{_NAME}"\s*\}}\s*',
        ),
        between="\n",
    ),
    ToolFormat(
        "deepseek_v3",  # and R1
        sign=r"(?s)<｜tool▁sep｜>.{,80}```json",
        inside="function<｜tool▁sep｜>$name\n```json\n$arguments\n```",
        reads=(rf"\s*function<｜tool▁sep｜>\s*{_NAME}\s*```json\s*{_ARGUMENTS}\s*```\s*",),
        between="\n",
        **_DEEPSEEK,
    ),
    ToolFormat(
        "deepseek_v31",
        sign="<｜tool▁sep｜>",
        inside="$name<｜tool▁sep｜>$arguments",
        reads=(rf"\s*{_NAME}\s*<｜tool▁sep｜>\s*{_ARGUMENTS}\s*",),
        **_DEEPSEEK,
    ),
    ToolFormat(
        "kimi_k2",
        sign=r"<\|tool_call_argument_begin\|>|<\|im_system\|>tool_declare",
        opens="<|tool_calls_section_begin|>",
        begin="<|tool_call_begin|>",
        inside="functions.$name:$index<|tool_call_argument_begin|>$arguments",
        end="<|tool_call_end|>",
        closes="<|tool_calls_section_end|>",
        reads=(rf"\s*(?P<id>functions\.{_NAME}:\d+)\s*<\|tool_call_argument_begin\|>\s*{_ARGUMENTS}\s*",),
    ),
)


def _lark(written: str, tokens: Collection[str], arguments: str = "") -> str:
    """What is written, in Lark: `arguments` is a rule, and an index less than 100."""
    rules = {"$arguments": arguments, "$index": "/0|[1-9][0-9]?/"}
    pieces = [piece for piece in re.split(rf"(\$\w+|{_MARK})", written) if piece]
    return " ".join(rules.get(piece) or (piece if piece in tokens else quoted(piece)) for piece in pieces)


def find_format(template: str) -> ToolFormat | None:
    """The format of calls in a chat template; None if it is not known, or the template shows the model no tools."""
    known = (format for format in FORMATS if re.search(format.sign, template))
    return next(known, None) if re.search(r"\btools\b", template) else None


class ToolParser:
    """Tells calls from content, in text that comes in pieces.

    All that `push` and `finish` return is final, and the same however the text is cut. So a call is returned when it is
    complete: what is malformed or cut off turns out to be content only then. Arguments before that would be of no use.
    """

    def __init__(self, format: ToolFormat, skipped: Collection[str] = ()):
        self._format = format
        marks = {format.opens, format.begin, format.closes, *skipped} - {""}
        self._marks = marks_of(frozenset(marks))
        self._ends = re.compile(rf'\\.|"|{re.escape(format.end)}', re.DOTALL)
        self._held = ""  # text to come to: within a call, all of what is inside
        self._layout = ""  # before it: white space, or what opens calls; content unless a call follows
        self._within = self._quoted = False  # a call; a string of JSON in it
        self._seen = 0  # of the held text, within a call
        self._count = 0
        self._after_call = False

    def push(self, text: str) -> list[str | ToolCall]:
        """The content and calls that this text makes certain."""
        self._held += text
        found: list[str | ToolCall] = []
        while self._within or self._held:
            if self._within:
                end = self._find_end()
                if end is None:
                    break
                found += self._take_call(end)
            else:
                before, mark, self._held = self._marks.cut(self._held)
                found += self._take_content(before)
                if not mark:
                    break
                found += self._take_mark(mark)
        return found

    def finish(self) -> list[str | ToolCall]:
        """What was held back, as content. Nothing may be pushed after."""
        rest = self._layout + self._within * self._format.begin + self._held
        return [rest] if rest.strip() or (rest and not self._after_call) else []

    def _take_content(self, text: str) -> list[str | ToolCall]:
        said = self._layout + text.rstrip() if text.strip() else ""
        self._layout = (self._layout + text)[len(said) :]
        self._after_call = self._after_call and not said
        return [said] if said else []

    def _take_mark(self, mark: str) -> list[str | ToolCall]:
        if mark == self._format.begin:
            self._within, self._seen = True, 0
        elif mark == self._format.opens:
            self._layout += mark
        elif mark == self._format.closes:
            if not self._after_call:
                return self._take_content(mark)
            self._layout = ""
        return []

    def _take_call(self, end: int) -> list[str | ToolCall]:
        inside, self._held = self._held[: end - len(self._format.end)], self._held[end:]
        self._within = False
        call = self._format.read(inside, self._count)
        if call is None:
            return self._take_content(self._format.begin + inside + self._format.end)
        self._layout, self._after_call = "", True
        self._count += 1
        return [call]

    def _find_end(self) -> int | None:
        """Where a call ends: the mark may also stand in a string of its arguments."""
        for found in self._ends.finditer(self._held, self._seen):
            self._seen = found.end()
            self._quoted ^= found[0] == '"'
            if found[0] == self._format.end and not self._quoted:
                return self._seen
        self._seen = max(self._seen, len(self._held) - len(self._format.end) + 1)  # the mark may have begun
        return None


def read_functions(tools: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """The JSON schema of each function's arguments, from OpenAI's `tools`; RequestError if they are malformed."""
    schemas: dict[str, dict[str, Any]] = {}
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) and tool.get("type") == "function" else None
        if not isinstance(function, Mapping):
            raise RequestError(
                f"tools[{i}] must be {{'type': 'function', 'function': {{'name': …}}}}; got {reprlib.repr(tool)}"
            )
        name, schema = function.get("name"), function.get("parameters")
        if not isinstance(name, str) or not re.fullmatch(r"[a-zA-Z0-9_.-]{1,64}", name):
            raise RequestError(
                f"tools[{i}].function.name must be 1 to 64 of a-z, A-Z, 0-9, _, . and -; got {reprlib.repr(name)}"
            )
        if name in schemas:
            raise RequestError(f"tools[{i}].function.name is {name!r}, as that of another tool is; rename one")
        if not isinstance(schema, Mapping | None):
            raise RequestError(
                f"tools[{i}].function.parameters must be a JSON schema, an object; got {reprlib.repr(schema)}"
            )
        schemas[name] = {"additionalProperties": False} if schema is None else dict(schema)
        schemas[name]["type"] = "object"
    return schemas


def chosen(functions: dict[str, dict[str, Any]], choice: Any) -> dict[str, dict[str, Any]] | None:
    """Those functions of which one must be called, by OpenAI's `tool_choice`; None if the model may choose."""
    if choice in (None, "none", "auto"):
        return None
    if choice == "required" and functions:
        return functions
    wanted = choice.get("function") if isinstance(choice, Mapping) else None
    name = wanted.get("name") if isinstance(wanted, Mapping) else None
    if not isinstance(name, str) or name not in functions:
        raise RequestError(
            f'tool_choice must be "none", "auto", or, of the tools given, "required" or '
            f"{{'type': 'function', 'function': {{'name': …}}}}; got {reprlib.repr(choice)}"
        )
    return {name: functions[name]}


def _is_json(text: str) -> bool:
    try:
        json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
