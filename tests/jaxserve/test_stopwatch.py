import re

import pytest

from jaxserve.stopwatch import Memory, Stopwatch, peak_bytes


def speed(*outputs: tuple[float, int]) -> str:
    """What a stopwatch started at second 10 says of tokens that came so many seconds later."""
    times = iter([10.0, *(10 + after for after, tokens in outputs if tokens)])
    watch = Stopwatch(clock=lambda: next(times))
    for _, tokens in outputs:
        watch.count(tokens)
    return watch.speed()


@pytest.mark.parametrize(
    ("outputs", "said"),
    [
        ([(2, 1), (3, 1), (4, 1)], "3 tokens | first after 2.00 s | then 1.0 tokens/s"),
        ([(2, 1), (4, 4), (6, 4)], "9 tokens | first after 2.00 s | then 2.0 tokens/s"),
        ([(2, 3), (4, 4)], "7 tokens | first after 2.00 s | then 2.0 tokens/s"),
        ([(1, 0), (2, 1), (3, 1), (9, 0)], "2 tokens | first after 2.00 s | then 1.0 tokens/s"),
    ],
    ids=["one by one", "several a step", "several at once", "text without tokens"],
)
def test_the_rate_is_of_the_tokens_after_the_first_output(outputs, said):
    assert speed(*outputs) == said


@pytest.mark.parametrize("outputs", [[(2, 5)], [(2, 3), (2, 2)]])
def test_tokens_that_come_all_at_once_have_no_rate(outputs):
    assert speed(*outputs) == "5 tokens | first after 2.00 s"


def test_an_answer_without_tokens_has_no_times():
    assert speed((2, 0)) == speed() == "0 tokens"


def test_memory_is_told_in_mebibytes():
    summary = Stopwatch().summary(Memory(weights=3 * 2**20, cache=2000 * 2**20))
    assert re.fullmatch(r"0 tokens \| 3 MiB weights, 2,000 MiB cache, [\d,]+ MiB in all", summary)


def test_the_most_memory_of_this_process_is_more_than_python_takes():
    assert 2**24 < peak_bytes() < 2**44
