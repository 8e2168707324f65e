import numpy as np
import pytest

from benchmarks.rebalance import draw, judge, power_law


def test_the_power_law_is_as_skewed_as_the_loads_of_xdeepserve():
    law_e = power_law(256, peak=30.0)
    assert law_e.mean() == pytest.approx(1) and law_e.max() == law_e[0] == pytest.approx(30)
    assert np.mean(law_e > 1) == pytest.approx(0.2, abs=0.02)


def test_each_slice_has_all_tokens_and_only_experts_that_move_change_their_load():
    law_e = power_law(16, peak=4.0)
    still, moved = (draw(np.random.default_rng(0), law_e, 2, 3, moving, 10**6) for moving in (0.0, 1.0))
    for count_lte in (still, moved):
        assert count_lte.shape == (2, 3, 16) and (count_lte.sum(-1) == 10**6).all()
        np.testing.assert_allclose(np.sort(count_lte)[..., -1], 10**6 * 4 / 16, rtol=0.02)
    assert len({row.argmax() for row in still[0]}) == 1 < len({row.argmax() for row in moved[0]})


def test_a_placement_is_judged_by_the_mean_and_by_slices_and_by_what_the_next_one_writes():
    seen, later = np.array([[[6, 0], [0, 2]]]), np.array([[[3, 3], [5, 5]]])
    found = judge(np.array([[0, 0, 1]]), np.array([[0, 1, 1]]), seen, later, ranks=3)
    assert found == pytest.approx((1.5 / (4 / 3), (3 + 2) / (8 / 3), (3 + 5) / (16 / 3), 1, 1))
