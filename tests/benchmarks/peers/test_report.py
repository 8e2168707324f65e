import pytest

from benchmarks.peers import report
from benchmarks.peers.job import Job
from benchmarks.peers.peer import PeerError
from benchmarks.peers.report import Found
from jaxserve.parallel.errors import RequestError

ASKED = Job("folder", "int8", (4,), 10, 3, 100, 0, 60.0)


def said(prefill, decode, tokens=((1, 2, 3), (1, 2, 4), (1, 5, 6), (1, 5, 6))):
    answer = {"prefill_seconds": prefill, "decode_seconds": decode, "decode_tokens": 8, "tokens": tokens}
    return {"batch": 4, **answer}


@pytest.fixture
def found():
    ours, theirs, slow = Found("INT8"), Found("Q8_0"), Found("8 bits")
    theirs.note({"version": "library 1.0"}, ASKED)
    for prefill, decode in ((1.0, 2.0), (4.0, 8.0), (2.0, 4.0)):  # the machine's speed changes from turn to turn
        ours.note(said(prefill, decode), ASKED)
        theirs.note(said(2 * prefill, decode / 2), ASKED)
        slow.note({"batch": 4, "expected": 1200.0}, ASKED)
    return {"jaxserve": ours, "other": theirs, "slow": slow, "broken": Found("BF16")}


def test_tokens_a_second_are_medians_and_ratios_those_of_turns(found):
    ours, theirs, slow, broken = report.rows(found)
    assert ours == ("4", "jaxserve", "INT8", "20", "1.00", "2", "1.00")
    assert theirs == ("4", "other", "Q8_0", "10", "2.00", "4", "0.50")
    assert slow[3:] == ("left out: 20 minutes", "", "", "")
    assert broken[3:] == ("failed", "", "", "")


def test_without_jaxserve_there_are_no_ratios(found):
    del found["jaxserve"]
    assert report.rows(found)[0] == ("4", "other", "Q8_0", "10", "", "4", "")


def test_what_is_saved_is_loaded_as_it_was(found, tmp_path):
    path = tmp_path / "results" / "peers.json"
    report.save(path, found, {"model": "bench-1b"})
    assert report.load(path) == found
    assert found["other"].version == "library 1.0"
    assert found["other"].batches[0].different == pytest.approx([2.0] * 3)  # 1, 2 and 3 of four tokens
    with pytest.raises(RequestError, match="nothing.json isn't there"):
        report.load(tmp_path / "nothing.json")


def test_decode_that_was_never_alone_is_an_error(found):
    with pytest.raises(PeerError, match="give more --new-tokens"):
        found["jaxserve"].note(said(1.0, -0.1), ASKED)


def test_rows_make_a_table_in_markdown(found):
    lines = report.markdown(report.rows(found)[:1]).splitlines()
    assert lines[1] == "| ---: | --- | --- | ---: | ---: | ---: | ---: |"
    assert lines[2] == "| 4 | jaxserve | INT8 | 20 | 1.00 | 2 | 1.00 |"
