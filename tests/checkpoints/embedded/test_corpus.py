from hypothesis import given
from hypothesis import strategies as st

from jaxserve.checkpoints.embedded import corpus
from jaxserve.checkpoints.hub import EMBEDDED
from jaxserve.tokenizer import Tokenizer


def test_about_a_tenth_of_the_library_is_held_out():
    training, held_out = corpus.split(corpus.modules())
    assert 0.06 < len(held_out) / (len(training) + len(held_out)) < 0.14


def test_the_split_depends_on_the_name_alone():
    assert all(map(corpus.is_held_out, ["lzma", "getopt", "tkinter.__init__"]))
    assert not any(map(corpus.is_held_out, ["os", "argparse", "json.decoder"]))


def test_tests_and_packages_of_others_are_left_out(tmp_path):
    for name in ("a.py", "test/b.py", "site-packages/c.py", "d/__init__.py", "d/tests/e.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("pass\n")
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n")
    assert [m.name for m in corpus.modules(tmp_path)] == ["a", "d.__init__"]


def test_the_trained_tokenizer_gives_every_text_back():
    tokenizer = corpus.train_tokenizer([m.text for m in corpus.modules()[:20]])
    for text in ("def f(x):\n\n        return x ** 2  # π\r\n\t", "日本 🎉\x00", ""):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


@given(st.text())
def test_the_embedded_tokenizer_gives_every_text_back(text):
    tokenizer = Tokenizer.from_folder(EMBEDDED)
    if corpus.BEGIN not in text and corpus.END not in text:
        assert tokenizer.decode(tokenizer.encode(text)) == text
