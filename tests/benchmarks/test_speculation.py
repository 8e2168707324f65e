import pytest

from benchmarks.speculation import Run, worth


def test_a_step_gives_its_own_token_and_the_guesses_that_held_and_speeds_are_compared_prompt_by_prompt():
    without = [Run(2.0, 12, 0), Run(4.0, 12, 0), Run(9.0, 12, 0)]
    runs = [Run(1.0, 8, 4), Run(5.0, 10, 2), Run(6.0, 6, 6)]
    found = worth(runs, without, tokens=12)
    assert found.tokens_a_step == pytest.approx(1.5)
    assert found.tokens_a_second == pytest.approx(3.0)
    assert found.speedup == pytest.approx(1.5)  # of 2, 0.8 and 1.5
