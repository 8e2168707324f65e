from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.layers import batch as paging
from jaxserve.layers.batch import Batch
from tests.layers.helpers import batch_of, page_table

write = jax.jit(paging.write)
read_block = jax.jit(paging.read_block)


class Pages(NamedTuple):
    """A cache of two arrays of different rank."""

    flat: jax.Array  # p b
    wide: jax.Array  # p b 2


def rows_of(batch: Batch, sign: float = 1.0) -> Pages:
    """A row that names its sequence and position: 1000 s + position + 1."""
    slots = np.repeat(np.asarray(batch.slots_a), batch.tile)
    flat = sign * (1000.0 * slots + np.asarray(batch.positions_t) + 1)
    return Pages(jnp.asarray(flat, jnp.float32), jnp.asarray(np.stack([flat, -flat], axis=-1), jnp.float32))


def pages_of(count: int, page_size: int, fill: float = -7.0) -> Pages:
    return Pages(jnp.full((count, page_size), fill), jnp.full((count, page_size, 2), fill))


@pytest.mark.parametrize("page_size", [1, 3, 4, 16, 300])
def test_what_is_written_is_read_back_in_order_whatever_the_pages(page_size):
    lengths = (11, 1, 7)
    table = page_table(3, -(-11 // page_size), seed=page_size)
    batch = batch_of([np.zeros(n, np.int32) for n in lengths], table)
    pages = write(pages_of(table.size, page_size), rows_of(batch), batch)
    block, seen = read_block(pages, batch, 0)
    for s, length in enumerate(lengths):
        expected = 1000.0 * s + np.arange(length) + 1
        np.testing.assert_array_equal(block.flat[s, :length], expected)
        np.testing.assert_array_equal(block.wide[s, :length], np.stack([expected, -expected], axis=-1))
        assert seen[s, length - 1].sum() == length


@pytest.mark.parametrize("page_size", [3, 5])
def test_each_row_lies_where_the_table_says_and_padding_nowhere(page_size):
    table = page_table(2, 3, seed=1)
    batch = batch_of([np.zeros(7, np.int32), np.zeros(2, np.int32)], table, starts=[2, 1], tile=9)
    pages = write(pages_of(6, page_size), rows_of(batch), batch)
    expected = np.full((6, page_size), -7.0)
    for s, positions in enumerate((range(2, 9), range(1, 3))):
        for i in positions:
            expected[table[s, i // page_size], i % page_size] = 1000 * s + i + 1
    np.testing.assert_array_equal(pages.flat, expected)


def test_a_step_of_padding_alone_changes_nothing():
    batch = batch_of([np.zeros(0, np.int32)] * 2, page_table(2, 2), tile=3)
    before = pages_of(4, 2)
    after = write(before, rows_of(batch), batch)
    np.testing.assert_array_equal(after.flat, before.flat)
    np.testing.assert_array_equal(after.wide, before.wide)


def test_rows_take_the_dtype_of_the_cache():
    batch = batch_of([np.zeros(2, np.int32)], page_table(1, 1))
    pages = jax.tree.map(lambda page: page.astype(jnp.bfloat16), pages_of(1, 2))
    assert {leaf.dtype for leaf in write(pages, rows_of(batch), batch)} == {jnp.dtype(jnp.bfloat16)}


def test_a_token_sees_its_position_and_what_is_before():
    batch = batch_of([np.zeros(2, np.int32), np.zeros(3, np.int32)], page_table(2, 2), starts=[2, 0])
    _, seen = read_block(pages_of(4, 3), batch, 0)
    literal = [
        ["111000", "111100", "000000"],  # at 2, at 3, padding
        ["100000", "110000", "111000"],
    ]
    np.testing.assert_array_equal(seen[..., :6], [[[c == "1" for c in row] for row in rows] for rows in literal])
    assert not seen[..., 6:].any() or seen.shape[-1] == 6


def test_blocks_follow_one_another(monkeypatch):
    monkeypatch.setattr(paging, "BLOCK_TOKENS", 5)  # two whole pages of two tokens
    table = page_table(2, 4, seed=3)
    batch = batch_of([np.zeros(7, np.int32), np.zeros(5, np.int32)], table)
    pages = paging.write(pages_of(8, 2), rows_of(batch), batch)
    blocks = [paging.read_block(pages, batch, i) for i in range(2)]
    assert blocks[0][1].shape == (2, 7, 4)
    np.testing.assert_array_equal(jnp.concatenate([b.flat for b, _ in blocks], axis=1)[0, :7], 1 + np.arange(7))
    np.testing.assert_array_equal(blocks[1][1][0].sum(axis=-1), [0, 0, 0, 0, 1, 2, 3])


def test_what_lies_beyond_the_table_is_unseen(monkeypatch):
    """The last block may reach over the end of the table: it reads some page, and no token sees it."""
    monkeypatch.setattr(paging, "BLOCK_TOKENS", 4)
    batch = batch_of([np.zeros(6, np.int32)], page_table(1, 3))
    _, seen = paging.read_block(pages_of(3, 2), batch, 1)
    np.testing.assert_array_equal(seen[0, -1], [True, True, False, False])


@pytest.mark.parametrize(
    ("tile", "page_size", "columns", "last", "blocks"),
    [
        (10, 64, 4, 255, 1), (10, 64, 8, 255, 1), (10, 64, 8, 256, 2),
        (10, 300, 2, 299, 1), (10, 300, 2, 300, 2), (10, 7, 100, 252, 2),
        (9, 64, 1, 63, 1), (9, 64, 4, 63, 1), (9, 64, 4, 64, 2),
        (1, 300, 2, 299, 1), (1, 300, 2, 300, 2), (1, 7, 100, 252, 5),
    ],
)  # fmt: skip
def test_as_many_blocks_are_read_as_the_longest_sequence_fills(tile, page_size, columns, last, blocks):
    batch = batch_of([np.zeros(1, np.int32)] * 2, page_table(2, columns), starts=[3, last], tile=tile)
    count = paging.num_blocks(pages_of(2 * columns, page_size), batch)
    assert int(count) == blocks
    assert isinstance(count, int) == (columns * page_size <= max(page_size, 256 if tile == 10 else 64))


def test_several_tiles_may_belong_to_one_sequence():
    batch = batch_of([np.zeros(2, np.int32)] * 2, page_table(2, 2, seed=0), starts=[0, 2])
    batch = batch._replace(slots_a=jnp.array([1, 1], jnp.int32))
    pages = write(pages_of(4, 2), rows_of(batch), batch)
    block, seen = read_block(pages, batch, 0)
    np.testing.assert_array_equal(block.flat[:, :4], [[1001, 1002, 0, 0], [1001, 1002, 1003, 1004]])
    np.testing.assert_array_equal(seen.sum(axis=-1), [[1, 2], [3, 4]])


def test_own_rows_are_in_the_cache_s_dtype_and_those_of_padding_are_zero_and_unseen():
    batch = batch_of([3, 1], page_table(2, 3), starts=[4, 0])
    rows = jax.tree.map(lambda rows: rows.at[4:].set(jnp.nan), rows_of(batch))
    pages = jax.tree.map(lambda page: page.astype(jnp.bfloat16), pages_of(6, 2))
    own, seen = paging.read_own(paging.Fresh(pages, rows), batch)
    assert own.flat.dtype == jnp.bfloat16 and own.wide.shape == (2, 3, 2)
    np.testing.assert_array_equal(own.flat, [[5, 6, 7], [1000, 0, 0]])  # 1001, rounded
    literal = [["100", "110", "111"], ["100", "000", "000"]]
    np.testing.assert_array_equal(seen, [[[c == "1" for c in row] for row in rows] for rows in literal])


def test_before_their_tile_tokens_see_what_was_there_and_padding_nothing():
    batch = batch_of([3, 1], page_table(2, 3), starts=[4, 0])
    assert paging.before(batch).positions_t.tolist() == [3, 3, 3, -1, -1, -1]


@pytest.mark.parametrize(("tiles", "count", "sizes"), [(4, 2, [2, 2]), (5, 2, [2, 3]), (1, 2, [1]), (3, 1, [3])])
def test_a_batch_is_divided_between_tiles(tiles, count, sizes):
    batch = batch_of([np.arange(2) + 2 * i for i in range(tiles)], page_table(tiles, 1))
    parts = paging.divide(batch, count)
    assert [len(part.slots_a) for part in parts] == sizes
    assert {part.tile for part in parts} == {2}
    for name in ("tokens_t", "positions_t", "slots_a"):
        np.testing.assert_array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(batch, name))
    assert all(part.pages_sp is batch.pages_sp for part in parts)


def test_what_another_sequence_left_in_a_page_is_zero_even_if_it_was_nan():
    batch = batch_of([np.zeros(1, np.int32)], np.array([[1, 0]], np.int32), starts=[0])
    left = jax.tree.map(lambda page: jnp.full_like(page, jnp.nan), pages_of(2, 4))
    block, seen = read_block(write(left, rows_of(batch), batch), batch, 0)
    assert seen.sum() == 1
    np.testing.assert_array_equal(np.where(seen[0, 0], 0, block.flat[0]), np.zeros(block.flat.shape[1]))


def test_sequences_may_share_the_pages_of_a_prefix():
    batch = batch_of([np.zeros(2, np.int32)], np.array([[2]], np.int32))
    pages = write(pages_of(3, 2), rows_of(batch), batch)
    table = np.array([[2, 0], [2, 1]], np.int32)
    batch = batch_of([np.zeros(1, np.int32)] * 2, table, starts=[2, 2])
    block, _ = read_block(write(pages, rows_of(batch), batch), batch, 0)
    np.testing.assert_array_equal(block.flat[:, :3], [[1, 2, 3], [1, 2, 1003]])
