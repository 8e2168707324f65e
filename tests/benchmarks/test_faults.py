import pytest

from benchmarks.faults import Answer, Turn, as_table


def test_a_pause_counts_if_it_was_not_over_when_the_fault_came():
    answer = Answer(0, "text", [1.0, 5.0, 5.5, 7.0, 7.5])
    assert answer.pause(since=0.0) == answer.pause(since=4.0) == pytest.approx(4.0)
    assert answer.pause(since=5.2) == pytest.approx(1.5)
    assert answer.pause(since=9.0) == 0.0


def test_the_table_has_medians_the_greatest_and_sums():
    turns = [Turn(0.5, 2, 1.0, 3.0, 10, 0, 0), Turn(0.7, 1, 4.0, 5.0, 11, 1, 0), Turn(0.1, 0, None, 4.0, 9, 0, 1)]
    table = as_table({"killed": turns}, 3, {"dead_after": 5.0})
    cells = [next(iter(column.cells)) for column in table.columns]
    assert cells == ["killed", "0.50 (0.70)", "2.50 (4.00)", "4.00 (5.00)", "3 of 30", "2"]
    assert "--dead-after 5" in str(table.title)


def test_what_no_turn_has_is_left_out():
    table = as_table({"nothing": [Turn(None, 0, None, 0.2, 4, 0, 0)]}, 1, {})
    assert [next(iter(column.cells)) for column in table.columns][1:4] == ["–", "–", "0.20 (0.20)"]
