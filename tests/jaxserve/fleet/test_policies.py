from hypothesis import given
from hypothesis import strategies as st

from jaxserve.fleet.policies import (
    DecodeLoad,
    PrefillLoad,
    choose_decode,
    choose_prefill,
    has_room,
    in_doubt,
    unreached,
)

prefills = st.lists(st.builds(PrefillLoad, st.text("abc", max_size=3), st.integers(0, 99), st.integers(1, 4)))
decodes = st.lists(
    st.builds(
        DecodeLoad,
        st.text("abc", max_size=3),
        st.integers(0, 99),
        st.integers(0, 99),
        st.integers(1, 99),
        st.integers(0, 9),
        st.integers(1, 4),
    )  # fmt: skip
)


def test_a_prompt_goes_where_least_is_queued_and_of_equals_to_the_first_by_name():
    loads = [PrefillLoad("c", 10), PrefillLoad("b", 5), PrefillLoad("a", 5)]
    assert choose_prefill(loads, 100) == choose_prefill(loads[::-1], 100) == "a"
    assert choose_prefill([], 100) is None


def test_a_long_prompt_goes_to_the_wider_instance_though_more_is_queued_there():
    loads = [PrefillLoad("narrow", 0, ranks=1), PrefillLoad("wide", 100, ranks=4)]
    assert choose_prefill(loads, 10) == "narrow"
    assert choose_prefill(loads, 1000) == "wide"


def test_where_a_job_has_failed_it_goes_only_if_there_is_no_other():
    loads = [PrefillLoad("a", 0), PrefillLoad("b", 1000)]
    assert choose_prefill(loads, 1, avoid={"a", None}) == "b"
    assert choose_prefill(loads[:1], 1, avoid={"a", None}) == "a"
    rooms = [DecodeLoad("a", 0, 0, 10, 0, 1), DecodeLoad("b", 9, 0, 10, 1, 1)]
    assert choose_decode(rooms, 1, 1.0, avoid={"a", None}) == "b"


def test_an_answer_goes_where_the_least_share_of_the_cache_is_used_or_reserved():
    loads = [DecodeLoad("a", 50, 0, 100, 1, 8), DecodeLoad("b", 0, 60, 100, 1, 8), DecodeLoad("c", 90, 0, 200, 1, 8)]
    assert choose_decode(loads, 1, 1.0) == "c"
    assert choose_decode(loads[:2], 1, 1.0) == "a"
    assert choose_decode(loads[::2], 1000, 1.0) is None


def test_an_instance_takes_as_many_jobs_ahead_as_it_is_told_and_one_without_any_takes_all():
    full = DecodeLoad("a", 0, 0, 100, jobs=4, slots=4)
    assert not has_room(full, 1, ahead=0.0) and has_room(full, 1, ahead=0.5)
    assert has_room(DecodeLoad("a", 0, 0, 100, jobs=0, slots=4), 1000, ahead=0.0)


def test_a_link_is_in_doubt_for_a_while_after_pages_were_missed_on_it():
    missed = {("a", "d"): 100.0, ("b", "d"): 130.0}
    assert in_doubt(missed, 130.0, 60.0) == set(missed)
    assert in_doubt(missed, 160.0, 60.0) == {("b", "d")}
    assert not in_doubt(missed, 190.0, 60.0)


def test_a_decode_instance_is_unreached_if_all_links_to_it_are_in_doubt():
    links = {("a", "d"), ("b", "d"), ("a", "e")}
    assert unreached(links, ["a", "b"], ["d", "e"]) == {"d"}
    assert unreached(links, ["a"], ["d", "e", "f"]) == {"d", "e"}
    assert unreached(links, ["a", "c"], ["d"]) == set()
    assert unreached(links, [], ["d"]) == set()


@given(prefills, st.integers(0, 99))
def test_nobody_would_have_computed_a_prompt_sooner(loads, tokens):
    chosen = choose_prefill(loads, tokens)
    ends = {load.name: [] for load in loads}
    for load in loads:
        ends[load.name].append((load.queued + tokens) / load.ranks)
    assert chosen is None if not loads else min(ends[chosen]) == min(map(min, ends.values()))


@given(decodes, st.integers(0, 99))
def test_the_order_of_instances_makes_no_difference(loads, tokens):
    named = {load.name: load for load in loads}
    there = list(named.values())
    assert choose_decode(there, tokens, 1.0) == choose_decode(there[::-1], tokens, 1.0)
