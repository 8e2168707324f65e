"""The scheduler, against a pretended device: of each entry of its cache it remembers the tokens that made it."""

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.arrivals import Brought
from jaxserve.pages import ROOT, Content, PagePool
from jaxserve.request import Request, SamplingParams
from jaxserve.scheduler import Chunk, Fill, Limits, Plan, Room, Scheduler, Sequence

STORIES = [[random.Random(f"{i} {place}").randrange(4) for place in range(100)] for i in range(3)]
"""What is said at each place. Answers go on with a story, which other prompts begin with, as if they had read them."""


class Wish(NamedTuple):
    """A request, and what becomes of it."""

    prompt: tuple[int, ...]
    answer: int = 1  # tokens after which it ends
    ending: str = "device"  # who sees that: the device with the host, or the "host" alone; or a "fault" is found
    limit: int = 30  # tokens of an answer at most
    at: int = 0  # step before which it comes
    aborted: int | None = None  # so many steps later
    n: int = 1
    story: int = 0
    priority: int = 0
    by_host: bool = False
    whole: bool = False
    brought: int = 0  # tokens of the prompt, at most, whose pages have come from elsewhere
    before: int = 0  # pages before those


@dataclass
class Row:
    """What the device knows of a slot."""

    sequence: Sequence
    tokens: list[int]
    pages: list[int]
    over: bool = True


class Result(NamedTuple):
    """What a launch gave one sequence."""

    sequence: Sequence
    epoch: int
    tokens: list[int]
    rounds: int | None


