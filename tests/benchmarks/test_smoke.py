import itertools

import pytest
from typer.testing import CliRunner

from benchmarks import smoke
from benchmarks.smoke import Pair


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only where something is run."""
    now = [0.0]
    monkeypatch.setattr(smoke.time, "perf_counter", lambda: now[0])
    return now


def taking(clock, *seconds):
    """Takes so long each time, the last again and again."""
    each = itertools.chain(seconds, itertools.repeat(seconds[-1]))

    def run():
        clock[0] += next(each)

    return run


def pair(run, beside, most=1.5):
    return Pair("one", run, "another", beside, most)


def test_the_best_times_are_compared_but_for_the_first_which_compiles(clock):
    run, beside = taking(clock, 0.001, 9, 2, 7), taking(clock, 90, 4, 5)
    assert pair(run, beside).ratio() == pytest.approx(2 / 4)


def test_a_ratio_above_the_bound_is_measured_again_and_is_what_all_times_together_say(clock):
    noise = [8] * smoke.TURNS
    assert pair(taking(clock, 0, *noise, 4), taking(clock, 4)).ratio() == pytest.approx(1)
    assert pair(taking(clock, 8), taking(clock, 4)).ratio() == pytest.approx(2)


def test_short_things_are_run_for_a_while(clock):
    calls = []
    run = taking(clock, 0.01)
    assert pair(lambda: (calls.append(1), run()), taking(clock, 0.01)).ratio() == pytest.approx(1)
    assert len(calls) == pytest.approx(1 + smoke.SECONDS / 0.02, abs=2)


@pytest.mark.parametrize(("seconds", "status", "said"), [(1, 0, "ok"), (2, 1, "SLOW")])
def test_what_is_above_its_bound_is_named_and_ends_the_command_with_1(clock, monkeypatch, seconds, status, said):
    monkeypatch.setattr(smoke, "pairs", lambda: iter([pair(taking(clock, seconds), taking(clock, 1))]))
    monkeypatch.setattr(smoke, "enable_cache", lambda: None)
    app = smoke.typer.Typer()
    app.command()(smoke.main)
    result = CliRunner().invoke(app)
    assert result.exit_code == status
    assert said in result.output
