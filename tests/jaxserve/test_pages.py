import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from jaxserve.pages import PagePool, digest


def same_for_all(data: bytes) -> bytes:
    """The worst digest there is."""
    return b"x"


def publish(pool: PagePool, tokens: list[int]) -> list[int]:
    """The pages of a new sequence that shares nothing, all published, and still in use."""
    keys = pool.keys(tokens)
    pages = pool.allocate(len(keys))
    assert pages is not None
    for index, page in enumerate(pages):
        pool.publish(page, tokens, index, keys)
    return pages


def find(pool: PagePool, tokens: list[int]) -> list[int]:
    return pool.find(tokens, pool.keys(tokens))


@dataclass(eq=False)
class Sequence:
    tokens: list[int]
    keys: list[bytes]
    pages: list[int]
    published: int  # how many of its pages it found or published


RUNNING = st.runner().flatmap(lambda engine: st.sampled_from(engine.running))
PROMPT = st.lists(st.integers(0, 1), min_size=1, max_size=9)
MORE = st.lists(st.integers(0, 1), min_size=1, max_size=4)


class Engine(RuleBasedStateMachine):
    """Plays requests against a pool, and keeps its own books.

    An entry of `memory` is all that a computed entry of a cache depends on: the tokens up to its own and `lookahead`
    more. A sequence whose pages hold another's entries therefore shows, however it came to have them.
    """

    @initialize(
        count=st.integers(3, 10),
        page_size=st.sampled_from([2, 1, 3, 4]),
        lookahead=st.integers(0, 1),
        collides=st.sampled_from([False, False, False, True]),
        eager=st.booleans(),
    )
    def open(self, count, page_size, lookahead, collides, eager):
        self.pool = PagePool(count, page_size, lookahead, same_for_all if collides else digest)
        self.count, self.page_size, self.lookahead, self.collides = count, page_size, lookahead, collides
        self.eager = eager  # publishes what it can at once
        self.memory: list[list[tuple[int, ...] | None]] = [[None] * page_size for _ in range(count)]
        self.running: list[Sequence] = []
        self.ended: list[list[int]] = []  # what was served before, to be asked again
        self.published: dict[int, tuple[int, ...]] = {}  # page: all tokens that its entries depend on
        self.idle: list[int] = []  # released longest ago first

    @precondition(lambda self: len(self.running) < 4)
    @rule(prompt=PROMPT)
    def start(self, prompt):
        keys = self.pool.keys(prompt)
        found = self.pool.find(prompt, keys)
        assert found == self.expected(prompt)
        self.pool.share(found)
        self.idle = [page for page in self.idle if page not in found]
        rest = self.allocate(self.pages_for(prompt) - len(found), [*self.in_use(), *found])
        if rest is None:
            self.release(found)
            return
        sequence = Sequence(list(prompt), keys, found + rest, len(found))
        self.running.append(sequence)
        self.write(sequence, len(found) * self.page_size)
        if self.eager:
            self.publish(sequence)

    @precondition(lambda self: self.ended and len(self.running) < 4)
    @rule(more=MORE, data=st.data())
    def resume(self, more, data):
        self.start(data.draw(st.sampled_from(self.ended)) + more)

    @precondition(lambda self: self.running)
    @rule(sequence=RUNNING, more=MORE)
    def append(self, sequence, more):
        for token in more:
            pages = self.allocate(self.pages_for([*sequence.tokens, token]) - len(sequence.pages), self.in_use())
            if pages is None:
                return self.end(sequence)
            start = max(0, len(sequence.tokens) - self.lookahead)
            sequence.tokens.append(token)
            sequence.pages += pages
            self.write(sequence, start)
        sequence.keys = self.pool.keys(sequence.tokens, sequence.keys)
        assert sequence.keys == self.pool.keys(sequence.tokens)
        if self.eager:
            self.publish(sequence)

    @precondition(lambda self: self.running)
    @rule(sequence=RUNNING)
    def publish(self, sequence):
        while self.end_of(sequence.published) <= len(sequence.tokens):
            index, page = sequence.published, sequence.pages[sequence.published]
            self.pool.publish(page, sequence.tokens, index, sequence.keys)
            content = tuple(sequence.tokens[: self.end_of(index)])
            taken = self.published if self.collides else content in self.published.values()
            if page not in self.published and not taken:
                self.published[page] = content
            sequence.published += 1

    @precondition(lambda self: self.running)
    @rule(sequence=RUNNING)
    def end(self, sequence):
        self.running.remove(sequence)
        self.release(sequence.pages)
        self.ended.append(sequence.tokens)

    @precondition(lambda self: self.running)
    @rule(sequence=RUNNING)
    def fail(self, sequence):
        self.pool.retract(sequence.pages)
        for page in sequence.pages:
            self.published.pop(page, None)
        self.end(sequence)

    @precondition(lambda self: self.idle)
    @rule()
    def clear(self):
        self.pool.clear()
        for page in self.idle:
            del self.published[page]
        self.idle = []

    @invariant()
    def what_is_in_use_and_what_is_not_add_up(self):
        assert self.pool.used == len(set(self.in_use()))
        assert self.pool.available + self.pool.used == self.count

    @invariant()
    def a_sequence_reads_what_it_would_have_written_itself(self):
        for sequence in self.running:
            for position in range(len(sequence.tokens) - self.lookahead):
                page, offset = sequence.pages[position // self.page_size], position % self.page_size
                assert self.memory[page][offset] == self.entry(sequence, position)

    @invariant()
    def what_was_published_is_found_until_it_is_evicted_and_nothing_else(self):
        for tokens in [sequence.tokens for sequence in self.running] + self.ended[-5:]:
            assert find(self.pool, tokens) == self.expected(tokens)

    def teardown(self):
        if not hasattr(self, "pool"):
            return
        while self.running:
            self.end(self.running[0])
        assert self.pool.available == self.count
        self.allocate(self.count, [])

    def in_use(self) -> list[int]:
        return [page for sequence in self.running for page in sequence.pages]

    def end_of(self, index: int) -> int:
        return (index + 1) * self.page_size + self.lookahead

    def pages_for(self, tokens: list[int]) -> int:
        return -(-len(tokens) // self.page_size)

    def expected(self, tokens: list[int]) -> list[int]:
        page_of = {content: page for page, content in self.published.items()}
        found = []
        while self.end_of(len(found)) <= len(tokens):
            page = page_of.get(tuple(tokens[: self.end_of(len(found))]))
            if page is None:
                break
            found.append(page)
        return found

    def allocate(self, count: int, in_use: list[int]) -> list[int] | None:
        """What the pool hands out, which is first what nobody wants, then what was released longest ago."""
        pages = self.pool.allocate(count)
        free = set(range(self.count)) - set(in_use)
        if count > len(free):
            assert pages is None
            return None
        assert pages is not None
        blank = min(count, len(free) - len(self.idle))
        assert len(set(pages)) == count
        assert free - set(self.idle) >= set(pages[:blank])
        assert pages[blank:] == self.idle[: count - blank]
        self.idle = self.idle[count - blank :]
        for page in pages:
            self.published.pop(page, None)
            self.memory[page] = [None] * self.page_size
        return pages

    def release(self, pages: list[int]) -> None:
        """Those published that nobody uses any more are idle from now on, the last of them first."""
        self.pool.release(pages)
        in_use = self.in_use()
        self.idle += [page for page in reversed(pages) if page in self.published and page not in in_use]

    def entry(self, sequence: Sequence, position: int) -> tuple[int, ...]:
        return tuple(sequence.tokens[: position + 1 + self.lookahead])

    def write(self, sequence: Sequence, start: int) -> None:
        """Computes the entries from position `start` on whose tokens are known."""
        for position in range(start, len(sequence.tokens) - self.lookahead):
            page, offset = sequence.pages[position // self.page_size], position % self.page_size
            self.memory[page][offset] = self.entry(sequence, position)


def test_an_engine_reads_only_what_it_would_have_written_itself():
    run_state_machine_as_test(Engine)


def test_a_prompt_finds_the_pages_of_its_published_beginning():
    pool = PagePool(8, page_size=2)
    pages = publish(pool, [1, 2, 3, 4, 5, 6])
    assert find(pool, [1, 2, 3, 4, 5, 6]) == pages
    assert find(pool, [1, 2, 3, 4, 9, 9, 9]) == pages[:2]
    assert find(pool, [1, 2, 3]) == pages[:1]
    assert find(pool, [1]) == []


def test_the_same_tokens_after_others_are_not_found():
    pool = PagePool(8, page_size=2)
    publish(pool, [1, 2, 3, 4])
    publish(pool, [5, 6])
    assert len(find(pool, [5, 6, 3, 4])) == 1
    assert find(pool, [3, 4]) == []


def test_other_tokens_with_the_same_key_are_a_miss():
    pool = PagePool(8, page_size=2, digest=same_for_all)
    first = publish(pool, [1, 2, 3, 4])
    second = publish(pool, [5, 6])
    assert find(pool, [5, 6]) == []
    assert find(pool, [1, 2, 3, 4]) == first[:1]  # its second page has the key too, and stays unpublished
    pool.release(second)
    pool.release(first)
    assert (pool.available, find(pool, [1, 2])) == (8, first[:1])


@pytest.mark.parametrize(("lookahead", "shared"), [(0, 1), (1, 0)])
def test_prompts_that_part_after_a_page_share_it_unless_it_depends_on_the_next_token(lookahead, shared):
    pool = PagePool(8, page_size=2, lookahead=lookahead)
    publish(pool, [1, 2, 3])
    assert len(find(pool, [1, 2, 4])) == shared
    assert len(find(pool, [1, 2, 3])) == 1


def test_of_two_pages_with_one_content_the_first_is_found():
    pool = PagePool(4, page_size=2)
    first, second = publish(pool, [1, 2]), publish(pool, [1, 2])
    assert find(pool, [1, 2]) == first
    pool.release(second)
    assert pool.allocate(3) is not None  # the second is blank again, so the first stays
    assert find(pool, [1, 2]) == first


def test_retracted_pages_are_not_found_and_can_be_published_anew():
    pool = PagePool(4, page_size=1)
    pages = publish(pool, [1, 2, 3])
    pool.release(pages[2:])
    pool.retract(pages[1:])
    assert find(pool, [1, 2, 3]) == pages[:1]
    assert (pool.available, pool.used) == (2, 2)
    assert find(pool, [1, 2]) != publish(pool, [1, 2])[1:] == find(pool, [1, 2])[1:]


def test_clear_leaves_only_the_content_in_use():
    pool = PagePool(4, page_size=1)
    kept, gone = publish(pool, [1]), publish(pool, [2])
    pool.release(gone)
    pool.clear()
    assert (find(pool, [1]), find(pool, [2])) == (kept, [])
    assert pool.available == 3


@pytest.mark.parametrize("lookahead", [0, 1])
def test_a_page_has_a_key_once_its_content_is_settled(lookahead):
    pool = PagePool(1, page_size=2, lookahead=lookahead)
    assert [len(pool.keys(range(n))) for n in range(6)] == (
        [0, 0, 1, 1, 2, 2] if lookahead == 0 else [0, 0, 0, 1, 1, 2]
    )


def test_keys_computed_bit_by_bit_equal_those_computed_at_once():
    pool = PagePool(1, page_size=2)
    tokens, keys = [7, 8, 9, 10, 11, 12, 13], []
    for n in range(len(tokens) + 1):
        keys = pool.keys(tokens[:n], keys)
    assert keys == pool.keys(tokens)
    assert len(set(keys)) == 3
    assert pool.keys(tokens, [b"known"])[0] == b"known"


def test_keys_are_the_same_in_another_process():
    program = "from jaxserve.pages import PagePool; print([k.hex() for k in PagePool(1, 2).keys([1, 2, 3, 163839])])"
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    ran = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True
    )
    assert ran.stdout.strip() == str([k.hex() for k in PagePool(1, 2).keys([1, 2, 3, 163839])]), ran.stderr


def test_allocating_more_than_available_takes_nothing():
    pool = PagePool(3, page_size=1)
    pages = publish(pool, [1, 2])
    pool.release(pages[1:])
    assert pool.allocate(3) is None
    assert (pool.available, find(pool, [1, 2])) == (2, pages)
    assert pool.allocate(0) == []


def test_a_shared_page_is_in_use_until_all_have_released_it():
    pool = PagePool(2, page_size=1)
    pages = publish(pool, [1])
    pool.share(pages)
    pool.release(pages)
    assert (pool.used, pool.allocate(2)) == (1, None)
    pool.release(pages)
    assert pool.used == 0


def test_pages_released_longest_ago_are_evicted_first_and_of_one_sequence_the_last():
    pool = PagePool(5, page_size=1)
    old, new = publish(pool, [1, 2, 3]), publish(pool, [4, 5])
    pool.release(old)
    pool.release(new)
    pool.share(old[:1])
    pool.release(old[:1])
    assert pool.allocate(5) == [old[2], old[1], new[1], new[0], old[0]]


def test_blank_pages_are_handed_out_before_any_is_evicted():
    pool = PagePool(3, page_size=1)
    pages = publish(pool, [1, 2])
    blank = pool.allocate(1)
    assert blank is not None
    pool.release(pages)
    pool.release(blank)
    assert pool.allocate(1) == blank
    assert find(pool, [1, 2]) == pages


def test_releasing_twice_is_refused():
    pool = PagePool(2, page_size=1)
    pages = publish(pool, [1])
    pool.release(pages)
    with pytest.raises(ValueError, match=f"page {pages[0]} is released more often than it was taken"):
        pool.release(pages)
    assert pool.available == 2


def test_sharing_what_was_evicted_since_it_was_found_is_refused():
    pool = PagePool(1, page_size=1)
    pool.release(publish(pool, [1]))
    found = find(pool, [1])
    assert pool.allocate(1) == found
    with pytest.raises(ValueError, match="share what find gives before allocating"):
        pool.share(found)


def test_publishing_after_releasing_is_refused():
    pool = PagePool(1, page_size=1)
    pages = pool.allocate(1)
    assert pages is not None
    pool.release(pages)
    with pytest.raises(ValueError, match="publish before releasing"):
        pool.publish(pages[0], [1], 0, pool.keys([1]))
    assert find(pool, [1]) == []
