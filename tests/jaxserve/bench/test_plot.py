import builtins

import pytest

from jaxserve.bench import plot
from jaxserve.bench.load import Record
from jaxserve.parallel.errors import RequestError

RECORDS = [Record(i / 9, i / 9 + (i % 3) / 50, (i / 9 + 0.2, i / 9 + 0.3), i / 9 + 0.4, 8, 0, 2) for i in range(20)]


def test_occupancy_counts_the_open_spans_between_the_times_at_which_it_changes():
    assert plot.occupancy([(1.0, 4.0), (2.0, 3.0), (4.0, 5.0)]) == ([0.0, 1.0, 2.0, 3.0, 4.0, 5.0], [0, 1, 2, 1, 1, 0])
    assert plot.occupancy([]) == ([0.0], [0])


@pytest.mark.parametrize("kind", ["png", "svg"])
@pytest.mark.parametrize("records", [RECORDS, RECORDS[:1], [RECORDS[0]._replace(chunks=(), failure="cut off")]])
def test_a_picture_is_drawn_of_any_load(kind, records, tmp_path):
    plot.save(tmp_path / f"load.{kind}", "a load", records, {"ttft": 0.3})
    assert (tmp_path / f"load.{kind}").read_bytes()[:5] in (b"\x89PNG\r", b"<?xml")


def test_a_file_that_is_no_picture_is_refused(tmp_path):
    with pytest.raises(RequestError, match=r"--plot .*load.txt: it must end in .png or .svg"):
        plot.check(tmp_path / "load.txt")


def test_without_matplotlib_the_extra_is_named(monkeypatch, tmp_path):
    def absent(name, *rest):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(RequestError, match=r"`pip install 'jaxserve\[plot\]'` brings it"):
        plot.check(tmp_path / "load.png")
