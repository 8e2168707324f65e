"""Which tokens the next step computes. Plain Python, no JAX.

There are no phases. A sequence has tokens that are known and a number of them that are computed, and each step lets the
second catch up with the first: a chunk of a prompt, what a prefix hit left over, what a preempted sequence has to do
again. One that has caught up goes on by itself on the device, a row of every step.

The host launches a step before it has read the one before. So of a row it knows only how many tokens it can have at
most (`ahead`), and reserves pages for those.
"""

import heapq
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jaxserve.arrivals import Arrival, Brought
from jaxserve.pages import ROOT, Key, PagePool
from jaxserve.request import Request


@dataclass(eq=False)
class Sequence:
    """One answer to a request, and where it is."""

    request: Request
    index: int  # which of the request's answers
    seed: int
    limit: int  # tokens it can have in all
    arrival: int
    tokens: list[int]  # those that are known: the prompt, and of the answer what was read
    by_host: bool = False  # the host decides which token may come next: it must have read all before
    whole: bool = False  # no part of the prompt may come from the cache: its scores are asked for
    rank: int = 0  # whose slots and pages it uses
    hit: int = 0  # tokens of the prompt that it first found in the cache, or that came there from elsewhere
    queue_seconds: float = 0.0  # until then
    root: Key = ROOT  # of its pages
    keys: list[Key] = field(default_factory=list)  # of the pages that the known tokens fill
    coming: Arrival | None = None  # pages from elsewhere; it can't start before they are there
    brought: Brought | None = None  # those that have come, until all that it needs of them are in its pages
    kept: int = 0  # pages that were kept elsewhere, or need not be

    # What it holds while it runs; a preempted sequence starts again from nothing.
    slot: int | None = None
    pages: list[int] = field(default_factory=list)
    computed: int = 0  # known tokens that are in the cache, once all that was launched has run
    published: int = 0  # pages that others can find
    fresh: bool = True  # nothing of it was launched since it has its slot
    caught_up: bool = False
    least: int = 0  # tokens that launched steps add, if they don't end it; they are not read yet
    ahead: int = 0  # tokens at most that they add
    epoch: int = 0  # of the launches that still count

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def order(self) -> tuple[int, int]:
        """Who is served first, and preempted last."""
        return self.request.priority, self.arrival

    def __lt__(self, other: "Sequence") -> bool:
        return self.order < other.order


class Chunk(NamedTuple):
    """Known tokens of a sequence, `start` to `end`, to be computed."""

    sequence: Sequence
    start: int
    end: int
    first: bool  # since the sequence has its slot

    @property
    def size(self) -> int:
        return self.end - self.start

    @property
    def completes(self) -> bool:
        """Whether the sequence has caught up then, so that its next token is chosen."""
        return self.end == len(self.sequence.tokens)


class Fill(NamedTuple):
    """Pages of a sequence that have come from elsewhere, and go into the cache before the step."""

    sequence: Sequence
    pages: list[int]
    content: Any  # a tree of arrays `[k, b, …]`
    begin: int  # of these pages in the content


class Plan(NamedTuple):
    """What a step computes: chunks of known tokens, and for each row a token or more a round."""

    chunks: tuple[Chunk, ...]
    rows: tuple[Sequence, ...]
    rounds: int
    fills: tuple[Fill, ...] = ()  # in this order


class Gain(NamedTuple):
    """How many tokens a launch gives a sequence that it doesn't end."""

    least: int
    most: int


class Limits(NamedTuple):
    """What a step, and all of them together, may hold."""

    slots: int  # sequences that run
    tokens: int  # of a step
    tile: int  # chunks are filled up to multiples of so many tokens
    drafts: int = 0  # guessed tokens that a row verifies in a step
    queued: int | None = None  # sequences that wait
    share: bool = True  # what was computed for one sequence serves others that begin alike
    aligned: bool = False  # chunks begin at multiples of a tile, so hits end there
    filled: int = sys.maxsize  # pages from elsewhere that a step has filled in at most


