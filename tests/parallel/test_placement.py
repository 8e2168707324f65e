import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.parallel.errors import ShardingError
from jaxserve.parallel.placement import between, eplb, imbalance, load, replicas, routes, time_sliced

README = [  # github.com/deepseek-ai/EPLB: the load of 12 experts in two layers, and where 16 replicas go
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
PLACED = [[5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1], [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]]


def peaks(count_te, count_e):
    """What the time-sliced placement minimizes, written as in the paper: the hottest share of each slice, summed up."""
    return sum(max(c / m for c, m in zip(row, count_e, strict=True)) for row in count_te.tolist())


def splits(experts, extra):
    """All ways to give experts so many more replicas."""
    for chosen in itertools.combinations_with_replacement(range(experts), extra):
        yield 1 + np.bincount(chosen, minlength=experts)


def greedy(count_te, extra):
    """The replicas that the time-sliced placement gives each expert; one slot a rank, so that ranks limit nothing."""
    experts = count_te.shape[1]
    (slots_x,) = time_sliced(count_te[None], extra, ranks=experts + extra)
    return replicas(slots_x, experts)


@st.composite
def counts(draw, most_slices=4):
    """Tokens of up to five experts in some time slices."""
    slices, experts = draw(st.integers(1, most_slices)), draw(st.integers(1, 5))
    size = slices * experts
    return np.reshape(draw(st.lists(st.integers(0, 30), min_size=size, max_size=size)), (slices, experts))


@st.composite
def sizes(draw):
    """Experts, extra slots and ranks that go together, with every expert at most once on a rank."""
    experts, ranks = draw(st.integers(1, 9)), draw(st.integers(1, 6))
    fewest = -(-experts // ranks)
    return experts, draw(st.integers(fewest, experts)) * ranks - experts, ranks


def test_eplb_places_the_example_of_its_readme_as_its_readme_says():
    assert eplb(np.array(README), slots=16, groups=4, nodes=2, ranks=8).tolist() == PLACED


def test_eplb_gives_the_same_whatever_type_counts_have():
    for dtype in (np.uint8, np.int32, np.float32):
        assert eplb(np.array(README, dtype), slots=16, groups=4, nodes=2, ranks=8).tolist() == PLACED
    assert eplb(np.array(README), slots=16, groups=4, nodes=2, ranks=8).dtype == np.int64


def test_eplb_keeps_a_group_of_experts_on_one_node():
    for slots_x in eplb(np.array(README), slots=16, groups=4, nodes=2, ranks=8):
        first, second = ({int(expert) // 3 for expert in half} for half in np.split(slots_x, 2))
        assert len(first) == len(second) == 2 and not first & second


def test_groups_that_do_not_divide_over_nodes_do_not_count():
    load_le = np.array(README)
    one = eplb(load_le, slots=16, groups=1, nodes=1, ranks=8)
    np.testing.assert_array_equal(eplb(load_le, slots=16, groups=3, nodes=2, ranks=8), one)
    assert not np.array_equal(one, PLACED)


@given(counts(most_slices=1), st.integers(0, 4))
def test_no_other_replicas_have_a_lower_maximum_than_those_of_eplb(load_le, extra):
    experts = load_le.shape[1]
    (slots_x,) = eplb(load_le, experts + extra, groups=1, nodes=1, ranks=experts + extra)
    best = min(peaks(load_le, count_e) for count_e in splits(experts, extra))
    assert peaks(load_le, replicas(slots_x, experts)) == pytest.approx(best)


@given(sizes(), st.integers(0, 2**32 - 1))
def test_placements_have_every_expert_and_fill_every_slot_and_are_the_same_again(size, seed):
    experts, extra, ranks = size
    count_lte = np.random.default_rng(seed).integers(0, 50, (2, 3, experts))
    sliced = time_sliced(count_lte, extra, ranks)
    mean = eplb(count_lte.mean(1), experts + extra, groups=1, nodes=1, ranks=ranks)
    np.testing.assert_array_equal(time_sliced(count_lte, extra, ranks), sliced)
    assert sliced.shape == mean.shape == (2, experts + extra)
    for slots_x in (*sliced, *mean):
        assert replicas(slots_x, experts).sum() == experts + extra
    assert all(replicas(slots_x, experts).max() <= ranks for slots_x in sliced)


def test_a_time_sliced_placement_has_experts_at_home_and_replicas_where_there_is_least_to_do():
    count_lte = np.array([[[9, 0, 3, 0, 0, 1], [0, 0, 0, 8, 0, 1], [0, 5, 0, 0, 0, 0]]])
    # Experts 0, 3 and 1 are split, in halves of 4.5, 4 and 2.5; at home the ranks have 7, 7 and 2 to do.
    assert time_sliced(count_lte, extra=3, ranks=3).tolist() == [[0, 1, 3, 2, 3, 1, 4, 5, 0]]


def test_a_replica_avoids_the_rank_that_has_the_expert_even_if_it_has_least_to_do():
    count_lte = np.array([[[6, 0, 5, 5]]])
    assert time_sliced(count_lte, extra=2, ranks=2).tolist() == [[0, 1, 2, 2, 3, 0]]


def test_experts_that_do_not_divide_over_ranks_are_spread_and_extra_slots_fill_the_ranks_up():
    count_lte = np.array([[[1, 1, 1, 1, 7]]])
    assert time_sliced(count_lte, extra=3, ranks=4).tolist() == [[0, 1, 2, 4, 3, 4, 4, 4]]
    assert time_sliced(count_lte, extra=1, ranks=6).tolist() == [[0, 1, 2, 3, 4, 4]]


def test_experts_that_are_hot_in_turn_are_split_where_the_mean_sees_another():
    count_te = np.array([[9, 0, 0, 4], [0, 9, 0, 4], [0, 0, 9, 4]])
    assert greedy(count_te, 3).tolist() == [2, 2, 2, 1]
    (slots_x,) = eplb(count_te.mean(0)[None], slots=7, groups=1, nodes=1, ranks=7)
    assert replicas(slots_x, 4).tolist() == [2, 2, 1, 2]


@given(counts(), st.integers(0, 4))
def test_every_extra_replica_goes_where_one_helps_most(count_te, extra):
    before = greedy(count_te, extra)
    tried = [peaks(count_te, before + one) for one in np.eye(before.size, dtype=int)]
    assert peaks(count_te, greedy(count_te, extra + 1)) == pytest.approx(min(tried))


@given(counts(most_slices=1), st.integers(0, 4))
def test_of_one_slice_no_other_replicas_have_a_lower_maximum(count_te, extra):
    best = min(peaks(count_te, count_e) for count_e in splits(count_te.shape[1], extra))
    assert peaks(count_te, greedy(count_te, extra)) == pytest.approx(best)


def test_two_experts_equally_hot_in_one_slice_wait_for_one_that_is_alone_in_another():
    count_te = np.array([[8, 8, 0], [0, 0, 4]])
    assert greedy(count_te, 2).tolist() == [1, 1, 3]  # 8 + 4/3, where 4 + 4 would have been better
    assert min(splits(3, 2), key=lambda count_e: peaks(count_te, count_e)).tolist() == [2, 2, 1]


def test_an_expert_has_no_more_replicas_than_there_are_ranks():
    slots_lx = time_sliced(np.array([[[100, 1, 0, 0]]]), extra=4, ranks=2)
    assert replicas(slots_lx[0], 4).tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize(
    ("place", "named"),
    [
        (lambda: eplb(np.ones((1, 6)), 10, 3, 3, 4), "10 slots do not divide over 4 ranks; 12 would"),
        (lambda: eplb(np.ones((1, 6)), 8, 4, 2, 4), "6 experts do not divide over 4 groups; 8 would"),
        (lambda: eplb(np.ones((1, 6)), 8, 3, 3, 4), "4 ranks do not divide over 3 nodes; 6 would"),
        (lambda: eplb(np.ones((1, 6)), 4, 3, 1, 4), "6 experts do not fit into 4 slots"),
        (lambda: time_sliced(np.ones((1, 2, 6)), 3, 4), r"9 slots \(6 experts and 3 extra\) .* 4 ranks; 12 would"),
        (lambda: time_sliced(np.ones((1, 2, 2)), 4, 2), "4 extra slots are more than 2 experts can use on 2 ranks"),
        (lambda: routes(np.array([0, 2, 2]), 3, 2), "expert 1 has no slot"),
        (lambda: routes(np.array([0, -1, 2, 1, 0, 0]), 3, 2), "expert 0 has 3 replicas, routes have room for 2"),
        (lambda: routes(np.array([0, 1, 5]), 3, 2), "slot 2 holds expert 5; there are 3"),
        (lambda: load(np.array([0, 1, 1]), np.ones(2), 2), "3 slots do not divide over 2 ranks; 4 would"),
        (lambda: load(np.array([0, -1]), np.ones(2), 2), "expert 1 has no slot"),
        (lambda: between(np.array([0, 1, 1]), np.array([0, 1, 2])), "expert 2 has no slot"),
        (
            lambda: between(np.array([0, 1, 2]), np.array([1, 0, 2])),
            r"experts \[0, 1\] would change places.* a slot more",
        ),
    ],
)
def test_what_cannot_be_placed_is_an_error_that_says_why(place, named):
    with pytest.raises(ShardingError, match=named):
        place()


def test_routes_list_the_slots_of_each_expert_and_repeat_them_to_the_full_width():
    slots_em, count_e = routes(np.array([1, 0, -1, 2, 1, 1]), experts=3, most=4)
    assert slots_em.tolist() == [[1, 1, 1, 1], [0, 4, 5, 0], [3, 3, 3, 3]] and count_e.tolist() == [1, 3, 1]
    assert slots_em.dtype == count_e.dtype == np.int32


@given(sizes(), st.integers(0, 2**32 - 1))
def test_replicas_take_turns_by_the_position_in_the_batch(size, seed):
    experts, extra, ranks = size
    rng = np.random.default_rng(seed)
    (slots_x,) = time_sliced(rng.integers(0, 50, (1, 2, experts)), extra, ranks)
    slots_em, count_e = routes(slots_x, experts, most=ranks)
    assert slots_em.shape == (experts, ranks)  # of every placement
    expert, tokens = rng.integers(experts), rng.integers(1, 40)
    used = [slots_em[expert, i % count_e[expert]] for i in range(tokens)]
    turns = np.bincount(used, minlength=slots_x.size)[slots_x == expert]
    assert turns.sum() == tokens and turns.max() - turns.min() <= 1


def test_ranks_have_the_shares_of_the_replicas_they_hold():
    slots_x, load_e = np.array([0, 1, 0, 2, 2, -1]), np.array([6, 5, 4])
    assert load(slots_x, load_e, ranks=3).tolist() == [3 + 5, 3 + 2, 2]
    assert load(slots_x, np.stack([load_e, 0 * load_e]), ranks=3).tolist() == [[8, 5, 2], [0, 0, 0]]


def test_imbalance_is_how_long_the_busiest_takes_against_the_mean_slice_by_slice():
    assert imbalance(np.array([8.0, 5.0, 2.0])) == pytest.approx(8 / 5)
    assert imbalance(np.array([[4.0, 0.0], [0.0, 4.0]])) == pytest.approx(2)  # even in the mean, never in time
    assert imbalance(np.zeros(3)) == 1


def changed(old_x, new_x):
    """Goes all the way, with weights that are known by their expert, and checks every phase; the rounds."""
    now_x, weights_x = old_x.copy(), old_x.copy()
    rounds = between(old_x, new_x)
    for disabled_x, written, after_x in rounds:
        for routed_x in (disabled_x, after_x):
            routes(routed_x, int(new_x.max()) + 1, most=new_x.size)  # an error if an expert has no slot
        assert written.size and (disabled_x[written] < 0).all()  # nobody uses what is written
        others = np.setdiff1d(np.arange(now_x.size), written)
        np.testing.assert_array_equal(disabled_x[others], now_x[others])
        weights_x[written] = after_x[written]
        now_x = after_x
        np.testing.assert_array_equal(weights_x, now_x)  # whatever is routed to holds the right weights
    np.testing.assert_array_equal(now_x, new_x)
    return rounds


@st.composite
def pairs(draw):
    """Two placements of the same experts in the same number of slots, of which at least one is not needed."""
    experts, extra = draw(st.integers(1, 7)), draw(st.integers(1, 4))
    rest = st.lists(st.integers(-1, experts - 1), min_size=extra, max_size=extra)
    old, new = (draw(st.permutations([*range(experts), *draw(rest)])) for _ in range(2))
    return np.array(old), np.array(new)


@given(pairs())
def test_in_every_phase_every_expert_has_a_slot_with_its_weights_and_no_slot_in_use_is_written(pair):
    old_x, new_x = pair
    differ = np.count_nonzero(old_x != new_x)
    written = sum(each.written.size for each in changed(old_x, new_x))
    assert differ <= written <= 3 * differ


@given(sizes(), st.integers(0, 2**32 - 1))
def test_from_one_time_sliced_placement_to_the_next_is_one_round_and_homes_stay(size, seed):
    experts, extra, ranks = size
    old_x, new_x = time_sliced(np.random.default_rng(seed).integers(0, 50, (2, 3, experts)), extra, ranks)
    assert len(changed(old_x, new_x)) == (not np.array_equal(old_x, new_x))


def test_a_placement_that_stays_needs_no_round():
    assert between(np.array([0, 1]), np.array([0, 1])) == ()


def test_a_slot_that_comes_free_by_itself_is_waited_for_and_no_other_is_lent():
    first, second = changed(np.array([0, 1, 1, -1]), np.array([1, 1, 0, -1]))
    assert (first.written.tolist(), first.disabled_x.tolist()) == ([2], [0, 1, -1, -1])
    assert (second.written.tolist(), second.disabled_x.tolist()) == ([0], [-1, 1, 0, -1])


@pytest.mark.parametrize("spare", [2, -1])
def test_experts_change_places_by_way_of_a_spare_slot_which_gets_back_what_it_had(spare):
    rounds = changed(np.array([0, 1, 2, spare]), np.array([1, 0, 2, spare]))
    assert [each.written.tolist() for each in rounds] == [[3], [0], [1], [3]]
    assert [each.slots_x[3] for each in rounds] == [0, 0, 0, spare]


def test_many_experts_change_places_in_few_rounds_if_many_slots_are_spare():
    old_x, rng = np.arange(288) % 256, np.random.default_rng(0)
    circle = np.concatenate([np.roll(np.arange(256), 1), np.arange(32)])
    assert len(changed(old_x, circle)) < 30
    assert len(changed(old_x, rng.permutation(old_x))) < 30
