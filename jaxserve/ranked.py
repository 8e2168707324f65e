"""The schedulers of all ranks of a mesh as one. Plain Python, no JAX."""

import heapq
from collections.abc import Callable, Iterator

from jaxserve.pages import PagePool
from jaxserve.parallel.errors import QueueFullError, RequestError
from jaxserve.scheduler import Limits, Plan, Room, Scheduler, Sequence


class Ranked:
    """Sequences wait together, and belong to a rank from when one can take them on.

    So whoever is first in order starts wherever a slot becomes free. On a single rank its scheduler has them at once.
    """

    def __init__(self, ranks: int, make: Callable[[], Scheduler]):
        self.ranks = [make() for _ in range(ranks)]
        self._waiting: list[Sequence] = []  # a heap, of those without a rank
        self._turn, self._served = 0, [0] * ranks  # in which turn each had chunks last

    @property
    def limits(self) -> Limits:
        return self.ranks[0].limits

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + sum(rank.num_waiting for rank in self.ranks)

    @property
    def num_brought(self) -> int:
        """Those that wait, and whose pages have come from elsewhere: in memory, until they start."""
        waiting = [*self._waiting, *(s for rank in self.ranks for s in rank.waiting)]
        return sum(s.brought is not None for s in waiting)

    def __len__(self) -> int:
        return len(self.ranks)

    def __iter__(self) -> Iterator[Scheduler]:
        return iter(self.ranks)

    def __getitem__(self, rank: int) -> Scheduler:
        return self.ranks[rank]

    def check(self, count: int) -> None:
        """Raises QueueFullError if there is no room for `count` sequences more: free slots, and places in the queue.

        RequestError if there never is.
        """
        places, waiting = self.limits.queued, self.num_waiting
        free, slots = sum(rank.num_free for rank in self.ranks), self.limits.slots * len(self.ranks)
        if places is None:
            return
        if count > places + slots:
            raise RequestError(f"n = {count}: at most {places + slots} answers can run or wait at once")
        if waiting + count > places + free:
            raise QueueFullError(
                f"the queue is full: {waiting} answers wait, of {places} that may besides {free} that can start; "
                f"{count} needed; try again later"
            )

    def add(self, s: Sequence) -> None:
        """Queues a sequence."""
        heapq.heappush(self._waiting, s)

    def finish(self, s: Sequence) -> None:
        """Takes back all that a sequence holds, whether it waits or runs."""
        if s in self._waiting:
            self._waiting.remove(s)
            heapq.heapify(self._waiting)
        else:
            self.ranks[s.rank].finish(s)

    def restart(self, make_pool: Callable[[], PagePool]) -> set[Sequence]:
        """Gives up all that run, with their pages and all that was cached; gives those that go on waiting."""
        for rank in self.ranks:
            rank.restart(make_pool())
        return set(self._waiting).union(*(rank for rank in self.ranks))

    def allowed(self, rounds: int) -> int:
        """As many rounds, if the next step may have them on all ranks; else one."""
        self._assign()
        waiting = any(s.coming is None for s in self._waiting)
        return rounds if not waiting and all(rank.allows(rounds) for rank in self.ranks) else 1

    def wanted(self) -> Room:
        """Room that the ranks' chunks can fill in the next step; see `Scheduler.wanted`."""
        each = [rank.wanted() for rank in self.ranks]
        return Room(sum(room.tiles for room in each), sum(room.past for room in each))

    def schedule(self, rounds: int, room: Room | None = None) -> list[Plan]:
        """Plans a step of all ranks, of as many rounds on each if they allow it; they share the `room` for chunks."""
        rounds = self.allowed(rounds)
        plans: dict[int, Plan] = {}
        self._turn += 1
        for number in sorted(range(len(self.ranks)), key=self._served.__getitem__):  # nobody always gets the rest
            plans[number] = plan = self.ranks[number].schedule(rounds, room)
            self._served[number] = self._turn if plan.chunks else self._served[number]
            room = room and room.without(plan.chunks, self.limits.tile)
        return [plans[number] for number in range(len(self.ranks))]

    def expecting(self) -> list[Sequence]:
        """Those that wait for pages from elsewhere, in order."""
        return sorted(s for s in self._waiting if s.coming is not None)

    def _assign(self) -> None:
        """Gives those that wait to ranks that have a slot for them: where most of their prompt is, and least else.

        Who expects pages from elsewhere is passed by until they have come.
        """
        expecting: list[Sequence] = []
        while self._waiting:
            able = [n for n, rank in enumerate(self.ranks) if rank.num_free > rank.num_waiting or len(self.ranks) == 1]
            if not able:
                break
            s = heapq.heappop(self._waiting)
            if s.coming is not None:
                expecting.append(s)
                continue
            s.rank = min(able, key=lambda number: self.ranks[number].load_with(s))
            self.ranks[s.rank].add(s)
        for s in expecting:
            heapq.heappush(self._waiting, s)
