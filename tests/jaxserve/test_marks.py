import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.marks import Cut, Marks

MARKS = ["<a>", "<bb>", "[]"]
texts = st.lists(st.sampled_from([*MARKS, *"<>ab[] "])).map("".join)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", Cut("", "", "")),
        ("x<a>y<bb>", Cut("x", "<a>", "y<bb>")),
        ("x<b<a>", Cut("x<b", "<a>", "")),
        ("x<b>y", Cut("x<b>y", "", "")),
        ("x<b<b", Cut("x<b", "", "<b")),
        ("x<bb", Cut("x", "", "<bb")),
        ("x[", Cut("x", "", "[")),
        ("x ]", Cut("x ]", "", "")),
    ],
)
def test_text_is_cut_at_its_first_mark_or_where_one_may_begin(text, expected):
    assert Marks(MARKS).cut(text) == expected


def pieces(*texts: str) -> list[str]:
    """Marks and the text between them, of text that comes in pieces."""
    found, held = [], ""
    for text in texts:
        held += text
        while True:
            before, mark, held = Marks(MARKS).cut(held)
            found += [*before, mark] if mark else before
            if not mark:
                break
    return [*found, *held]


@given(texts, st.data())
def test_the_same_marks_are_found_however_the_text_comes(text, data):
    at = data.draw(st.integers(0, len(text)))
    assert pieces(*text) == pieces(text[:at], text[at:]) == pieces(text)
    assert "".join(pieces(text)) == text


def test_a_mark_of_one_character_has_no_beginning():
    assert Marks(["a"]).cut("bcab") == Cut("bc", "a", "b")


def test_all_that_may_be_the_beginning_of_a_mark_waits():
    assert Marks(["aab"]).cut("xaaa") == Cut("xa", "", "aa")
