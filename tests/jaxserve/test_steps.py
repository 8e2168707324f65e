"""What is promised of the compiled programs themselves: no transfer, no copy of the cache, no effect of padding."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.request import Request
from jaxserve.steps import State
from tests.jaxserve.conftest import greedy, serve, tokens

PROMPTS = {"a": (5, 7, 11), "b": (2, 3, 4, 6, 8)}


@pytest.fixture(scope="module")
def shared(make_engine):
    return make_engine()


@pytest.fixture
def started(shared):
    """An engine of which a step has put two prompts into the cache, and nothing is launched since."""
    for id, prompt in PROMPTS.items():
        shared.add(Request(id, prompt, greedy(40)))
    shared.step()
    yield shared
    for id in PROMPTS:
        shared.abort(id)
    assert shared.step() == []


def copied(state: State) -> State:
    return jax.tree.map(jnp.copy, state)


def decode_args(subject, slots, rounds: int = 1):
    """What a decode launch of some slots is given, after the state."""
    rows = jax.device_put(np.array(slots, np.int32))
    masks = subject._packer.rows({}, len(slots), {})[1]
    return subject._table.on_device(), rows, masks, subject._gate, subject._packer.number(rounds)


def slots_of(subject) -> list[int]:
    return [s.slot for s in subject._schedulers[0].running]


def copies_of_the_cache(text: str) -> list[str]:
    """Lines of a compiled program that copy an array of 37 pages."""
    return re.findall(r".*= \(?f32\[37,64,\d+\]\S* copy(?:-start)?\(.*", text)


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_decode_launch_moves_nothing_between_host_and_device(started):
    state, given = copied(started._state), decode_args(started, slots_of(started)[:1])
    program = started._programs[1]
    with jax.transfer_guard("disallow"):
        chosen, state = program(started._model, state, *given)
        jax.block_until_ready(chosen)
        with pytest.raises(Exception, match="[Dd]isallowed host-to-device transfer"):
            program(started._model, state, given[0], np.zeros(1, np.int32), *given[2:])


def test_a_prefill_launch_moves_nothing_between_host_and_device(started):
    shape = started._shapes.prefill[0]
    pack, masks = started._packer.chunks([], shape, {})
    state, table, program = copied(started._state), started._table.on_device(), started._programs[shape]
    with jax.transfer_guard("disallow"):
        result, state = program(started._model, state, table, pack, masks)
        jax.block_until_ready(result)
        with pytest.raises(Exception, match="[Dd]isallowed host-to-device transfer"):
            program(started._model, state, table, pack._replace(reported=np.array(False)), masks)


def test_a_launch_takes_the_state_over(started):
    old, given = copied(started._state), decode_args(started, slots_of(started)[:1])
    started._programs[1](started._model, old, *given)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))


def test_the_cache_is_updated_in_place(make_engine):
    text = make_engine(num_pages=37)._programs[1].as_text()
    assert re.search(r"= f32\[37,64,\d+\]\S* parameter\(", text)
    assert copies_of_the_cache(text) == []
    both = jax.jit(lambda cache: (cache, cache.at[0, 0].set(1.0))).lower(jnp.zeros((37, 64, 8))).compile()
    assert copies_of_the_cache(both.as_text()) != []


def test_prefill_of_padding_alone_changes_nothing(started):
    shape = started._shapes.prefill[0]
    before = jax.device_get(started._state)
    pack, masks = started._packer.chunks([], shape, {})
    result, after = started._programs[shape](
        started._model, copied(started._state), started._table.on_device(), pack, masks
    )
    assert_equal(after, before)
    assert not np.any(result.chosen.count_s)


def test_a_row_that_is_no_slot_changes_nothing(started):
    first, second = slots_of(started)
    nobody = started.options.max_num_seqs
    before = jax.device_get(started._state)
    chosen, after = started._programs[4](
        started._model, copied(started._state), *decode_args(started, [nobody, first, nobody, nobody], 2)
    )
    assert np.asarray(chosen.count_s)[:2].tolist() == [[0, 1, 0, 0]] * 2
    assert after.slots.positions_s[first] == before.slots.positions_s[first] + 2
    untouched = [slot for slot in range(nobody) if slot != first]
    for old, new in zip(before.slots, after.slots, strict=True):
        np.testing.assert_array_equal(np.asarray(new)[untouched], old[untouched])
    own = started._schedulers[0].running[0].pages
    for old, new in zip(jax.tree.leaves(before.cache), jax.tree.leaves(after.cache), strict=True):
        others = [page for page in range(len(old)) if page not in own]
        np.testing.assert_array_equal(np.asarray(new)[others], old[others])
        assert not np.array_equal(np.asarray(new)[own], old[own])


def test_rounds_give_what_as_many_launches_give(started):
    nobody = started.options.max_num_seqs
    rows = [*slots_of(started), nobody, nobody]
    program, model = started._programs[4], started._model
    together, at_once = program(model, copied(started._state), *decode_args(started, rows, 3))
    state, each = copied(started._state), []
    for _ in range(3):
        chosen, state = program(model, state, *decode_args(started, rows, 1))
        each.append(jax.tree.map(lambda column: np.asarray(column)[:1], chosen))
    assert_equal(at_once, state)
    assert_equal(jax.tree.map(lambda column: column[:3], together), jax.tree.map(lambda *c: np.concatenate(c), *each))
    assert np.asarray(together.count_s).sum(axis=0).tolist() == [3, 3, 0, 0]


def test_rounds_end_when_all_answers_have(shared):
    shared.add(Request("short", (5, 7), greedy(3)))
    shared.step()
    slots = slots_of(shared)
    chosen, state = shared._programs[1](shared._model, copied(shared._state), *decode_args(shared, slots, 8))
    shared.abort("short")
    assert shared.step() == []
    assert np.asarray(chosen.count_s)[:, 0].tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
    assert state.slots.positions_s[slots[0]] == -1


def test_a_step_is_launched_before_the_one_before_it_is_read(shared, monkeypatch):
    events, launch, read = [], shared._launch, shared._read

    def noted_launch(plan):
        step = launch(plan)
        events.append(("launch", step))
        return step

    def noted_read(step):
        events.append(("read", step))
        return read(step)

    monkeypatch.setattr(shared, "_launch", noted_launch)
    monkeypatch.setattr(shared, "_read", noted_read)
    monkeypatch.setattr(shared, "_rounds", lambda: 1)
    assert len(tokens(serve(shared, [[5, 7]], greedy(6))[0])) == 6
    launched = [step for what, step in events if what == "launch"]
    assert [what for what, _ in events] == ["launch"] + ["launch", "read"] * 6
    assert all(step is launched[i] for i, (_, step) in enumerate(events[2::2]))
    assert launched[-1] is None  # the host knew that the sixth was the last
