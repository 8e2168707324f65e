import pytest

from benchmarks.peers.check import Agreement, Verdict, agreement
from benchmarks.peers.peer import PEERS

RIGHT = {"tokens": [[1, 2, 3], [4, 5, 6]], "logprobs": [[-1.0, -2.0, -3.0], [-1.0, -1.0, -1.0]]}


def test_answers_are_compared_until_their_first_other_token():
    other = {"tokens": [[1, 2, 3], [4, 0, 6]], "logprobs": [[-1.0, -2.25, -3.0], [-1.0, -9.0, -9.0]]}
    assert agreement(other, RIGHT) == Agreement(same=4, total=6, difference=pytest.approx(0.25))
    assert agreement(RIGHT, RIGHT) == Agreement(6, 6, 0.0)


def test_in_float32_all_must_be_the_same_and_rounded_weights_may_lead_elsewhere():
    assert Verdict(PEERS[0], "float32", Agreement(6, 6, 1e-6)).holds
    assert not Verdict(PEERS[0], "float32", Agreement(5, 6, 1e-6)).holds
    assert not Verdict(PEERS[0], "float32", Agreement(6, 6, 1e-2)).holds
    assert Verdict(PEERS[0], "int8", Agreement(3, 6, 1e-2)).holds
    assert not Verdict(PEERS[0], "int8", Agreement(3, 6, 2.0)).holds
    assert not Verdict(PEERS[0], "int8", Agreement(0, 6, 0.0)).holds
