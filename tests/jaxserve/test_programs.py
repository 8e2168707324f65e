from itertools import combinations_with_replacement

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.compilation import OPTIONS
from jaxserve.programs import Programs, Shapes, Tiles


def tiles(sizes, width: int) -> int:
    return sum(-(-size // width) for size in sizes)


@given(data=st.data(), tokens=st.integers(1, 600), slots=st.integers(1, 300))
def test_whatever_can_be_planned_has_a_shape_with_the_least_padding(data, tokens, slots):
    shapes = Shapes.of(tokens, slots)
    room, sizes = tokens // shapes.tile, []
    while room and (not sizes or data.draw(st.booleans())):
        sizes.append(data.draw(st.integers(1, room * shapes.tile)))
        room -= tiles(sizes[-1:], shapes.tile)
    found = shapes.for_chunks(sizes)
    assert found in shapes.prefill
    assert tiles(sizes, found.width) <= found.number
    fitting = [shape for shape in shapes.prefill if tiles(sizes, shape.width) <= shape.number]
    assert found.tokens == min(shape.tokens for shape in fitting)
    assert all(shape.tokens <= tokens for shape in shapes.prefill)


@given(slots=st.integers(1, 300), data=st.data())
def test_rows_of_any_number_have_the_smallest_shape_that_holds_them(slots, data):
    shapes, count = Shapes.of(512, slots), data.draw(st.integers(1, slots))
    found = shapes.for_rows(count)
    assert found in shapes.decode
    assert not any(count <= rows < found for rows in shapes.decode)
    assert found <= min(slots, 4 * count)


@pytest.mark.parametrize("tokens", [16, 20, 31, 64])
def test_every_set_of_chunks_that_fills_a_step_fits(tokens):
    shapes = Shapes.of(tokens, 4)
    room = tokens // shapes.tile
    for count in range(1, 4):
        for sizes in combinations_with_replacement(range(1, tokens + 1), count):
            if tiles(sizes, shapes.tile) <= room:
                assert tiles(sizes, shapes.for_chunks(sizes).width) <= shapes.for_chunks(sizes).number


def test_shapes_are_few_and_a_lone_long_chunk_is_one_tile():
    shapes = Shapes.of(512, 8)
    single, packed = (Tiles(1, 1), Tiles(4, 1)), (Tiles(1, 32), Tiles(2, 32), Tiles(4, 32), Tiles(16, 32))
    assert shapes == Shapes((*single, *packed, Tiles(1, 512)), (1, 4, 8))
    assert shapes.for_chunks([512]) == shapes.for_chunks([200]) == Tiles(1, 512)
    assert shapes.for_chunks([200, 1]) == Tiles(16, 32)
    assert shapes.for_chunks([100]) == Tiles(4, 32)
    assert shapes.for_chunks([64]) == Tiles(2, 32)
    assert shapes.for_chunks([32]) == shapes.for_chunks([5]) == Tiles(1, 32)
    assert shapes.for_chunks([1, 1]) == Tiles(4, 1)
    assert shapes.for_chunks([1]) == Tiles(1, 1)


def test_the_smallest_step_and_a_single_slot_have_shapes():
    assert Shapes.of(1, 1) == Shapes((Tiles(1, 1),), (1,))


class Lowered:
    """A program that is not traced, and notes when it is compiled."""

    def __init__(self, shape, log: list):
        self._shape, self._log = shape, log

    def lower(self) -> "Lowered":
        return self

    def compile(self, options: dict | None) -> str:
        assert options == OPTIONS["cpu"]
        self._log.append(self._shape)
        return f"program {self._shape}"


def test_each_shape_is_compiled_once_and_what_comes_late_is_counted():
    log, told = [], []
    programs = Programs(lambda shape: Lowered(shape, log))
    programs.compile([4, 1], lambda *progress: told.append(progress))
    assert (sorted(log), sorted(set(told)), len(programs), programs.late) == ([1, 4], [(0, 2), (1, 2), (2, 2)], 2, 0)
    assert [programs[shape] for shape in (1, 4, 1)] == ["program 1", "program 4", "program 1"]
    assert programs.late == 0
    assert [programs[16], programs[16]] == ["program 16"] * 2
    programs.compile([1, 16, 64])
    assert (sorted(log), len(programs), programs.late) == ([1, 4, 16, 64], 4, 1)


def test_what_can_not_be_compiled_says_so_and_is_tried_again():
    def call(shape):
        raise ValueError(f"no program of {shape}")

    programs = Programs(call)
    for _ in range(2):
        with pytest.raises(ValueError, match="no program of 3"):
            programs[3]
    assert (programs.late, len(programs)) == (0, 0)


@pytest.mark.parametrize(("ranks", "numbers"), [(2, (2, 8, 16)), (8, (8, 16)), (6, (6, 18)), (384, (384,))])
def test_ranks_share_a_prefill_step_in_equal_parts_with_and_without_a_past(ranks, numbers):
    shapes = Shapes.over(ranks, tokens=512, slots=4, longest=1000)
    assert [shape.number for shape in shapes.prefill[::2]] == list(numbers)
    assert all(shape.number % ranks == 0 for shape in shapes.prefill)
    width = shapes.tile
    assert numbers[-1] * width >= 512 > (numbers[-1] - ranks) * width
    assert {shape.past for shape in shapes.prefill} == {0, -(-1000 // width)}
    assert shapes.for_chunks([width, 1]).past == 0
    assert shapes.for_chunks([1], past=1).past * width >= 1000
    assert shapes.decode == (1, 4)


@pytest.mark.parametrize("tokens", [40, 100, 512])
@pytest.mark.parametrize("ranks", [2, 6, 8, 16, 384])
def test_the_largest_prefill_step_may_have_two_parts_each_of_which_the_ranks_share_equally(ranks, tokens):
    shapes = Shapes.over(ranks, tokens, slots=4, longest=1000, parts=2)
    plain = Shapes.over(ranks, tokens, slots=4, longest=1000)
    whole, halves = ([shape for shape in shapes.prefill if shape.parts == parts] for parts in (1, 2))
    assert [shape.number for shape in whole] == [shape.number for shape in plain.prefill]
    assert [shape.past for shape in halves] == [shape.past for shape in whole[-2:]]
    for shape in halves:
        assert shape.number >= whole[-1].number
        assert shape.number % 2 == shape.past % 2 == shape.number % ranks == 0
        assert shape.number // 2 * shape.width % ranks == 0
    assert [shapes.in_parts(shape) for shape in whole] == [None] * (len(whole) - 2) + halves
    assert shapes.for_chunks([tokens]).parts == 1
    assert {plain.in_parts(shape) for shape in plain.prefill} == {None}
