from jaxserve.checkpoints.embedded import corpus
from jaxserve.checkpoints.evaluation.source import Source, context_start, digest, held_out, in_turns, line_starts, words

TEXT = '# π\nif (a ==\n        "x"):  # why\n\n    b = 1\nc\n'


def test_words_stand_where_they_are_in_the_text():
    found = list(words(TEXT))
    assert [word.text for word in found] == ["if", "(", "a", "==", '"x"', ")", ":", "b", "=", "1", "c"]
    assert [TEXT[word.start : word.end] for word in found] == [word.text for word in found]


def test_a_word_opens_a_statement_and_not_every_line():
    assert [word.text for word in words(TEXT) if word.opens] == ["if", "b", "c"]


def test_neighbours_are_all_words_but_the_ends_with_those_around_them():
    found = [tuple(word.text for word in three) for three in Source("m", "a = b", tuple(words("a = b"))).neighbours()]
    assert found == [("a", "=", "b")]


def test_a_context_begins_with_a_line_and_is_no_longer_than_it_may_be():
    text = "one\ntwo\nthree"
    assert [text[context_start(text, 12, size) : 12] for size in (20, 12, 11, 8, 7, 4)] == [
        "one\ntwo\nthre",
        "one\ntwo\nthre",
        "two\nthre",
        "two\nthre",
        "thre",
        "thre",
    ]


def test_a_line_that_is_too_long_leaves_no_context():
    assert context_start("x" * 50, 40, 10) == 40


def test_the_words_seen_are_those_of_the_context():
    text = "first = 1\n" + "x = 2\n" * 200
    source = Source("m", text, tuple(words(text)))
    seen = source.seen(source.words, 1000)
    assert {word.text for word in seen} == {"x", "=", "2"}
    assert 400 <= seen[0].start < 1000 - 594 and seen[-1].end <= 1000


def test_lines_start_after_line_ends_alone():
    assert line_starts("a\x0cb\nc\n") == [0, 4, 6]


def test_digests_are_fixed_numbers():
    assert digest("a", 1) == "05a9c569a185ac60f5511f9760bc3f1ac046b20d18db2ad4d8fa86eda4f5b28e"


def test_kinds_take_turns_in_the_order_given():
    assert "".join(in_turns("aabacb", lambda letter: letter)) == "abcaba"


def test_sources_are_the_held_out_modules():
    names = [source.name for source in held_out()]
    assert names and all(map(corpus.is_held_out, names)) and len(set(names)) == len(names)
