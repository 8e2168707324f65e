import json
import math

import numpy as np
import pytest

from jaxserve.bench.workload import (
    OWN,
    SHARED,
    WARMUP,
    Ask,
    Lengths,
    Piece,
    lengths,
    poisson,
    read_trace,
    synthetic,
    tokens,
    warmups,
)
from jaxserve.parallel.errors import RequestError

WORDS = range(100, 1000)


def trace(tmp_path, *lines) -> list[Ask]:
    (tmp_path / "trace.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return read_trace(tmp_path / "trace.jsonl")


def test_lengths_are_a_number_or_a_range():
    assert (lengths("64"), lengths(" 64-256 "), lengths("1-1")) == (Lengths(64, 64), Lengths(64, 256), Lengths(1, 1))


@pytest.mark.parametrize("said", ["", "0", "0-4", "9-8", "-3", "1.5", "4-", "many"])
def test_what_is_no_length_is_refused(said):
    with pytest.raises(RequestError, match="is no number of tokens; give one like 64, or a range like 64-256"):
        lengths(said)


def test_synthetic_lengths_fill_their_ranges_and_are_drawn_again_by_the_same_seed():
    asks = synthetic(400, Lengths(3, 5), Lengths(7, 7), 0, seed=1)
    assert {ask.pieces[0].tokens for ask in asks} == {3, 4, 5}
    assert {ask.output_tokens for ask in asks} == {7}
    assert asks == synthetic(400, Lengths(3, 5), Lengths(7, 7), 0, seed=1)
    assert asks != synthetic(400, Lengths(3, 5), Lengths(7, 7), 0, seed=2)


def test_prompts_are_the_same_as_far_as_their_prefix_and_unlike_after_it():
    prompts = [tokens(ask.pieces, WORDS, 0) for ask in synthetic(5, Lengths(20, 30), Lengths(1, 1), 16, seed=0)]
    assert len({tuple(prompt[:16]) for prompt in prompts}) == 1
    assert len({tuple(prompt[16:36]) for prompt in prompts}) == 5
    assert all(36 <= len(prompt) <= 46 and set(prompt) <= set(WORDS) for prompt in prompts)


def test_warm_ups_are_as_long_as_the_first_requests_and_have_words_of_their_own():
    asks = [Ask((Piece((SHARED, 0), 4), Piece((OWN, 0), 6)), None, 9), Ask((), "text", 3), Ask((), "more", 1)]
    first, second = warmups(asks, 2)
    assert first == Ask((Piece((WARMUP, 0), 10),), None, 9)
    assert second == Ask((Piece((WARMUP, 1), 128),), None, 3)
    assert tokens(first.pieces, WORDS, 0)[:4] != tokens(asks[0].pieces, WORDS, 0)[:4]
    assert warmups(asks, 0) == []


def test_arrivals_are_poisson_s():
    times = np.array(poisson(4.0, 20_000, seed=0))
    gaps = np.diff(times, prepend=0)
    assert (gaps >= 0).all()
    np.testing.assert_allclose(gaps.mean(), 0.25, rtol=0.03)
    np.testing.assert_allclose(gaps.std(), 0.25, rtol=0.03)  # of an exponential, the mean
    np.testing.assert_allclose((gaps > 0.25).mean(), math.exp(-1), rtol=0.03)
    assert poisson(4.0, 5, seed=0) == times[:5].tolist()


def test_at_an_infinite_rate_all_come_at_once():
    assert poisson(math.inf, 3, seed=0) == [0, 0, 0]


def test_a_trace_has_texts_or_lengths_and_is_read_in_order_of_arrival(tmp_path):
    later, sooner = trace(
        tmp_path,
        {"prompt_tokens": 5, "output_tokens": 2, "arrival": 1.5},
        {"prompt": "hello", "output_tokens": 3, "arrival": 0},
    )[::-1]
    assert later == Ask((Piece((OWN, 1), 5),), None, 2, 1.5)
    assert sooner == Ask((), "hello", 3, 0)
    assert trace(tmp_path, {"prompt": "hello", "output_tokens": 3}) == [Ask((), "hello", 3, None)]


def test_of_a_trace_the_first_lines_can_be_taken(tmp_path):
    trace(tmp_path, {"prompt": "a", "output_tokens": 1}, {"prompt": "b", "output_tokens": 1})
    assert [ask.text for ask in read_trace(tmp_path / "trace.jsonl", 1)] == ["a"]


def test_mooncake_s_traces_are_read_with_the_blocks_that_prompts_share(tmp_path):
    one, other = trace(
        tmp_path,
        {"timestamp": 0, "input_length": 1100, "output_length": 3, "hash_ids": [46, 47, 48]},
        {"timestamp": 3052, "input_length": 700, "output_length": 4, "hash_ids": [46]},
    )
    assert one == Ask((Piece((SHARED, 46), 512), Piece((SHARED, 47), 512), Piece((SHARED, 48), 76)), None, 3, 0)
    assert other == Ask((Piece((SHARED, 46), 512), Piece((OWN, 2), 188)), None, 4, 3.052)
    first, second = (tokens(ask.pieces, WORDS, 0) for ask in (one, other))
    assert (len(first), len(second), first[:512] == second[:512]) == (1100, 700, True)
    assert first[512:600] != second[512:600]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "trace.jsonl:2 is not JSON"),
        ("3", "trace.jsonl:2 must be an object"),
        ('{"output_tokens": 1}', "trace.jsonl:2: prompt_tokens must be a whole number, 1 or more; got None"),
        ('{"prompt": "x"}', "trace.jsonl:2: output_tokens must be a whole number, 1 or more; got None"),
        ('{"prompt": "", "output_tokens": 1}', "trace.jsonl:2: prompt must be a text, not empty; got ''"),
        ('{"prompt": "x", "output_tokens": 0}', "output_tokens must be"),
        ('{"prompt": "x", "output_tokens": 1, "arrival": -1}', "arrival must be seconds after the start"),
        ('{"prompt": "x", "output_tokens": 1, "timestamp": "12:00"}', "arrival must be .* got '12:00'"),
        ('{"prompt_tokens": 1, "output_tokens": 1, "hash_ids": 3}', "hash_ids must be a list of whole numbers; got 3"),
        ('{"prompt": "x", "output_tokens": 1}', "some lines have an arrival and some have none"),
    ],
)
def test_a_line_that_is_wrong_is_named(line, message, tmp_path):
    (tmp_path / "trace.jsonl").write_text(f'{{"prompt": "x", "output_tokens": 1, "arrival": 1}}\n{line}\n')
    with pytest.raises(RequestError, match=message):
        read_trace(tmp_path / "trace.jsonl")


def test_a_trace_that_is_not_there_or_empty_is_refused(tmp_path):
    with pytest.raises(RequestError, match="--trace .* can't be read: .* No such file"):
        read_trace(tmp_path / "nowhere")
    (tmp_path / "empty").write_text("\n\n")
    with pytest.raises(RequestError, match="has no requests; give it a line of JSON for each"):
        read_trace(tmp_path / "empty")
