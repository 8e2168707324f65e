"""What is asked: fourteen tasks of plain texts, cut from held-out modules of the standard library.

An item is a context and what may follow it. Which items there are depends on the library alone, which differs between
versions of Python; `fingerprint` tells whether two sets are the same.
"""

import ast
import builtins
import hashlib
import json
import keyword
import re
import tokenize
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cache
from itertools import islice, pairwise, takewhile
from typing import Literal, NamedTuple

from jaxserve.checkpoints.evaluation.source import (
    CONTEXT,
    Source,
    Word,
    context_start,
    digest,
    held_out,
    in_turns,
    line_end,
    line_starts,
)

ITEMS = 200  # of a task, if the library has as many
LIMIT = 1000  # bytes of a context with its longest choice: no more tokens than that, so 1,024 positions are enough
DISTANCE = 200  # characters back to where a name to be recalled was last
STRETCH = 500  # characters of running text that are scored together

BRACKETS = (")", "]", "}")
KEYWORDS = tuple("if elif for while return raise with assert def class import from try else del pass yield".split())
OPERATORS = tuple("== != < > <= >= is and or + - * / % & |".split())
CONSTANTS = ("True", "False", "None", "0", "1")
METHODS = tuple("append join get items split strip startswith write read pop format replace lower extend add".split())
EXCEPTIONS = tuple(
    "ValueError TypeError KeyError AttributeError ImportError RuntimeError Exception NotImplementedError "
    "UnicodeEncodeError FileNotFoundError BaseException OSError OverflowError IndexError StopIteration".split()
)

Scoring = Literal["bits", "tokens", "sum", "per byte"]
"""Of running text: bits per byte, or the share of its tokens that were the most probable. Of choices, whether the right
one is the most probable: by the sum of its tokens' log-probabilities, or by that sum per byte."""


class Item(NamedTuple):
    """A question: which of the choices follows the context? With a single choice, how probable is it?"""

    module: str
    context: str
    choices: tuple[str, ...]
    answer: int


class Blank(NamedTuple):
    """A place in a module, and what could stand there."""

    place: int
    context: str
    answer: str
    rest: str  # of the line: every choice goes on with it
    others: Collection[str]
    choices: int = 4  # in all
    kind: str = ""  # of the question: kinds take turns, so that none is most of a task


class Task(NamedTuple):
    """A kind of question."""

    name: str
    asks: str
    find: Callable[[Source], Iterator[Blank]]
    scoring: Scoring


@cache
def items(task: Task) -> tuple[Item, ...]:
    """The task's items, at most ITEMS. Modules take turns, and so do kinds: the first few are a sample of all."""
    found = [(source, blank) for source in held_out() for blank in task.find(source)]
    found.sort(key=lambda one: digest(one[0].name, one[1].place))
    by_module = in_turns(found, lambda one: (one[1].kind, one[0].name))
    made = (_item(source, blank) for source, blank in in_turns(by_module, lambda one: one[1].kind))
    return tuple(islice((item for item in made if item), ITEMS))


def fingerprint(some: Sequence[Item]) -> str:
    """The SHA-256 of items: equal if and only if they are."""
    return hashlib.sha256(json.dumps(some).encode()).hexdigest()


def _item(source: Source, blank: Blank) -> Item | None:
    """The question that a blank makes; None if it has too few choices, too little context, or too much text."""
    key = (source.name, blank.place)
    others = sorted(set(blank.others) - {blank.answer}, key=lambda other: digest("pick", *key, other))
    picked = [blank.answer, *others[: blank.choices - 1]]
    choices = tuple(word + blank.rest for word in sorted(picked, key=lambda word: digest("order", *key, word)))
    size = len(blank.context.encode()) + max(len(choice.encode()) for choice in choices)
    if len(choices) < blank.choices or len(blank.context) < CONTEXT // 8 or size > LIMIT:
        return None
    return Item(source.name, blank.context, choices, choices.index(blank.answer + blank.rest))


def _fill(source: Source, word: Word, others: Collection[str], **more) -> Blank:
    """A blank in place of a word."""
    context = source.text[context_start(source.text, word.start) : word.start]
    rest = source.text[word.end : line_end(source.text, word.end)]
    return Blank(word.start, context, word.text, rest, others, **more)


# -- running text --


def stretches(source: Source) -> Iterator[Blank]:
    """Some lines of running text, after those before them."""
    ends = [line_end(source.text, place) for place in range(STRETCH, len(source.text), STRETCH)]
    for start, end in pairwise(ends):
        context = source.text[context_start(source.text, start, LIMIT - STRETCH - 100) : start]
        if start < end:
            yield Blank(start, context, source.text[start:end], "", (), choices=1)


# -- lines --


def next_lines(source: Source) -> Iterator[Blank]:
    """A line, among lines of the same module that are indented alike."""
    lines = list(re.finditer(r"\n( *)\S.{8,}\S", source.text))
    alike: dict[str, set[str]] = {}
    for line in lines:
        alike.setdefault(line[1], set()).add(line[0])
    for line in lines:
        context = source.text[context_start(source.text, line.start()) : line.start()]
        yield Blank(line.start(), context, line[0], "", alike[line[1]])


def indentations(source: Source) -> Iterator[Blank]:
    """How far a line is indented that follows a statement: by up to three steps of four spaces."""
    for before, word, _ in source.neighbours():
        gap = source.text[before.end : word.start]
        lines, depth = gap.rstrip(" "), len(gap) - len(gap.rstrip(" "))
        if word.opens and not gap.strip() and depth in (0, 4, 8, 12):
            change = depth - _indentation(source, before)
            kind = "deeper" if change > 0 else "back" if change < 0 else "same"
            place = word._replace(text=gap, start=before.end, end=word.start)
            yield _fill(source, place, [lines + " " * steps for steps in (0, 4, 8, 12)], kind=kind)


