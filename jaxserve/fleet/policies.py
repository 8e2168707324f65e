"""Who gets the next job. Pure functions of what is known of the instances; of equals, the first by name is chosen."""

from collections.abc import Collection, Mapping, Set
from typing import NamedTuple

Link = tuple[str, str]
"""From a prefill instance to a decode instance, by their names."""


class PrefillLoad(NamedTuple):
    """Of an instance that computes prompts."""

    name: str
    queued: int  # tokens that it has been given, and has not computed
    ranks: int = 1  # devices that share its steps


class DecodeLoad(NamedTuple):
    """Of an instance that generates answers; tokens are those of its cache."""

    name: str
    used: int
    reserved: int  # for jobs that are on their way to it
    capacity: int
    jobs: int  # that it has, and that are on their way
    slots: int  # answers that it generates at once


def choose_prefill(loads: Collection[PrefillLoad], tokens: int, avoid: Collection[str | None] = ()) -> str | None:
    """Where a prompt of so many tokens will be computed first; None if there is nobody.

    Those that are to be avoided get it only if there is no other.
    """
    best = min(
        loads, key=lambda load: (load.name in avoid, (load.queued + tokens) / load.ranks, load.name), default=None
    )
    return best and best.name


def choose_decode(
    loads: Collection[DecodeLoad], tokens: int, ahead: float, avoid: Collection[str | None] = ()
) -> str | None:
    """Where least of the cache is in use, with what is reserved and these tokens; None if there is no room.

    An instance takes jobs beyond what it has room for, by a share `ahead`: their prompts are computed meanwhile. Those
    that are to be avoided get it only if no other has room.
    """
    able = [load for load in loads if has_room(load, tokens, ahead)]
    order = lambda load: (load.name in avoid, _share(load, tokens), load.jobs, load.name)  # noqa: E731
    best = min(able, key=order, default=None)
    return best and best.name


def in_doubt(missed: Mapping[Link, float], now: float, seconds: float) -> Set[Link]:
    """Links on which pages were missed less than so many seconds ago; whoever uses one may wait for a deadline."""
    return {link for link, at in missed.items() if now - at < seconds}


def unreached(links: Set[Link], prefills: Collection[str], decodes: Collection[str]) -> Set[str]:
    """Decode instances that these prefill instances have no other links to than those; none if there are no such."""
    return {to for to in decodes if prefills and all((source, to) in links for source in prefills)}


def has_room(load: DecodeLoad, tokens: int, ahead: float) -> bool:
    """Whether an instance may have another job; one without any always may."""
    few = load.jobs < load.slots * (1 + ahead)
    return not load.jobs or (few and _share(load, tokens) <= 1 + ahead)


def _share(load: DecodeLoad, tokens: int) -> float:
    return (load.used + load.reserved + tokens) / max(1, load.capacity)