class Room(NamedTuple):
    """What a step that several schedulers share has left for chunks."""

    tiles: int
    past: int  # tiles of tokens before the chunks, of their sequences

    def without(self, chunks: Iterable["Chunk"], tile: int) -> "Room":
        """What some chunks leave of it."""
        used = [(-(-chunk.size // tile), chunk.start // tile) for chunk in chunks]
        return Room(self.tiles - sum(size for size, _ in used), self.past - sum(before for _, before in used))

    def within(self, other: "Room") -> "Room":
        """As much of it as of the other."""
        return Room(min(self.tiles, other.tiles), min(self.past, other.past))

    def less(self, other: "Room") -> "Room":
        """What is left of it if somebody takes as much, as far as there is."""
        return Room(max(0, self.tiles - other.tiles), max(0, self.past - other.past))


class Scheduler:
    """Decides who runs, and owns who waits; the pool owns the pages.

    Sequences start in the order of priority, then of arrival. When pages run out, the last in that order that runs is
    preempted: its pages go back, it waits in its old place, and what it had said is computed again like a prompt.
    """

    def __init__(self, pool: PagePool, limits: Limits):
        self.pool, self.limits = pool, limits
        self.running: list[Sequence] = []  # in order
        self.reserved = 0  # pages that all who run or wait can come to need, what they may share left aside
        self.preemptions = 0
        self.queried = 0  # tokens of prompts that were looked up, and those that were found
        self.hit = 0
        self._waiting: list[Sequence] = []  # a heap
        self._slots = list(reversed(range(limits.slots)))
        self._fills: list[Fill] = []  # for the step that is planned

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def waiting(self) -> Iterable[Sequence]:
        """Those that wait, in no order."""
        return self._waiting

    @property
    def num_free(self) -> int:
        """Slots that nobody has."""
        return len(self._slots)

    def load_with(self, s: Sequence) -> int:
        """Pages that all who are here can come to need, with one more; what it would find is not needed."""
        keys = self.pool.keys(s.tokens, root=s.root) if self.limits.share and not s.whole else []
        return self.reserved + self._needed(s, s.limit) - len(self.pool.find(s.tokens, keys, s.root))

    def __iter__(self) -> Iterator[Sequence]:
        return iter([*self.running, *self._waiting])

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence."""
        self.reserved += self._needed(sequence, sequence.limit)
        heapq.heappush(self._waiting, sequence)

    def schedule(self, rounds: int = 1, room: Room | None = None) -> Plan:
        """Plans a step, and takes it as launched: what it computes is in the cache for every later one.

        Chunks fill what the rows leave of the step, at least one tile, so that neither starves the other; in a step for
        several schedulers, the `room` that is left.

        It has as many rounds as are asked for only if nobody waits for its end, and nobody is preempted for them.
        """
        rounds = rounds if self.allows(rounds) else 1
        able = [(s, s.epoch) for s in list(self.running) if self._can_go_on(s) and self._reserve_row(s, rounds)]
        left = (self.limits.tokens - len(able) * (1 + self.limits.drafts)) // self.limits.tile
        chunks = tuple(self._chunks(room or Room(max(1, left), past=sys.maxsize)))
        rows = tuple(s for s, epoch in able if s.epoch == epoch)  # a chunk may have preempted some
        for s in rows:
            self._launched(s, rounds)
        fills, self._fills = tuple(self._fills), []
        return Plan(chunks, rows, rounds, fills)

    def wanted(self) -> Room:
        """Room that the chunks of all who have a slot or may get one can fill, if nobody is preempted."""
        behind = [s for s in self.running if not s.caught_up] + heapq.nsmallest(self.num_free, self._waiting)
        tile = self.limits.tile
        return Room(
            sum(-(-(len(s.tokens) - s.computed) // tile) for s in behind),
            sum((len(s.tokens) if s.slot is None or s.brought else s.computed) // tile for s in behind),
        )

    def landed(self, sequence: Sequence, rounds: int | None) -> None:
        """Notes that a launch is read: of so many rounds, or of the chunk that completed the sequence."""
        gain = self._gain(rounds)
        sequence.least -= gain.least
        sequence.ahead -= gain.most

    def update(self, sequence: Sequence, tokens: Iterable[int]) -> None:
        """Adds tokens that were read: all but the last of them are in the cache."""
        sequence.tokens += tokens
        sequence.computed = len(sequence.tokens) - 1
        self._publish(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Takes back all that a sequence holds, whether it waits or runs."""
        self.reserved -= self._needed(sequence, sequence.limit)
        if sequence.slot is None:
            self._waiting = [s for s in self._waiting if s is not sequence]
            heapq.heapify(self._waiting)
        else:
            self._stop(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """Stops a sequence that runs; it waits in its old place."""
        self._stop(sequence)
        self.preemptions += 1
        heapq.heappush(self._waiting, sequence)

    def restart(self, pool: PagePool) -> None:
        """Gives up all that run, and takes another pool; who waits goes on waiting."""
        self.pool, self.running = pool, []
        self.reserved = sum(self._needed(s, s.limit) for s in self._waiting)
        self._slots, self._fills = list(reversed(range(self.limits.slots))), []

    def _stop(self, s: Sequence) -> None:
        assert s.slot is not None
        self.running.remove(s)
        self.pool.release(s.pages)
        self._slots.append(s.slot)
        s.slot, s.pages, s.caught_up, s.fresh = None, [], False, True
        s.computed = s.published = s.least = s.ahead = 0
        s.epoch += 1

    def _can_go_on(self, s: Sequence) -> bool:
        if not s.caught_up or (s.by_host and s.least):
            return False
        return len(s.tokens) + s.least < s.limit

    def allows(self, rounds: int) -> bool:
        """Whether a step may have so many rounds: nobody waits for its end, and nobody is preempted for them."""
        if self._waiting or not all(s.caught_up and not s.by_host for s in self.running):
            return False
        missing = (self._needed(s, self._reach(s, rounds)) - len(s.pages) for s in self.running)
        return sum(max(0, pages) for pages in missing) <= self.pool.available

    def _reach(self, s: Sequence, rounds: int) -> int:
        """Tokens it can have before the last round begins, wherever the launched ones leave it."""
        return len(s.tokens) + s.ahead + (rounds - 1) * (1 + self.limits.drafts)

    def _reserve_row(self, s: Sequence, rounds: int) -> bool:
        """Gets the pages for all that a step can write."""
        return self._reserve(s, self._reach(s, rounds))

    def _reserve(self, s: Sequence, tokens: int) -> bool:
        """Gets the pages needed for so many tokens, if need be those of sequences that come later.

        False if there are too few, or if the sequence lost its own to one that comes before it.
        """
        if s.slot is None:
            return False
        missing = self._needed(s, tokens) - len(s.pages)
        while missing > 0:
            pages = self.pool.allocate(missing)
            if pages is not None:
                s.pages += pages
                break
            last = self.running[-1]
            if last is s:
                if s.caught_up:
                    self.preempt(s)
                return False
            self.preempt(last)
        return True

    def _chunks(self, room: Room) -> Iterator[Chunk]:
        tile, (tiles, past) = self.limits.tile, room
        for s in self._behind() if tiles else ():
            size, before = min(len(s.tokens) - s.computed, tiles * tile), s.computed // tile
            if before > past or not self._reserve(s, s.computed + size):
                return
            chunk = Chunk(s, s.computed, s.computed + size, s.fresh)
            s.computed, s.fresh = chunk.end, False
            self._publish(s)
            if chunk.completes:
                s.caught_up = True
                self._launched(s, None)
            yield chunk
            tiles, past = tiles - -(-size // tile), past - before
            if not tiles:
                return

    def _behind(self) -> Iterator[Sequence]:
        """Sequences with tokens to compute: those that run, then those that wait, as long as there is room.

        One whose pages are being filled in comes when all of them are.
        """
        for s in list(self.running):
            if s.slot is not None and not s.caught_up and self._fill(s):
                yield s
        while self._waiting and self._slots and self._start(self._waiting[0]):
            if self._fill(s := heapq.heappop(self._waiting)):
                yield s

    def _start(self, s: Sequence) -> bool:
        """Gives the first that waits a slot and the pages that are computed already, if the others fit too.

        So it preempts nobody: that could be one whose chunk is in the plan by now. Of those to whom pages have come and
        that begin alike, one starts after another is through, and finds its pages.
        """
        s.keys = self.pool.keys(s.tokens, s.keys, s.root) if self.limits.share else []
        alike = any(other.brought and other.keys[:1] == s.keys[:1] for other in self.running)
        if s.brought and (alike or not self._fillable):
            return False
        usable = s.keys[: (len(s.tokens) - 1) // self.pool.page_size]
        found = [] if s.whole else self.pool.find(s.tokens, usable, s.root)
        while self.limits.aligned and len(found) * self.pool.page_size % self.limits.tile:
            found.pop()
        self.pool.share(found)
        if self._needed(s, len(s.tokens)) - len(found) > self.pool.available:
            self.pool.release(found)
            return False
        s.slot, s.pages, s.published = self._slots.pop(), found, len(found)
        s.computed = len(found) * self.pool.page_size
        if not s.epoch:
            s.hit = s.computed
            self.queried += len(s.tokens)
            self.hit += s.hit
        self.running.append(s)
        self.running.sort()
        return True

    def _fill(self, s: Sequence) -> bool:
        """Has the next of the pages that have come filled in before the step; whether none are left.

        They count as computed then: others find them, and so does the sequence itself if it is preempted meanwhile.
        """
        if s.brought is None:
            return True
        given, size = s.brought, self.pool.page_size
        first, end = s.computed // size, min(given.tokens, len(s.tokens) - 1)
        end -= end % self.limits.tile if self.limits.aligned else 0
        if given.first > first or end <= s.computed:
            s.brought = None
            return True
        until = min(end, (first + self._fillable) * size)
        if not self._fillable or not self._reserve(s, until):
            return False
        self._fills.append(Fill(s, s.pages[first : -(-until // size)], given.pages, first - given.first))
        self.hit += max(0, until - s.hit)
        s.computed, s.hit, s.brought = until, max(until, s.hit), None if until == end else given
        self._publish(s)
        return s.brought is None

    @property
    def _fillable(self) -> int:
        """Pages that can still be filled in before the step that is planned."""
        return self.limits.filled - sum(len(fill.pages) for fill in self._fills)

    def _publish(self, s: Sequence) -> None:
        """Lets others find the pages that are full, and settled by tokens that are known."""
        if not self.limits.share:
            return
        s.keys = self.pool.keys(s.tokens, s.keys, s.root)
        full = min(len(s.keys), s.computed // self.pool.page_size)
        for index in range(s.published, full):
            self.pool.publish(s.pages[index], s.tokens, index, s.keys, s.root)
        s.published = max(s.published, full)

    def _launched(self, s: Sequence, rounds: int | None) -> None:
        gain = self._gain(rounds)
        s.least += gain.least
        s.ahead += gain.most

    def _gain(self, rounds: int | None) -> Gain:
        """Of a launch of so many rounds, or of the chunk that completes a sequence."""
        return Gain(1, 1) if rounds is None else Gain(rounds, rounds * (1 + self.limits.drafts))

    def _needed(self, s: Sequence, tokens: int) -> int:
        """Pages for so many tokens, and for guesses after them as far as the sequence can go."""
        return -(-min(tokens + 2 * self.limits.drafts, s.limit - 1) // self.pool.page_size)