def _indentation(source: Source, word: Word) -> int:
    """Of the line that a word ends in."""
    line = source.text[source.text.rfind("\n", 0, word.end) + 1 : word.end]
    return len(line) - len(line.lstrip())


def docstrings(source: Source) -> Iterator[Blank]:
    """The name of a function, after its docstring as a comment; the arguments are the right one's for all."""
    starts, docs = line_starts(source.text), {}
    functions = [node for node in ast.walk(source.tree()) if isinstance(node, ast.FunctionDef)]
    for node in functions:
        if (doc := ast.get_docstring(node)) and not node.name.startswith("__"):
            docs[starts[node.lineno - 1] + node.col_offset] = node.name, " ".join(doc.split("\n\n")[0].split())
    known = {name for name, _ in docs.values()}
    for head, word, _ in source.neighbours():
        name, doc = docs.get(head.start, ("", ""))
        if name == word.text and name.strip("_").lower() not in doc.lower():
            line = source.text.rfind("\n", 0, head.start) + 1
            indent, before = source.text[line : head.start], source.text[context_start(source.text, line) : line]
            yield _fill(source, word, known)._replace(context=f"{before}{indent}# {doc}\n{indent}def ")


# -- words --


def among(
    alternatives: Collection[str], fits: Callable[[Word, Word, Word], bool], choices: int = 4
) -> Callable[[Source], Iterator[Blank]]:
    """Finds words that are one of a few, where they fit."""

    def find(source: Source) -> Iterator[Blank]:
        for before, word, after in source.neighbours():
            if word.text in alternatives and fits(before, word, after):
                yield _fill(source, word, alternatives, choices=choices, kind=word.text)

    return find


def _is_operand(word: Word) -> bool:
    """Whether a word may end what stands left of an operator."""
    name = word.kind == tokenize.NAME and not keyword.iskeyword(word.text)
    return name or word.kind in (tokenize.NUMBER, tokenize.STRING) or word.text in BRACKETS


def names(source: Source) -> Iterator[Blank]:
    """A name that the context has, though not lately, among others that it has."""
    variables = [word for before, word, after in source.neighbours() if _is_variable(before, word, after)]
    for word in variables:
        last = {other.text: other.start for other in source.seen(variables, word.start)}
        if word.start - last.get(word.text, word.start) >= DISTANCE:
            yield _fill(source, word, last)


def _is_variable(before: Word, word: Word, after: Word) -> bool:
    """Whether a word is a name of the module's own, and no attribute's or keyword argument's."""
    own = word.kind == tokenize.NAME and not keyword.iskeyword(word.text) and not hasattr(builtins, word.text)
    return own and len(word.text) > 2 and word.text != "self" and before.text != "." and after.text != "="


def attributes(source: Source) -> Iterator[Blank]:
    """An attribute of `self` that the context has, among others that it has."""
    found = [word for owner, dot, word in source.neighbours() if (owner.text, dot.text) == ("self", ".")]
    for word in found:
        known = {other.text for other in source.seen(found, word.start)}
        if word.text in known:
            yield _fill(source, word, known)


def imports(source: Source) -> Iterator[Blank]:
    """A name that is imported at the module's top, among all of those; the imports stand before the lines before it."""
    top = takewhile(lambda node: not isinstance(node, ast.FunctionDef | ast.ClassDef), source.tree().body)
    statements = [node for node in top if isinstance(node, ast.Import | ast.ImportFrom)]
    bound = {(alias.asname or alias.name).partition(".")[0] for node in statements for alias in node.names}
    header = "\n".join(ast.unparse(node) for node in statements)
    first = line_starts(source.text)[max((node.end_lineno or 0 for node in statements), default=0)]
    for before, word, after in source.neighbours():
        begin = context_start(source.text, word.start, CONTEXT // 2)
        if word.text in bound and begin >= first and before.text != "." and after.text != "=":
            blank = _fill(source, word, bound)
            yield blank._replace(context=f"{header}\n\n{source.text[begin : word.start]}")


TASKS = (
    Task("perplexity", "how probable the text is: bits per byte", stretches, "bits"),
    Task("next-token", "which token comes next, of all there are", stretches, "tokens"),
    Task("next-line", "which line comes next, of four of the module", next_lines, "per byte"),
    Task("indentation", "how far the next line is indented", indentations, "sum"),
    Task("bracket", "which bracket closes", among(BRACKETS, lambda b, w, a: b.text not in "([{", 3), "sum"),
    Task("name", f"which name, last seen {DISTANCE} or more characters back, comes here", names, "sum"),
    Task("attribute", "which attribute of self comes here", attributes, "sum"),
    Task("import", "which imported name comes here", imports, "sum"),
    Task("keyword", "which keyword opens the line", among(KEYWORDS, lambda b, w, a: w.opens), "sum"),
    Task(
        "operator",
        "which operator stands between two operands",
        among(OPERATORS, lambda b, w, a: _is_operand(b)),
        "sum",
    ),
    Task(
        "constant",
        "True, False, None, 0 or 1",
        among(CONSTANTS, lambda b, w, a: b.text in ("=", "==", "return", "(", ",", "is")),
        "sum",
    ),
    Task("method", "which method is called", among(METHODS, lambda b, w, a: b.text == "." and a.text == "("), "sum"),
    Task(
        "exception",
        "which exception",
        among(EXCEPTIONS, lambda b, w, a: b.text in ("raise", "except", "(", ",")),
        "sum",
    ),
    Task("docstring", "what a function is called that does what its docstring says", docstrings, "sum"),
)
