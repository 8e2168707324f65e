import json

import pytest

from jaxserve.bench.load import Load, Record
from jaxserve.bench.report import (
    COUNTS,
    LATENCY,
    Spread,
    as_json,
    count_rows,
    every,
    failures,
    goals,
    latencies,
    latency_rows,
    meets,
    spread,
    summarize,
)
from jaxserve.parallel.errors import RequestError

ANSWER = Record(due=1.0, sent=1.5, chunks=(2.0, 2.25, 3.0), end=3.5, prompt_tokens=8, cached_tokens=4, output_tokens=5)
QUICK = Record(0.0, 0.0, (0.5, 1.0), 1.0, 8, 0, 2)
SILENT = Record(0.0, 0.0, (), 0.5, 8, 0, 0)
FULL = Record(0.0, 0.0, (), 9.0, 0, 0, 0, "HTTP 429", "the queue is full")
LOAD = Load([ANSWER, FULL, QUICK, SILENT, FULL._replace(message="again")], asked=7, seconds=4.0)


def test_latencies_count_from_when_a_request_was_due():
    assert latencies(ANSWER) == {"ttft": [1.0], "itl": [0.25, 0.75], "tpot": [0.25], "e2e": [2.5]}


def test_an_answer_without_text_or_of_one_token_has_fewer_latencies():
    assert latencies(SILENT) == {"ttft": [], "itl": [], "tpot": [], "e2e": [0.5]}
    one = Record(0.0, 0.0, (0.5,), 0.75, 8, 0, 1)
    assert latencies(one) == {"ttft": [0.5], "itl": [], "tpot": [], "e2e": [0.75]}


def test_all_gaps_of_all_answers_count_alike():
    assert every([ANSWER, QUICK])["itl"] == [0.25, 0.75, 0.5]


def test_percentiles_lie_between_the_values_that_are_next():
    assert spread([4.0, 1.0, 2.0, 3.0, 5.0]) == pytest.approx(Spread(3.0, 3.0, 4.6, 4.96))
    assert spread([2.0]) == Spread(2.0, 2.0, 2.0, 2.0)
    assert spread([]) is None


def test_goals_are_said_in_milliseconds():
    assert goals(["ttft:500", "itl:12.5", "e2e:60000"]) == {"ttft": 0.5, "itl": 0.0125, "e2e": 60.0}


@pytest.mark.parametrize("said", ["ttft", "ttft:", "ttfb:5", "ttft:-5", "ttft=5", "ttft:fast"])
def test_what_is_no_goal_is_refused(said):
    with pytest.raises(RequestError, match=f"--goodput {said}: it must be one of ttft, itl, tpot, e2e"):
        goals([said])


@pytest.mark.parametrize(
    ("bounds", "good"),
    [
        ({}, True),
        ({"ttft": 1.0}, True),
        ({"ttft": 0.99}, False),
        ({"itl": 0.75}, True),
        ({"itl": 0.5}, False),  # one gap is longer, though their mean is not
        ({"tpot": 0.25, "e2e": 2.5}, True),
        ({"tpot": 0.25, "e2e": 2.4}, False),
    ],
)
def test_an_answer_is_good_that_is_within_every_bound(bounds, good):
    assert meets(ANSWER, bounds) == good


def test_only_what_was_answered_counts_but_for_failures():
    summary = summarize(LOAD, {"e2e": 1.0})
    assert (summary.answered, summary.unfinished, summary.failures, summary.good) == (3, 2, {"HTTP 429": 2}, 2)
    assert (summary.prompt_tokens, summary.cached_tokens, summary.output_tokens) == (24, 4, 7)
    assert summary.latency["e2e"] == pytest.approx(Spread(4 / 3, 1.0, 2.2, 2.47))
    assert summary.latency["ttft"] == pytest.approx(Spread(0.75, 0.75, 0.95, 0.995))
    assert summarize(LOAD, {}).good is None


def test_rows_are_in_milliseconds_and_a_second():
    summary = summarize(LOAD, {"e2e": 1.0})
    assert latency_rows(summary)[0] == ("time to first token", "750.0", "750.0", "950.0", "995.0")
    assert count_rows(summary) == [
        ("requests answered", "3", "0.75"),
        ("that meet the goals", "2", "0.50"),
        ("prompt tokens", "24", "6.00"),
        ("of them cached", "4", "1.00"),
        ("tokens generated", "7", "1.75"),
        ("failed: HTTP 429", "2", ""),
        ("not finished", "2", ""),
    ]
    assert {len(row) for row in latency_rows(summary)} == {len(LATENCY)}
    assert {len(row) for row in count_rows(summary)} == {len(COUNTS)}


def test_what_there_is_none_of_is_no_row():
    summary = summarize(Load([SILENT], 1, 1.0), {})
    assert [row[0] for row in latency_rows(summary)] == ["whole answer"]
    assert [row[0] for row in count_rows(summary)] == ["requests answered", "prompt tokens", "tokens generated"]


def test_of_each_kind_of_failure_the_first_is_told():
    assert failures(LOAD) == ["HTTP 429: the queue is full"]


def test_everything_is_kept_as_json():
    kept = json.loads(json.dumps(as_json(LOAD, summarize(LOAD, {}), {"model": "m"})))
    assert kept["model"] == "m"
    assert kept["summary"]["latency"]["tpot"] == pytest.approx(
        {"mean": 0.375, "p50": 0.375, "p90": 0.475, "p99": 0.4975}
    )
    assert kept["summary"]["failures"] == {"HTTP 429": 2}
    assert kept["requests"][0]["chunks"] == [2.0, 2.25, 3.0]
    assert kept["requests"][1]["failure"] == "HTTP 429"
