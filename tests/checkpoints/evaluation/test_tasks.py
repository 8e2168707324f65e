import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator

import pytest

from jaxserve.checkpoints.embedded import corpus
from jaxserve.checkpoints.evaluation import tasks
from jaxserve.checkpoints.evaluation.source import Source, words
from jaxserve.checkpoints.evaluation.tasks import TASKS, Blank, Item, Task

NAMES = [task.name for task in TASKS]
TEXTS = {module.name: module.text for module in corpus.modules()}
FINGERPRINTS = """
import json
from jaxserve.checkpoints.evaluation.tasks import TASKS, fingerprint, items
print(json.dumps([fingerprint(items(task)) for task in TASKS]))
"""


def task(name: str) -> Task:
    return TASKS[NAMES.index(name)]


def blanks(name: str, text: str) -> Iterator[Blank]:
    return task(name).find(Source("m", text, tuple(words(text))))


def answers(name: str, text: str) -> list[str]:
    return [blank.answer for blank in blanks(name, text)]


# -- all tasks, on the library --


def test_there_are_at_least_ten_tasks_with_names_of_their_own():
    assert len(set(NAMES)) == len(NAMES) >= 10


@pytest.mark.parametrize("name", NAMES)
def test_a_task_has_two_hundred_items_from_held_out_modules(name):
    found = tasks.items(task(name))
    assert len(found) == len(set(found)) == 200
    assert all(corpus.is_held_out(item.module) for item in found)
    assert len({item.module for item in found}) >= 15


@pytest.mark.parametrize("name", NAMES)
def test_items_are_short_enough_for_any_model(name):
    for item in tasks.items(task(name)):
        assert len(item.context) >= 50
        assert max(len((item.context + choice).encode()) for choice in item.choices) <= 1000


@pytest.mark.parametrize("name", NAMES)
def test_the_choices_differ_and_the_right_one_is_what_the_module_says(name):
    made = {"import": lambda item: item.context.partition("\n\n")[2], "docstring": lambda item: "def "}
    expected = 1 if task(name).scoring in ("bits", "tokens") else 3 if name == "bracket" else 4
    for item in tasks.items(task(name)):
        assert len(set(item.choices)) == len(item.choices) == expected
        context = made.get(name, lambda item: item.context)(item)
        assert context + item.choices[item.answer] in TEXTS[item.module]


@pytest.mark.parametrize("name", [task.name for task in TASKS if task.scoring in ("sum", "per byte")])
def test_no_place_among_the_choices_is_right_much_more_often_than_chance(name):
    found = tasks.items(task(name))
    share = len(found) / len(found[0].choices)
    assert all(0.5 * share < count < 1.6 * share for count in Counter(item.answer for item in found).values())


@pytest.mark.parametrize("name", ["bracket", "keyword", "operator", "constant", "method", "exception"])
def test_answers_take_turns_so_that_none_is_most_of_a_task(name):
    words = Counter(next(words_of(item)) for item in tasks.items(task(name)))
    assert max(words.values()) <= 0.5 * 200


def words_of(item: Item) -> Iterator[str]:
    return (word.text for word in words("(" + item.choices[item.answer].splitlines()[0] + "\n") if word.text != "(")


def test_items_are_the_same_in_a_process_with_other_hashes():
    result = subprocess.run(
        [sys.executable, "-c", FINGERPRINTS], capture_output=True, text=True, env=os.environ | {"PYTHONHASHSEED": "7"}
    )
    assert json.loads(result.stdout) == [tasks.fingerprint(tasks.items(task)) for task in TASKS], result.stderr


def test_a_fingerprint_changes_with_anything_in_an_item():
    item = Item("m", "context", ("a", "b"), 0)
    others = [item._replace(module="n"), item._replace(context="c"), item._replace(choices=("a", "c")),
              item._replace(answer=1)]  # fmt: skip
    assert len({tasks.fingerprint([each]) for each in [item, *others]} | {tasks.fingerprint([item, item])}) == 6


# -- each task, on a few lines --


def test_running_text_is_cut_at_line_ends_and_each_part_follows_its_context():
    text = "".join(f"value_{i} = {i}\n" for i in range(200))
    found = list(blanks("perplexity", text))
    assert len(found) >= 4
    assert all(blank.answer.startswith("\n") and blank.context in text for blank in found)
    assert "".join(blank.answer for blank in found) in text
    assert [blank.answer for blank in blanks("next-token", text)] == [blank.answer for blank in found]


