from jaxserve.fleet.health import Patience, Vital

PATIENCE = Patience(slow_after=2, hung_after=10, dead_after=5)


def heard(*signs):
    """How an instance is after (time, beat, busy) were heard, at the last of these times."""
    vital = Vital(0.0)
    for at, beat, busy in signs:
        vital.hear(at, beat, busy)
    return vital.health(signs[-1][0], PATIENCE)


def test_one_whose_loop_turns_is_healthy_however_long_it_has_been_at_work():
    assert heard(*((float(at), at, True) for at in range(1, 60))) == "healthy"


def test_one_that_is_idle_need_not_turn():
    assert heard(*((float(at), 7, False) for at in range(60))) == "healthy"


def test_one_whose_loop_turns_seldom_is_slow_and_is_kept():
    assert heard((1.0, 1, True), (4.0, 1, True)) == "slow"
    assert heard((1.0, 1, True), (4.0, 1, True), (5.0, 2, True)) == "healthy"


def test_one_that_speaks_and_does_not_turn_hangs():
    assert heard((1.0, 1, True), *((float(at), 1, True) for at in range(2, 13))) == "hung"


def test_time_that_was_spent_idle_does_not_count():
    assert heard((1.0, 1, False), (100.0, 1, False), (101.0, 1, True)) == "healthy"


def test_what_is_given_to_one_that_is_slow_or_silent_may_wait():
    vital = Vital(0.0)
    vital.hear(1.0, 1, True)
    assert [vital.doubtful(now, PATIENCE) for now in (1.0, 3.4, 3.6, 6.1)] == [False, False, True, True]
    vital.hear(7.0, 1, True)
    assert vital.health(7.0, PATIENCE) == "slow" and vital.doubtful(7.0, PATIENCE)
    vital.hear(7.1, 2, True)
    assert not vital.doubtful(7.1, PATIENCE)


def test_one_that_is_silent_is_dead_and_not_thought_to_hang():
    vital = Vital(0.0)
    vital.hear(1.0, 1, True)
    assert vital.health(5.9, PATIENCE) == "healthy"
    assert vital.health(6.1, PATIENCE) == "dead"
    vital.hear(7.0, 2, True)
    assert vital.health(7.0, PATIENCE) == "healthy"
