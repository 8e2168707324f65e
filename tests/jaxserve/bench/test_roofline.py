import json

import pytest

from jaxserve.bench import plot, roofline, startup
from jaxserve.bench.costs import Cost
from jaxserve.bench.limits import Limits
from jaxserve.bench.roofline import Point

LIMITS = Limits(1e10, {"int8": 1e12, "bfloat16": 2e11, "float32": 1e11})
READ = Point("16", [0.01, 0.02, 0.04], Cost(1e8, {"int8": 1e9}))
MULTIPLIED = Point("512", [2.0], Cost(1e8, {"int8": 1e12, "float32": 5e10}))


def test_a_share_is_that_of_the_median():
    assert READ.median == 0.02
    assert READ.share(LIMITS) == pytest.approx(0.5)
    assert MULTIPLIED.share(LIMITS) == pytest.approx(0.75)


def test_a_row_has_what_its_head_says():
    row = roofline.row(READ, LIMITS, "800.0")
    assert dict(zip(roofline.head("batch", "tokens/s"), row, strict=True)) == {
        "batch": "16", "ms": "20.0", "p10-p90": "12.0-36.0", "tokens/s": "800.0", "MB": "100", "GFLOP": "1.00",
        "roofline": "50.0%", "limit": "memory",
    }  # fmt: skip
    assert roofline.row(MULTIPLIED, LIMITS)[-1] == "compute"


def test_rows_fit_into_eighty_columns():
    slow = Point("shared expert", [9.8765, 0.1, 9.9], Cost(9.8765e10, {"float32": 9.8e12}))
    rows = roofline.row(READ, LIMITS, "100.0%"), roofline.row(slow, LIMITS, "100.0%"), roofline.head("", "of step")
    assert sum(2 + max(map(len, column)) for column in zip(*rows, strict=True)) <= 80
    assert len(roofline.limit_line(LIMITS)) <= 80


@pytest.mark.parametrize(
    ("value", "said"), [(12345.6, "12,346"), (99.04, "99.0"), (-4.981, "-4.98"), (0.0771, "0.08"), (0, "0.00")]
)
def test_numbers_have_few_digits(value, said):
    assert roofline.short(value) == said


def test_all_numbers_are_kept():
    kept = json.loads(json.dumps(roofline.as_json(MULTIPLIED, LIMITS)))
    assert kept["operations"] == {"int8": 1e12, "float32": 5e10}
    assert (kept["limit"], kept["ideal_seconds"], kept["seconds"]) == ("compute", 1.5, [2.0])


@pytest.mark.parametrize("kind", ["png", "svg"])
@pytest.mark.parametrize("times", [0, 1, 5])
def test_the_roofline_is_drawn_with_any_number_of_points(kind, times, tmp_path):
    plot.roofline(tmp_path / f"roof.{kind}", "a model", [READ, MULTIPLIED] * times, LIMITS, "answers")
    assert (tmp_path / f"roof.{kind}").read_bytes()[:5] in (b"\x89PNG\r", b"<?xml")


def test_stages_of_a_start_add_up():
    found = startup.stages(10.0, {"interpreter": 10.5, "imports": 12.0, "first token": 13.25})
    assert found == {"interpreter": 0.5, "imports": 1.5, "first token": 1.25}
    rows = startup.rows(startup.Startup(found, [found, found], {"nothing": [0.1, 0.2]}))
    assert rows[-2:] == [
        ("from start to first token", "3.25", "3.25", "3.25-3.25"),
        ("alone: nothing", "", "0.15", "0.11-0.19"),
    ]