def test_lines_are_chosen_among_those_indented_alike():
    text = "import something\nif something:\n    first_of_them()\n    second_of_them()\nelse_where()\nx = 1\n"
    found = list(blanks("next-line", text))
    assert [blank.answer for blank in found] == [
        "\nif something:",
        "\n    first_of_them()",
        "\n    second_of_them()",
        "\nelse_where()",
    ]
    assert found[1].others == {"\n    first_of_them()", "\n    second_of_them()"}
    assert found[1].context == "import something\nif something:"


def test_an_indentation_keeps_its_blank_lines_and_has_the_line_after_it():
    text = "def f(x):\n    if x:\n        return (1,\n  2)\n\n    # why\n    y = 2\n    return y\n\ng()\n"
    found = [(blank.answer, blank.rest, blank.kind) for blank in blanks("indentation", text)]
    assert found == [
        ("\n    ", "if x:", "deeper"),
        ("\n        ", "return (1,", "deeper"),
        ("\n    ", "return y", "same"),
        ("\n\n", "g()", "back"),
    ]


def test_a_bracket_closes_something_that_is_not_empty():
    assert answers("bracket", "f(); g(a[1], {2: 3})\nend\n") == ["]", "}", ")"]


def test_a_name_is_recalled_from_far_back_and_not_one_of_an_attribute_or_builtin():
    far = "#" * 250 + "\n"
    text = "x = width(height)\n" + far + "print(width, a.width, len(height), height=1, h=width)\n"
    assert answers("name", text) == ["width", "height"]


def test_attributes_of_self_are_recalled():
    text = "self.a = 1\nself.b = other.c\nx(self.a, self.d)\n"
    found = list(blanks("attribute", text))
    assert [(blank.answer, set(blank.others)) for blank in found] == [("a", {"a", "b"})]


def test_imported_names_are_recalled_from_the_imports_which_stand_before_the_lines_before():
    text = '"""A module."""\nimport os.path, sys\nfrom re import sub as replace\n\n' + "x = 1\n" * 100
    (found,) = blanks("import", text + "replace(x.sys, os=1)\n")
    assert (found.answer, found.rest, found.others) == ("replace", "(x.sys, os=1)", {"os", "sys", "replace"})
    assert found.context.startswith("import os.path, sys\nfrom re import sub as replace\n\nx = 1\nx = 1\n")


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("keyword", "x = 1\nif x: pass\nfor y in x if y else z:\n    return y\n", "if for return"),
        ("operator", "f(-1, *a, b * c)\nx = a[0] - 1 if b and c else not d\n", "* - and"),
        ("constant", "x = None\nf(True, 1)\nreturn 0\ny = 3 + 1\n", "None True 1 0"),
        ("method", "a.join(b)\na.append\njoin(c)\na.b.read()\n", "join read"),
        (
            "exception",
            "raise OSError(x)\nexcept (KeyError, TypeError):\nx = IndexError\n",
            "OSError KeyError TypeError",
        ),
    ],
)
def test_words_of_a_kind_are_found_where_they_fit(name, text, expected):
    assert answers(name, f"first\n{text}end\n") == expected.split()


def test_a_docstring_stands_as_a_comment_before_its_function_and_does_not_have_its_name():
    text = (
        "class A:\n    @staticmethod\n    def first(a):\n        '''Do one\n        thing.\n\n        More.'''\n\n"
        "    def second(b):\n        '''The second.'''\n\n    def __len__(self):\n        '''Size.'''\n"
    )
    (found,) = blanks("docstring", text)
    assert (found.answer, found.rest, found.others) == ("first", "(a):", {"first", "second"})
    assert found.context == "class A:\n    @staticmethod\n    # Do one thing.\n    def "


def test_functions_of_one_name_keep_their_own_docstrings():
    text = "def get(a):\n    '''One.'''\ndef get(b):\n    '''Two.'''\n"
    assert [(blank.rest, blank.context.splitlines()[-2]) for blank in blanks("docstring", text)] == [
        ("(a):", "# One."),
        ("(b):", "# Two."),
    ]


def test_a_place_with_too_few_others_or_too_little_before_it_makes_no_item():
    context = "x" * 100
    blank = Blank(100, context, "a", " + 1", ["a", "b", "c", "d", "e"])
    made = tasks._item(Source("m", "", ()), blank)
    assert made is not None and made.choices[made.answer] == "a + 1" and len(made.choices) == 4
    for changed in (
        blank._replace(others=["a", "b", "c"]),
        blank._replace(context="x"),
        blank._replace(context="x" * 1000),
        blank._replace(rest="é" * 500),
    ):
        assert tasks._item(Source("m", "", ()), changed) is None
