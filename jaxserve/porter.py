"""Carries pages between an engine's cache and its connector; without a connector there is nothing to carry."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax

from jaxserve.arrivals import Arrival
from jaxserve.connector import Connector, Leaving
from jaxserve.parallel.devices import Devices
from jaxserve.parallel.errors import RequestError, ShardingError, TransferError
from jaxserve.parallel.pages import PageCopier
from jaxserve.ranked import Ranked
from jaxserve.request import Output, Request
from jaxserve.scheduler import Fill, Sequence
from jaxserve.tiers.counters import TierCounters

COPIED = 16
"""Pages that are copied at once, out of the cache or into it."""
FILLED = 2 * COPIED
"""Pages of each rank that are copied into the cache before a step at most, so that no step waits long for them."""
AHEAD = 4
"""Requests that wait for a slot, and whose pages are fetched from the store meanwhile."""
IDLE = 0.01
"""Seconds to wait for pages when there is nothing to compute."""


class Block(NamedTuple):
    """Pages that are copied into the cache at once."""

    ids: list[int]
    pages: Any  # a tree of arrays `[len(ids), b, …]`


class Porter:
    """Of one engine; its methods are called between two steps, and wait for nothing but `rest`."""

    def __init__(self, connector: Connector | None, devices: Devices, page_size: int):
        """Raises ShardingError if processes share the mesh: they would have to carry together."""
        if connector and devices.shared:
            raise ShardingError("pages can't come from elsewhere, or go there, on a mesh that processes share")
        self._connector, self._page_size = connector, page_size
        self._copier, self._first_rank = PageCopier(devices, COPIED), devices.here.start
        self.missed = 0
        """Requests whose pages did not come from another engine."""

    @property
    def version(self) -> str | None:
        """Of the weights that pages are computed with, if it is known."""
        return self._connector.version if self._connector else None

    @property
    def tiers(self) -> dict[str, TierCounters]:
        """What the tiers of the context cache count."""
        store = self._connector and self._connector.store
        return store.counters() if store else {}

    @property
    def dropped(self) -> int:
        """Pages that did not get into the store, for too many were on their way to it."""
        return self._connector.dropped if self._connector else 0

    @property
    def busy(self) -> bool:
        """Whether something will still be said that no step says."""
        return self._connector is not None and self._connector.busy

    @property
    def offered(self) -> int:
        """Requests whose pages others may take, now or soon."""
        return self._connector.offered if self._connector else 0

    def check(self, request: Request) -> None:
        """Raises RequestError if a request needs ways for pages that there aren't."""
        connector, p = self._connector, request.params
        if request.export and (connector is None or connector.address is None or (p.n, p.max_tokens) != (1, 1)):
            raise RequestError("export: this engine offers no pages to others, or n or max_tokens is not 1")
        if request.handover and (connector is None or not connector.takes or p.prompt_logprobs is not None):
            raise RequestError("handover: this engine takes no pages from others, or prompt_logprobs are asked for")

    def compile(self, cache: Any) -> Any:
        """Makes its programs, if there is something to carry; gives the cache back, and DONATES it."""
        if self._connector is None:
            return cache
        self._copier.gather(cache, {})
        return self._copier.scatter(cache, {}, {})

    # Pages that come.

    def bring(self, s: Sequence, ranks: Ranked) -> Arrival | None:
        """What of a sequence's pages comes from elsewhere, besides those that some rank has."""
        if self._connector is None:
            return None
        pool = ranks[0].pool
        usable = 0 if s.whole else (len(s.tokens) - 1) // self._page_size
        keys = pool.keys(s.tokens, root=s.root)[:usable]
        found = max(len(rank.pool.find(s.tokens, keys, s.root)) for rank in ranks)
        return self._connector.bring(s.request, keys, found)

    def receive(self, ranks: Ranked) -> list[tuple[Sequence, str]]:
        """Gives what has come to those who wait for it, and asks for more: as much as memory should hold at once.

        Another engine keeps its pages until there is a slot for them; those of the store are fetched somewhat before.
        Those who are to export pages have room for them one after another.
        Returns sequences whose pages will not come, and why.
        """
        missed, full = [], False
        free = sum(rank.num_free for rank in ranks) - ranks.num_brought
        for place, s in enumerate(ranks.expecting()):
            assert s.coming is not None
            if place < free + (0 if s.request.handover else AHEAD) and not (full and s.request.export):
                full |= not s.coming.start()
            if s.coming.done:
                try:
                    s.brought, s.coming = s.coming.result(), None
                except Exception as error:  # of whatever kind: the steps of others must go on
                    missed.append((s, str(error) if isinstance(error, TransferError) else repr(error)))
                    self.missed += s.request.handover is not None
        return missed

    def fill(self, cache: Any, fills: Iterable[Fill]) -> Any:
        """The cache with pages that have come. DONATES it."""
        blocks: dict[int, list[Block]] = {}
        for fill in fills:
            blocks.setdefault(self._first_rank + fill.sequence.rank, []).extend(_blocks(fill))
        for number in range(max(map(len, blocks.values()), default=0)):
            some = {rank: each[number] for rank, each in blocks.items() if number < len(each)}
            ids = {rank: block.ids for rank, block in some.items()}
            cache = self._copier.scatter(cache, ids, {rank: block.pages for rank, block in some.items()})
        return cache

    # Pages that leave.

    def keep(self, cache: Any, s: Sequence, output: Output) -> None:
        """Has those pages of a sequence copied that are to be elsewhere too: new full ones, or all of its prompt.

        The output is the connector's to say then, if others are to have the pages.
        """
        connector, size, export = self._connector, self._page_size, s.request.export
        if connector is None or not (connector.store or export):
            return
        full = min(len(s.keys), s.computed // size)
        first, s.kept = max(s.kept, s.hit // size), full
        begin, end = (0, -(-s.computed // size)) if export else (first, full)
        if begin >= end:
            return
        rank = self._first_rank + s.rank
        parts = [s.pages[at : min(at + COPIED, end)] for at in range(begin, end, COPIED)]
        blocks = [self._copier.gather(cache, {rank: part})[rank] for part in parts]
        said = output if export else None
        connector.give(Leaving(s.request, blocks, end - begin, s.keys[first:full], first - begin, said, s.computed))

    # What is said.

    def said(self) -> list[Output]:
        """What has come to be said since the last time."""
        return self._connector.said() if self._connector else []

    def passed(self, outputs: Iterable[Output]) -> Iterator[Output]:
        """Outputs of a step, but those that are the connector's to say."""
        for output in outputs:
            if output.finish_reason == "error":
                self.forget(output.request_id)
            if not (self._connector and self._connector.holds(output.request_id)):
                yield output

    def forget(self, request_id: str) -> None:
        """A request has ended otherwise than by what the connector says, or nobody will take its pages."""
        if self._connector:
            self._connector.forget(request_id)

    def withdraw(self) -> None:
        """Nobody will take what is on offer now."""
        if self._connector:
            self._connector.withdraw()

    def rest(self) -> None:
        """Waits a little, for a step that has nothing to compute."""
        if self._connector:
            self._connector.wait(IDLE)


def _blocks(fill: Fill) -> Iterator[Block]:
    """What is to be filled in, cut as it is copied."""
    for at in range(0, len(fill.pages), COPIED):
        ids, begin = fill.pages[at : at + COPIED], fill.begin + at
        yield Block(ids, jax.tree.map(lambda pages, a=begin, b=begin + len(ids): pages[a:b], fill.content))  # noqa: B008
