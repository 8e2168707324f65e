"""What dashboards see of a fleet, against what has happened in it."""

import pytest
from prometheus_client import CollectorRegistry

from jaxserve.fleet.health import Patience
from jaxserve.fleet.metrics import FleetCollector
from tests.jaxserve.fleet.fakes import Clock, Fake, asked, make_fleet


class Board:
    """A fleet of fakes, and its samples."""

    def __init__(self):
        self.clock, self.offers = Clock(), set[str]()
        self.fleet = make_fleet(self.clock, patience=Patience(slow_after=1, hung_after=10, dead_after=5))
        self._registry = CollectorRegistry()
        self._registry.register(FleetCollector(self.fleet))

    def join(self, name, role) -> Fake:
        fake = Fake(name, role, self.offers, self.clock)
        self.fleet.join(fake)
        return fake

    def __call__(self, name: str, **labels: str) -> float | None:
        return self._registry.get_sample_value(f"jaxserve:fleet_{name}", labels)

    def jobs(self) -> list[float | None]:
        return [self("jobs", stage=stage) for stage in ("waiting", "prefill", "decode")]


@pytest.fixture
def board():
    return Board()


def test_a_fleet_to_which_nothing_has_happened_shows_noughts(board):
    assert board.jobs() == [0, 0, 0]
    assert [board("instances_lost_total", why=why) for why in ("gone", "dead", "hung")] == [0, 0, 0]
    assert board("retries_total") == board("detection_seconds_count") == board("recovery_seconds_sum") == 0
    assert board("instances", role="decode", state="healthy") is None


def test_instances_are_counted_by_role_and_state_and_each_shows_its_cache(board):
    board.join("P1", "prefill")
    one, two, busy = (board.join(name, "decode") for name in ("D1", "D2", "D3"))
    one.draining, two.pages, busy.tasks = True, 16, {"x": asked("x", (5,))}
    board.fleet.step()
    board.clock.now += 2
    board.fleet.step()
    assert board("instances", role="prefill", state="healthy") == 1
    assert [board("instances", role="decode", state=state) for state in ("healthy", "slow", "draining")] == [1, 1, 1]
    usage = [board("kv_cache_usage", instance=name, role="decode") for name in ("D1", "D2")]
    assert usage == [0, 0.25] and board("kv_cache_usage", instance="P1", role="prefill") == 0


def test_jobs_are_counted_by_stage(board):
    board.fleet.add(asked("w", (5,), n=3))
    assert board.jobs() == [3, 0, 0]
    prefill, decode = board.join("P1", "prefill"), board.join("D1", "decode")
    board.fleet.step()
    assert board.jobs() == [0, 3, 0]
    prefill.go_on(next(iter(prefill.tasks)))
    board.fleet.step()
    assert board.jobs() == [0, 2, 1]
    decode.work(4)
    board.fleet.step()
    assert board.jobs() == [0, 2, 0]
    board.fleet.abort("w")
    assert board.jobs() == [0, 0, 0]


def test_pages_that_do_not_come_are_counted_by_from_where_to_where(board):
    prefill, decode = board.join("P1", "prefill"), board.join("D1", "decode")
    board.fleet.add(asked("x", (5,), seed=1))
    prefill.work()
    board.fleet.step()
    assert board("handovers_missed_total", prefill="P1", decode="D1") is None
    board.offers.clear()
    decode.work()
    board.fleet.step()
    assert board("handovers_missed_total", prefill="P1", decode="D1") == board("retries_total") == 1


def test_what_is_lost_is_counted_with_how_soon_that_was_known_and_others_went_on(board):
    silent = board.join("D1", "decode")
    board.fleet.add(asked("x", (5,), seed=1))
    silent.silent = True
    board.clock.now += 6
    board.fleet.step()
    assert [board("instances_lost_total", why=why) for why in ("gone", "dead", "hung")] == [0, 1, 0]
    assert (board("detection_seconds_count"), board("detection_seconds_sum")) == (1, 6)
    assert (board("retries_total"), board("recovery_seconds_count")) == (1, 0)
    board.clock.now += 2
    other = board.join("D2", "decode")
    board.fleet.step()
    other.work()
    board.fleet.step()
    assert (board("recovery_seconds_count"), board("recovery_seconds_sum")) == (1, 2)
    other.die()
    board.fleet.step()
    assert board("instances_lost_total", why="gone") == 1 and board("retries_total") == 2
