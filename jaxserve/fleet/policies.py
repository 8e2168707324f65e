"""Who gets the next job. Pure functions of what is known of the instances; of equals, the first by name is chosen."""

from collections.abc import Collection
from typing import NamedTuple


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


def choose_prefill(loads: Collection[PrefillLoad], tokens: int, avoid: str | None = None) -> str | None:
    """Where a prompt of so many tokens will be computed first; None if there is nobody.

    Where it has failed before it goes only if there is no other.
    """
    best = min(
        loads, key=lambda load: (load.name == avoid, (load.queued + tokens) / load.ranks, load.name), default=None
    )
    return best and best.name


def choose_decode(loads: Collection[DecodeLoad], tokens: int, ahead: float, avoid: str | None = None) -> str | None:
    """Where least of the cache is in use, with what is reserved and these tokens; None if there is no room.

    An instance takes jobs beyond what it has room for, by a share `ahead`: their prompts are computed meanwhile.
    """
    able = [load for load in loads if has_room(load, tokens, ahead)]
    order = lambda load: (load.name == avoid, _share(load, tokens), load.jobs, load.name)  # noqa: E731
    best = min(able, key=order, default=None)
    return best and best.name


def has_room(load: DecodeLoad, tokens: int, ahead: float) -> bool:
    """Whether an instance may have another job; one without any always may."""
    few = load.jobs < load.slots * (1 + ahead)
    return not load.jobs or (few and _share(load, tokens) <= 1 + ahead)


def _share(load: DecodeLoad, tokens: int) -> float:
    return (load.used + load.reserved + tokens) / max(1, load.capacity)
