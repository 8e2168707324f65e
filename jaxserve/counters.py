"""What an engine counts. Plain numbers, for metrics and for whoever wants to know where the time goes."""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from itertools import zip_longest
from typing import Any

from jaxserve.tiers.counters import TierCounters


@dataclass
class Counters:
    """Sums since the engine started; those of the moment are marked."""

    steps: int = 0
    waiting: int = 0  # now: answers that are queued
    running: int = 0  # now
    pages_used: int = 0  # now
    pages: int = 0  # in all
    page_size: int = 0  # tokens of each
    slots: int = 0  # answers that can run at once
    preemptions: int = 0
    prompt_tokens: int = 0  # of answers that have started
    cached_tokens: int = 0  # of those, found in the cache
    generated_tokens: int = 0
    decoded_rows: int = 0  # a row an answer and a round: a token of the model's own, and guesses that held
    wide_rows: int = 0  # of those, with guesses verified
    accepted: list[int] = field(default_factory=list)  # guesses that held, by their place
    compiled: int = 0  # programs, before the first step
    late_compiled: int = 0  # programs since: each made a step wait
    schedule_seconds: float = 0.0  # planning and launching
    device_seconds: float = 0.0  # waiting for results
    read_seconds: float = 0.0  # from results to outputs
    exposed_seconds: float = 0.0  # of the host's time, how much the device had nothing to do in
    step_seconds: float = 0.0
    handovers_missed: int = 0  # requests to which another engine did not give the pages that it had for them
    pages_dropped: int = 0  # pages that did not get to the context cache: too many were on their way
    tiers: dict[str, TierCounters] = field(default_factory=dict)  # of the context cache, from the fastest

    @property
    def tokens_per_row(self) -> float:
        """New tokens of an answer in a round, 1 without guesses that hold."""
        return (self.decoded_rows + sum(self.accepted)) / max(1, self.decoded_rows)

    def at_rest(self) -> "Counters":
        """What remains of them when the engine is gone: the sums, nothing of the moment."""
        return replace(self, waiting=0, running=0, pages_used=0, pages=0, slots=0)


def total(several: Iterable[Counters]) -> Counters:
    """Sums over engines. A page has as many tokens as with all of them."""
    found = list(several)
    sums = _sums(Counters, found, but=("accepted", "tiers"))
    sums["accepted"] = [sum(held) for held in zip_longest(*(c.accepted for c in found), fillvalue=0)]
    sums["page_size"] = max((c.page_size for c in found), default=0)
    names = dict.fromkeys(name for c in found for name in c.tiers)
    sums["tiers"] = {name: _tier(name, found) for name in names}
    return Counters(**sums)


def _tier(name: str, found: list[Counters]) -> TierCounters:
    return TierCounters(**_sums(TierCounters, [c.tiers[name] for c in found if name in c.tiers]))


def _sums(kind: Any, found: list[Any], but: tuple[str, ...] = ()) -> dict[str, Any]:
    names = (f.name for f in fields(kind) if f.name not in but)
    return {name: sum(getattr(c, name) for c in found) for name in names}