class Device:
    """Runs plans at once, and guesses right or wrong by chance. Asserts that it reads what it should have written.

    With guesses an entry depends on the token after it too, as those of an MTP module do.
    """

    def __init__(self, scheduler: Scheduler, noise: random.Random):
        self.scheduler, self.noise = scheduler, noise
        self.pool, self.drafts = scheduler.pool, scheduler.limits.drafts
        self.rows: dict[int, Row] = {}
        self.memory: list[list[tuple[int, ...] | None]] = [[None] * self.pool.page_size for _ in range(self.pool.count)]
        self.settled: dict[int, Content] = {}  # published pages whose memory was looked at
        self.published: dict[int, Content] = {}  # before the plan was made

    def run(self, plan: Plan, ends: dict[Sequence, int]) -> list[Result]:
        """`ends` are the lengths at which the device ends a sequence by itself."""
        self.ends, self.users = ends, Counter(p for s in self.scheduler.running for p in s.pages)
        self.writers: dict[int, Sequence] = {}
        for fill in plan.fills:
            self.fill(fill)
        for chunk in plan.chunks:  # layer by layer all are written before any is read
            s = chunk.sequence
            if chunk.first:
                self.rows[self.slot(s)] = Row(s, [], [])
            row = self.row(s)
            row.tokens = [*s.tokens, *([self.following(s, len(s.tokens))] if chunk.completes else [])]
            for place in range(chunk.start, chunk.end):
                self.write(row, place, right=True)
        results = []
        for chunk in plan.chunks:
            row = self.row(chunk.sequence)
            self.read(row, chunk.end)
            if chunk.completes:
                self.advance(row)
                results.append(Result(row.sequence, row.sequence.epoch, row.tokens[-1:], None))
        results += self.decode([self.row(s) for s in plan.rows], plan.rounds)
        self.look_at_published()
        return results

    def decode(self, rows: list[Row], rounds: int) -> list[Result]:
        before = [len(row.tokens) for row in rows]
        for _ in range(rounds):
            width = 1 + self.drafts * (self.noise.random() < 0.7)
            for row in rows:
                if not row.over:
                    self.verify(row, width)
        said = [row.tokens[start:] for row, start in zip(rows, before, strict=True)]
        return [Result(row.sequence, row.sequence.epoch, more, rounds) for row, more in zip(rows, said, strict=True)]

    def verify(self, row: Row, width: int) -> None:
        """Computes the last token and guesses; those that are right count."""
        last = len(row.tokens) - 1
        self.read(row, last)
        places = [place for place in range(last, last + width) if place + 1 < row.sequence.limit]
        count = self.noise.randint(1, len(places))
        row.tokens += [self.following(row.sequence, place + 1) for place in places[:count]]
        for place in places:
            self.write(row, place, right=place < last + count)
        self.advance(row)

    def advance(self, row: Row) -> None:
        """Ends the row, or guesses: the MTP module goes on after its first guess from what it wrote itself."""
        place, limit = len(row.tokens) - 1, row.sequence.limit
        row.over = len(row.tokens) >= min(self.ends.get(row.sequence, limit), limit)
        for ahead in range(place, place + self.drafts - 1):
            if not row.over and ahead + 1 < limit:
                self.write(row, ahead, right=False)

    def fill(self, fill: Fill) -> None:
        for page, content in zip(fill.pages, fill.content[fill.begin :], strict=False):
            now = self.pool._contents.get(page)
            assert now is None or now is not self.published.get(page), f"page {page} is filled, and was published"
            assert self.writers.setdefault(page, fill.sequence) is fill.sequence, f"page {page} is written by two"
            self.memory[page] = list(content)

    def write(self, row: Row, place: int, right: bool) -> None:
        index, offset = divmod(place, self.pool.page_size)
        assert index < len(row.pages), f"place {place} is written, and has no page"
        page = row.pages[index]
        now, before = self.pool._contents.get(page), self.published.get(page)
        assert now is None or now is not before, f"page {page} is written, and was published before the plan"
        assert self.users[page] == 1 or now is not None, f"page {page} is written, and shared"
        assert self.writers.setdefault(page, row.sequence) is row.sequence, f"page {page} is written by two"
        self.memory[page][offset] = tuple(row.tokens[: place + 1 + self.pool.lookahead]) if right else None

    def read(self, row: Row, end: int) -> None:
        for place in range(end):
            index, offset = divmod(place, self.pool.page_size)
            assert self.memory[row.pages[index]][offset] == tuple(row.tokens[: place + 1 + self.pool.lookahead])

    def look_at_published(self) -> None:
        """What is found must hold what it is found for."""
        size = self.pool.page_size
        for page, content in self.pool._contents.items():
            if self.settled.get(page) is content:
                continue
            memory = self.memory[page]
            assert memory[-1] is not None, f"page {page} is published, and not computed"
            keys, begin = self.pool.keys(memory[-1]), len(memory[-1]) - size - self.pool.lookahead
            assert content.tokens == memory[-1][begin:]
            assert content.parent == (keys[begin // size - 1] if begin else ROOT)
            assert memory == [memory[-1][: len(memory[-1]) - size + 1 + i] for i in range(size)]
        self.settled = dict(self.pool._contents)

    def following(self, s: Sequence, place: int) -> int:
        return STORIES[s.seed][place]

    def row(self, s: Sequence) -> Row:
        row = self.rows[self.slot(s)]
        assert row.sequence is s, "the slot is another's"
        row.pages = list(s.pages)
        return row

    def slot(self, s: Sequence) -> int:
        assert s.slot is not None, "a sequence is launched that has no slot"
        return s.slot


class Play:
    """What an engine does with its scheduler: it plans a step, launches it, and then reads the one before."""

    def __init__(self, pages: int, page_size: int = 2, noise: random.Random | None = None, **limits):
        settings = {"slots": 4, "tokens": 16, "tile": 4, **limits}
        self.noise = noise or random.Random(0)
        self.limits = Limits(**settings)
        self.scheduler = Scheduler(PagePool(pages, page_size, min(1, self.limits.drafts)), self.limits)
        self.device = Device(self.scheduler, self.noise)
        self.open: dict[Sequence, Wish] = {}
        self.finished: list[Sequence] = []
        self.ongoing: list[Result] = []
        self.arrivals = 0

    def add(self, wish: Wish) -> list[Sequence]:
        request = Request(str(self.arrivals), wish.prompt, SamplingParams(), priority=wish.priority)
        limit, news = len(wish.prompt) + wish.limit, []
        for index in range(wish.n):
            s = Sequence(
                request, index, wish.story, limit, self.arrivals, list(wish.prompt), wish.by_host,
                whole=wish.whole and index == 0,
            )  # fmt: skip
            self.arrivals += 1
            s.brought = self.brought(wish)
            self.open[s] = wish
            self.scheduler.add(s)
            news.append(s)
        return news

    def brought(self, wish: Wish) -> Brought | None:
        """Pages with what a device would have written into them."""
        pool, count = self.scheduler.pool, min(wish.brought, len(wish.prompt))
        if not count or wish.whole:
            return None
        entries = [wish.prompt[: place + 1 + pool.lookahead] for place in range(count)]
        entries += [None] * (-count % pool.page_size)
        pages = [entries[at : at + pool.page_size] for at in range(0, len(entries), pool.page_size)]
        return Brought(wish.before, count, pages[wish.before :]) if wish.before < len(pages) else None

    def abort(self, sequences: Iterable[Sequence]) -> None:
        for s in sequences:
            if self.open.pop(s, None):
                self.scheduler.finish(s)

    def step(self, rounds: int = 1) -> Plan:
        self.device.published = dict(self.scheduler.pool._contents)
        before = {s: s.epoch for s in self.scheduler.running}
        unread = {(result.sequence, result.epoch) for result in self.ongoing}
        steady = not self.scheduler.num_waiting and all(s.caught_up and not s.by_host for s in before)
        preempted, pool = self.scheduler.preemptions, self.scheduler.pool
        ample = sum(-(-s.limit // pool.page_size) for s in before) <= pool.available
        plan = self.scheduler.schedule(rounds)
        assert plan.rounds == (rounds if steady and ample else plan.rounds)
        assert plan.rounds == 1 or (plan.rounds == rounds and steady and self.scheduler.preemptions == preempted)
        check_plan(plan, self.scheduler, unread)
        check_order(plan, self.scheduler, before)
        check_progress(plan, self.scheduler)
        check_pages(self.scheduler)
        ends = {s: len(w.prompt) + w.answer for s, w in self.open.items() if w.ending == "device"}
        ongoing, self.ongoing = self.ongoing, self.device.run(plan, ends)
        for result in ongoing:
            self.read(result)
        return plan

    def read(self, result: Result) -> None:
        s = result.sequence
        if s.epoch != result.epoch:
            return
        assert len(result.tokens) >= (result.rounds or 1) or self.device.row(s).over
        assert result.tokens
        wish, said = self.open[s], len(s.tokens) - s.num_prompt
        self.scheduler.landed(s, result.rounds)
        left = min(wish.answer, wish.limit) - said
        over = len(result.tokens) >= left
        if over and wish.ending == "fault":
            self.scheduler.pool.retract(s.pages)
        else:
            self.scheduler.update(s, result.tokens[:left])
            s.whole = False
        if over:
            self.scheduler.finish(s)
            self.finished.append(s)
            del self.open[s]

    def finish(self, steps: int = 1000) -> None:
        for _ in range(steps):
            if not self.open:
                return
            self.step()
        raise AssertionError(f"not finished after {steps} steps: {list(self.open.values())}")


def check_plan(plan: Plan, scheduler: Scheduler, unread: set[tuple[Sequence, int]]) -> None:
    limits, planned = scheduler.limits, [*(chunk.sequence for chunk in plan.chunks), *plan.rows]
    assert len(planned) == len(set(planned))
    assert set(planned) <= set(scheduler.running)
    slots = [s.slot for s in scheduler.running]
    assert len(slots) == len(set(slots)) <= limits.slots
    assert set(slots) <= set(range(limits.slots))
    tiles = sum(-(-chunk.size // limits.tile) for chunk in plan.chunks)
    assert tiles <= max(1, (limits.tokens - len(plan.rows) * (1 + limits.drafts)) // limits.tile)
    assert all(chunk.size > 0 for chunk in plan.chunks)
    assert all(len(s.tokens) + s.least - plan.rounds < s.limit for s in plan.rows), "a row can add nothing"
    assert not any(s.by_host and (s, s.epoch) in unread for s in planned)
    assert not any(chunk.sequence.whole and chunk.first and chunk.start for chunk in plan.chunks)
    assert sum(len(fill.pages) for fill in plan.fills) <= limits.filled
    assert all(fill.sequence in scheduler.running for fill in plan.fills)
    assert not any(s.brought for s in planned), "it is launched, and not all of its pages are in"


def check_order(plan: Plan, scheduler: Scheduler, before: dict[Sequence, int]) -> None:
    """The last that ran are preempted; the first that waited are started, and begin at once."""
    preempted = {s for s, epoch in before.items() if s.epoch != epoch}
    assert preempted == set(sorted(before, key=turn)[len(before) - len(preempted) :])
    started = {s for s in scheduler.running if s not in before or s in preempted}
    assert started == {piece.sequence for piece in (*plan.chunks, *plan.fills) if piece.sequence in started}
    assert all(turn(s) < turn(other) for s in started for other in scheduler._waiting)


def turn(s: Sequence) -> tuple[int, int]:
    return s.request.priority, s.arrival


def check_progress(plan: Plan, scheduler: Scheduler) -> None:
    """The first advances in any case; if others are behind, one has a chunk, unless slots or pages are too few."""
    first = scheduler.running[0] if scheduler.running else None
    assert first is None or first.least or first in [piece.sequence for piece in (*plan.chunks, *plan.fills)]
    assert scheduler.running or not scheduler.num_waiting
    if not plan.chunks and not plan.fills:
        head = [min(scheduler._waiting, key=turn)] if scheduler._waiting and scheduler._slots else []
        for s in [*(s for s in scheduler.running if not s.caught_up), *head][:1]:
            most = min(len(s.tokens) + 2 * scheduler.limits.drafts, s.limit - 1)
            assert -(-most // scheduler.pool.page_size) - len(s.pages) > scheduler.pool.available


def check_pages(scheduler: Scheduler) -> None:
    """Sequences share only pages that hold the same."""
    pool, users = scheduler.pool, {}
    for s in scheduler.running:
        assert len(s.pages) == len(set(s.pages))
        for index, page in enumerate(s.pages):
            users.setdefault(page, []).append((index, s.tokens[: pool._end(index)]))
    for uses in users.values():
        assert all(use == uses[0] for use in uses)
        index, tokens = uses[0]
        assert len(uses) == 1 or (scheduler.limits.share and len(tokens) == pool._end(index))
    assert pool.used == len(users)


@st.composite
def wishes(draw) -> Wish:
    story = draw(st.integers(0, 2))
    own = draw(st.lists(st.integers(0, 3), max_size=4))
    begin = draw(st.integers(0, 6) | st.integers(0, 40))
    return Wish(
        prompt=(*STORIES[story][:begin], *own) or (0,),
        answer=draw(st.integers(1, 25)),
        ending=draw(st.sampled_from(["device", "host", "device", "host", "fault"])),
        limit=draw(st.integers(1, 30)),
        at=draw(st.integers(0, 5) | st.integers(0, 40)),
        aborted=draw(st.none() | st.none() | st.integers(1, 20)),
        n=draw(st.sampled_from([1, 1, 1, 3])),
        story=draw(st.integers(0, 2)),
        priority=draw(st.integers(0, 2)),
        by_host=draw(st.sampled_from([False, False, False, True])),
        whole=draw(st.sampled_from([False, False, False, True])),
        brought=draw(st.sampled_from([0, 0, 1]) | st.integers(0, 50)),
        before=draw(st.sampled_from([0, 0, 0, 1, 3])),
    )


@settings(max_examples=300)
@given(
    asked=st.lists(wishes(), min_size=1, max_size=10),
    slots=st.integers(1, 4),
    tile=st.integers(1, 4),
    tiles=st.integers(1, 6),
    drafts=st.integers(0, 2),
    page_size=st.integers(1, 4),
    spare=st.integers(0, 10),
    filled=st.integers(1, 6),
    share=st.sampled_from([True, True, True, False]),
    seed=st.integers(0, 2**16),
)
def test_any_trace_is_served(asked, slots, tile, tiles, drafts, page_size, spare, filled, share, seed):
    longest = max(-(-(len(wish.prompt) + wish.limit) // page_size) for wish in asked)
    noise = random.Random(seed)
    play = Play(
        longest + spare, page_size, noise, slots=slots, tile=tile, tokens=tile * tiles, drafts=drafts, share=share,
        filled=filled,
    )  # fmt: skip
    added: dict[int, list[Sequence]] = {}
    last, aborted = max(wish.at for wish in asked), set()
    work = sum(wish.n * (len(wish.prompt) + wish.limit + 3) for wish in asked)
    for now in range(last + 3 * work):
        for i, wish in enumerate(asked):
            if wish.at == now:
                added[i] = play.add(wish)
            if wish.aborted is not None and wish.at + wish.aborted == now:
                aborted |= {s for s in added[i] if s in play.open}
                play.abort(added[i])
        if now > last and not play.open:
            break
        play.step(noise.choice([1, 2, 8]))
    assert not play.open, "starved"
    assert sorted([*play.finished, *aborted]) == sorted(s for each in added.values() for s in each)
    assert (play.scheduler.pool.used, play.scheduler.num_waiting, play.scheduler.running) == (0, 0, [])
    assert sorted(play.scheduler._slots) == list(range(slots))
    for i, sequences in added.items():
        for s in {*sequences} - aborted:
            check_answer(s, asked[i])


def check_answer(s: Sequence, wish: Wish) -> None:
    start, count = len(wish.prompt), min(wish.answer, wish.limit)
    expected = STORIES[wish.story][start : start + count]
    said = s.tokens[start:]
    assert said == expected if wish.ending != "fault" else said == expected[: len(said)]


def chunks(plan: Plan) -> list[tuple[int, int]]:
    return [(chunk.start, chunk.end) for chunk in plan.chunks]


def test_a_long_prompt_is_cut_into_chunks_while_rows_go_on():
    play = Play(pages=40, tokens=8, tile=4)
    (quick,) = play.add(Wish((1, 2), answer=20, limit=20))
    play.step()
    play.add(Wish(tuple(STORIES[0][:14])))
    plans = [play.step() for _ in range(4)]
    assert [chunks(plan) for plan in plans] == [[(0, 4)], [(4, 8)], [(8, 12)], [(12, 14)]]
    assert all(plan.rows == (quick,) for plan in plans)


def test_pages_that_have_come_are_filled_in_over_several_steps_while_rows_go_on():
    play = Play(pages=40, tokens=8, tile=4, filled=2)
    (quick,) = play.add(Wish((1, 2), answer=20, limit=20))
    play.step()
    (s,) = play.add(Wish(tuple(STORIES[0][:14]), brought=14))
    plans = [play.step() for _ in range(4)]
    assert [[len(fill.pages) for fill in plan.fills] for plan in plans] == [[2], [2], [2], [1]]
    assert [chunks(plan) for plan in plans] == [[], [], [], [(13, 14)]]
    assert all(plan.rows == (quick,) for plan in plans)
    assert (s.hit, s.brought) == (13, None)


def test_several_answers_to_a_prompt_share_the_pages_that_have_come_for_each():
    play = Play(pages=40, filled=2)
    play.add(Wish(tuple(STORIES[0][:14]), n=3, answer=8, brought=14))
    plans = [play.step() for _ in range(8)]
    assert sum(len(fill.pages) for plan in plans for fill in plan.fills) == 6 + 3  # each has the last for itself
    play.finish()


def test_who_is_preempted_while_its_pages_are_filled_in_goes_on_with_the_others():
    play = Play(pages=40, filled=2)
    (s,) = play.add(Wish(tuple(STORIES[0][:14]), brought=14))
    play.step()
    play.step()
    play.scheduler.preempt(s)
    plans = [play.step() for _ in range(2)]
    assert [[(fill.begin, len(fill.pages)) for fill in plan.fills] for plan in plans] == [[(4, 2)], [(6, 1)]]
    play.finish()
    assert (s.hit, play.scheduler.hit) == (13, 13)


@pytest.mark.parametrize("length", [6, 7])
def test_of_a_prompt_that_is_in_the_cache_a_token_at_least_is_computed(length):
    play = Play(pages=20)
    prompt = tuple(STORIES[0][:length])
    play.add(Wish(prompt))
    play.finish()
    (again,) = play.add(Wish(prompt))
    start = {6: 4, 7: 6}[length]
    assert chunks(play.step()) == [(start, length)]
    assert (again.hit, play.scheduler.hit, play.scheduler.queried) == (start, start, 2 * length)


def test_a_prompt_whose_scores_are_wanted_is_computed_whole():
    play = Play(pages=20)
    for whole in (False, True):
        play.add(Wish(tuple(STORIES[0][:7]), whole=whole))
        plan = play.step()
        play.finish()
    assert chunks(plan) == [(0, 7)]


@pytest.mark.parametrize(("share", "pages"), [(True, 3 + 4), (False, 4 * 4)])
def test_answers_to_one_prompt_share_its_full_pages_if_they_may(share, pages):
    play = Play(pages=40, tokens=64, share=share)
    answers = play.add(Wish(tuple(STORIES[0][:7]), n=4))
    play.step()
    assert len({page for s in answers for page in s.pages}) == pages
    play.finish()
    play.add(Wish(tuple(STORIES[0][:7])))
    assert chunks(play.step()) == [(6 if share else 0, 7)]


def test_a_preempted_sequence_goes_on_from_what_is_still_in_the_cache():
    play = Play(pages=20)
    (s,) = play.add(Wish((1, 2, 3, 0, 1), answer=10, limit=10))
    for _ in range(4):
        play.step()
    play.scheduler.preempt(s)
    assert (s.slot, s.pages, play.scheduler.num_waiting, play.scheduler.pool.used) == (None, [], 1, 0)
    known = len(s.tokens)
    assert known == 8  # of the five launched after the prompt, the last is not read
    assert chunks(play.step()) == [(6, known)]
    play.finish()
    assert (s.hit, play.scheduler.preemptions, play.scheduler.queried) == (0, 1, 5)


def test_when_pages_run_out_the_last_that_came_gives_its_own_up():
    play = Play(pages=7, share=False)
    first, second = (play.add(Wish((1, 2, 3), answer=9, limit=10))[0] for _ in range(2))
    play.step()
    while first.pages and second.epoch == 0:
        play.step()
    assert (first.epoch, second.epoch, play.scheduler.preemptions) == (0, 1, 1)
    play.finish()
    assert first.epoch == 1  # it ended, and was never preempted
    assert play.finished == [first, second]


def test_one_that_starts_preempts_nobody_for_its_guesses():
    play = Play(pages=7, slots=2, tokens=8, tile=2, drafts=2)
    (long,) = play.add(Wish((1, 2, 3, 0, 1, 2, 3, 0, 0, 0), limit=2, priority=1))
    play.step()
    (urgent,) = play.add(Wish((3,), answer=8, limit=8))
    assert chunks(play.step()) == [(8, 10)]
    assert (long.slot is None, urgent.slot is None) == (False, True)
    play.finish()


@pytest.mark.parametrize("pages", [9, 10])
def test_a_row_whose_pages_an_urgent_chunk_takes_is_not_launched(pages):
    play = Play(pages, tokens=2, tile=2)
    (patient,) = play.add(Wish((1,), answer=16, limit=16, priority=1))
    for _ in range(3):
        play.step()
    (urgent,) = play.add(Wish(tuple(STORIES[0][:14]), limit=2))
    while not play.scheduler.preemptions:
        play.step()
    assert (patient.epoch, urgent.epoch) == (1, 0)
    play.finish()


def test_lower_priority_numbers_start_first_and_equals_as_they_came():
    play = Play(pages=40, slots=1)
    sequences = [play.add(Wish((1,), priority=priority))[0] for priority in (1, 0, 1, 0)]
    play.finish()
    assert play.finished == [sequences[i] for i in (1, 3, 0, 2)]


def test_there_is_one_round_while_anybody_waits_for_its_end():
    play = Play(pages=60, slots=2, share=False)
    play.add(Wish((1,), answer=4, limit=60))
    play.add(Wish((1,), answer=30, limit=60))
    play.add(Wish((1,), answer=30, limit=60))  # waits for a slot until the first has ended
    rounds = []
    while play.open:
        rounds.append((play.scheduler.num_waiting, play.step(8).rounds))
    assert {count for waiting, count in rounds if waiting} == {1}
    assert 8 in {count for _, count in rounds}


def test_nobody_is_preempted_for_rounds_that_one_round_at_a_time_would_not_need():
    play = Play(pages=7, share=False)  # two answers of 10 tokens in pages of 4
    for _ in range(2):
        play.add(Wish((1, 2, 3), answer=3, limit=18))
    rounds = [play.step(8).rounds for _ in range(4)]
    assert set(rounds) == {1}
    play.finish()
    assert play.scheduler.preemptions == 0


def test_one_that_the_host_guides_holds_the_rounds_to_one_and_is_read_before_it_goes_on():
    play = Play(pages=60)
    (guided,) = play.add(Wish((1,), answer=5, limit=60, by_host=True))
    (free,) = play.add(Wish((1,), answer=20, limit=60))
    plans = [play.step(8) for _ in range(8)]
    assert [guided in plan.rows for plan in plans] == [False, False, True, False, True, False, True, False]
    assert all(free in plan.rows and plan.rounds == 1 for plan in plans[1:])


def test_a_shared_step_is_filled_as_far_as_it_has_room_for_chunks_and_for_what_stands_before_them():
    scheduler = Scheduler(PagePool(40, 4), Limits(slots=4, tokens=8, tile=2, share=False))
    for i in range(3):
        request = Request(str(i), tuple(range(11)), SamplingParams())
        scheduler.add(Sequence(request, 0, 0, limit=20, arrival=i, tokens=list(range(11))))
    step = lambda *room: [(c.sequence.arrival, c.start, c.end) for c in scheduler.schedule(1, Room(*room)).chunks]  # noqa: E731
    assert step(0, 99) == []
    assert not scheduler.running
    assert step(7, 0) == [(0, 0, 11), (1, 0, 2)]
    assert step(3, 0) == []  # the second has a token pair before it, and nobody overtakes it
    assert step(3, 1) == [(1, 2, 8)]
    assert step(3, 4) == [(1, 8, 11), (2, 0, 2)]


def test_what_chunks_leave_of_a_step():
    s = Sequence(Request("x", (1,) * 30, SamplingParams()), 0, 0, limit=40, arrival=0, tokens=[1] * 30)
    chunks = [Chunk(s, 0, 5, True), Chunk(s, 8, 12, False)]
    assert Room(10, 6).without(chunks, tile=4) == Room(10 - 2 - 1, 6 - 2)


@pytest.mark.parametrize(("aligned", "start"), [(False, 9), (True, 6)])
def test_a_hit_ends_where_a_tile_does_if_chunks_are_to_begin_there(aligned, start):
    scheduler = Scheduler(PagePool(40, 3), Limits(slots=4, tokens=32, tile=2, aligned=aligned))
    for i in range(2):
        request = Request(str(i), tuple(range(11)), SamplingParams())
        scheduler.add(Sequence(request, 0, 0, limit=20, arrival=i, tokens=list(range(11))))
        (chunk,) = scheduler.schedule().chunks
        assert (chunk.start, chunk.end) == ((start if i else 0), 11)
