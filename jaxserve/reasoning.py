"""What a model thinks before it answers, between `<think>` and `</think>`, told from the answer."""

from collections.abc import Collection
from typing import Literal, NamedTuple

from jaxserve.marks import marks_of

OPENS, CLOSES = "<think>", "</think>"
TAIL = 16
"""Tokens of a prompt's end, in which thoughts may have been opened or closed."""


class Said(NamedTuple):
    """A piece of what the model says; first come thoughts, then content."""

    reasoning: str
    content: str


def thinks(template: str) -> bool:
    """Whether a chat template is one of a model that may think."""
    return CLOSES in template


def is_open(prompt: str) -> bool:
    """Whether what follows a prompt are thoughts already: some templates open them."""
    return prompt.rstrip().endswith(OPENS)


def after_thoughts(grammar: str, tokens: Collection[str]) -> str:
    """Lark for llguidance: the grammar of an answer, after the rest of thoughts that the prompt has opened.

    `tokens` are the texts that are tokens of their own.
    """
    rest = r"thoughts: /(.|\n)*/ " + CLOSES if CLOSES in tokens else r"thoughts[lazy]: /(.|\n)*<\/think>/"
    return f"start: thoughts /\\n{{0,2}}/ answer\n{rest}\nanswer: %lark {{\n{grammar}\n}}"


class ReasoningParser:
    """Tells thoughts from content, in text that comes in pieces.

    All that `push` and `finish` return is final, and the same however the text is cut. White space beside the marks is
    left out. A mark opens thoughts only where the answer begins, and closes them only once: others are text.
    """

    def __init__(self, prompt: str, skipped: Collection[str] = ()):
        """`prompt`, of which the end is enough, may have opened thoughts, or closed them to leave them out.

        `skipped` are texts to leave out: the special tokens, if the answer was decoded with them.
        """
        closed = prompt.rstrip().endswith(CLOSES)
        self._place: Literal["before", "in", "after"] = "in" if is_open(prompt) else "after" if closed else "before"
        self._fresh = self._place != "before"  # nothing was said since the last mark
        self._marks = marks_of(frozenset({OPENS, CLOSES, *skipped}))
        self._held, self._space = "", ""

    def push(self, text: str) -> Said:
        """What this text makes certain."""
        said = Said("", "")
        text = self._held + text
        while True:
            before, mark, text = self._marks.cut(text)
            said = _joined(said, self._take(before))
            if not mark:
                self._held = text
                return said
            said = _joined(said, self._take_mark(mark))

    def finish(self) -> Said:
        """What was held back. Nothing may be pushed after."""
        said = self._take(self._held)
        return said if self._fresh else _joined(said, self._as_said(self._space))

    def _take_mark(self, mark: str) -> Said:
        if (self._place, mark) not in (("before", OPENS), ("in", CLOSES)):
            return self._take(mark) if mark in (OPENS, CLOSES) else Said("", "")
        self._place = "in" if mark == OPENS else "after"
        self._fresh = True
        return Said("", "")

    def _take(self, text: str) -> Said:
        text = self._space + text
        stop = len(text.rstrip())
        text, self._space = text[:stop], text[stop:]
        if not text:
            return Said("", "")
        text = text.lstrip() if self._fresh else text
        self._fresh = False
        self._place = "after" if self._place == "before" else self._place
        return self._as_said(text)

    def _as_said(self, text: str) -> Said:
        return Said(text, "") if self._place == "in" else Said("", text)


def _joined(one: Said, other: Said) -> Said:
    return Said(one.reasoning + other.reasoning, one.content + other.content)
