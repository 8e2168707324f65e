import json
import math

import pytest

from jaxserve.checkpoints.evaluation import results, suite
from jaxserve.checkpoints.evaluation.statistics import Parts
from jaxserve.checkpoints.evaluation.suite import Evaluation, Measured
from jaxserve.parallel.errors import CheckpointError

CHOICE = Measured("sum", "abc", Parts(["m", "m", "n", "o"], [1.0, 0.0, 1.0, 1.0], [1.0] * 4), [[-1.5, -2.0]] * 4)
BITS = Measured("bits", "def", Parts(["m", "m"], [90.5, 80.0], [100, 100]), [[-90.5], [-80.0]])
FOUND = Evaluation({"model": "tiny", "python": "3.12.1"}, {"keyword": CHOICE, "perplexity": BITS})


def test_what_was_saved_is_read(tmp_path):
    results.save(tmp_path / "a.json", FOUND)
    got = results.read(tmp_path / "a.json")
    assert got.about == FOUND.about
    assert json.dumps(got) == json.dumps(FOUND)
    assert suite.compare(got, FOUND)["keyword"].by.value == 0


def test_a_summary_has_scores_and_no_items():
    got = results.as_json(FOUND)
    assert (got["model"], got["tasks"]["keyword"]["score"]["value"]) == ("tiny", 0.75)
    assert got["tasks"]["keyword"] | {"score": {}} == {
        "scoring": "sum",
        "score": {},
        "chance": 0.5,
        "count": 4,
        "modules": 3,
        "fingerprint": "abc",
    }


def test_an_interval_without_ends_is_json_all_the_same():
    assert results.as_json(FOUND)["tasks"]["perplexity"]["score"] == {"value": 170.5 / 200, "low": None, "high": None}
    json.dumps(results.as_json(FOUND), allow_nan=False)


def test_differences_have_all_their_parts():
    better = Evaluation({}, {"keyword": CHOICE._replace(parts=CHOICE.parts._replace(values=[1.0] * 4))})
    got = results.differences_as_json(suite.compare(better, Evaluation({}, {"keyword": CHOICE})))["keyword"]
    assert (got["by"]["value"], got["gained"], got["lost"], got["p"]) == (0.25, 1, 0, 1.0)
    assert math.isfinite(got["by"]["low"])


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"tasks": []}', '{"tasks": {"keyword": {}}}', "\x00"])
def test_a_file_that_holds_something_else_is_refused(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"a.json holds no results .*; name a file that --out wrote"):
        results.read(tmp_path / "a.json")


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="FileNotFoundError"):
        results.read(tmp_path / "none.json")
