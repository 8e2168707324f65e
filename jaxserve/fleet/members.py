"""The instances of a fleet: who may join, who is well, who has how much to do."""

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple

from jaxserve.counters import Counters, total
from jaxserve.fleet.health import Health, Patience, Vital
from jaxserve.fleet.instance import About, Hear, Instance, Role
from jaxserve.fleet.jobs import Job
from jaxserve.fleet.policies import DecodeLoad, PrefillLoad
from jaxserve.parallel.errors import RequestError
from jaxserve.serving import Memory

State = Health | Literal["draining"]

WELL: tuple[Health, ...] = ("healthy", "slow")


class Member(NamedTuple):
    """An instance, and how it is."""

    instance: Instance
    vital: Vital


class Troubled(NamedTuple):
    """An instance that will say nothing more."""

    instance: Instance
    health: Health
    reason: str


class Members:
    """Those that have joined and are not lost. Threads may share it."""

    def __init__(self, config: str, max_model_len: int, patience: Patience, clock: Callable[[], float]):
        """All must have this config, by its digest, and these tokens of a prompt and its answer."""
        self.patience, self._clock = patience, clock
        self._config, self._max_model_len = config, max_model_len
        self._lock, self._members = threading.Lock(), dict[str, Member]()
        self._past: list[Counters] = []  # of those that are lost

    def __iter__(self) -> Iterator[Member]:
        return iter(list(self._members.values()))

    def get(self, name: str) -> Instance | None:
        member = self._members.get(name)
        return member and member.instance

    def join(self, instance: Instance, hear: Hear) -> None:
        """Has an instance begin, which tells `hear` what happens.

        Raises RequestError that names the field if it doesn't fit the others.
        """
        with self._lock:
            self._check(instance.about)
            instance.begin(hear)
            self._members[instance.about.name] = Member(instance, Vital(instance.signs.at))

    def remove(self, instance: Instance) -> bool:
        """Whether it was there."""
        with self._lock:
            if self.get(instance.about.name) is not instance:
                return False
            del self._members[instance.about.name]
            self._past = [total([*self._past, instance.signs.counters.at_rest()])]
            return True

    def unlike(self, max_model_len: int) -> str | None:
        """Why an instance that takes so many tokens doesn't fit, if so."""
        if max_model_len == self._max_model_len:
            return None
        return f"max_model_len = {max_model_len}: the router's is {self._max_model_len}; give both the same"

    def usable(self, name: str | None) -> bool:
        """Whether it may be given something."""
        found = self._members.get(name or "")
        return found is not None and self._state(found) in WELL

    def ready(self, role: Role) -> list[Instance]:
        """Those that may be given something."""
        return [each.instance for each in self if each.instance.about.role == role and self._state(each) in WELL]

    def doubtful(self) -> set[str]:
        """Names of those that get something only if nobody else can have it."""
        now = self._clock()
        return {each.instance.about.name for each in self if self._vital(each).doubtful(now, self.patience)}

    def states(self) -> dict[str, tuple[Role, State]]:
        """How each is, by name."""
        return {each.instance.about.name: (each.instance.about.role, self._state(each)) for each in self}

    def troubled(self) -> list[Troubled]:
        """Those that are thought to say nothing more."""
        found = []
        for each in self:
            health = self._health(each)
            if health not in WELL:
                found.append(Troubled(each.instance, health, self._reason(health)))
        return found

    def _state(self, member: Member) -> State:
        health = self._health(member)
        return "draining" if health in WELL and member.instance.draining else health

    def _health(self, member: Member) -> Health:
        return self._vital(member).health(self._clock(), self.patience)

    @staticmethod
    def _vital(member: Member) -> Vital:
        signs = member.instance.signs
        member.vital.hear(signs.at, signs.beat, signs.busy)
        return member.vital

    def _reason(self, health: Health) -> str:
        if health == "dead":
            return f"nothing was heard of it for {self.patience.dead_after:g} s"
        return f"it hangs: it is at work, and has made no step for {self.patience.hung_after:g} s"

    # What they have to do.

    def prefill_loads(self, jobs: Iterable[Job]) -> list[PrefillLoad]:
        queued = Counter[str | None]()
        for job in jobs:
            queued[job.at] += job.tokens if job.stage == "prefill" else 0
        ready = (instance.about for instance in self.ready("prefill"))
        return [PrefillLoad(about.name, queued[about.name], about.ranks) for about in ready]

    def decode_loads(self, jobs: Iterable[Job]) -> list[DecodeLoad]:
        """What an instance says of its cache doesn't count jobs that it hasn't begun: those are reserved."""
        reserved, count = Counter[str | None](), Counter[str | None]()
        for job in jobs:
            count[job.target] += 1
            reserved[job.target] += 0 if job.said_here and job.stage == "decode" else job.tokens
        loads = []
        for about, c in ((each.about, each.signs.counters) for each in self.ready("decode")):
            used = c.pages_used * c.page_size
            name = about.name
            loads.append(DecodeLoad(name, used, reserved[name], about.capacity, count[name], about.slots))
        return loads

    def counters(self) -> Counters:
        """Sums over all there are and were; answers wait and run in many places, so those are left out."""
        return total([*self._past, *(each.instance.signs.counters for each in self)])

    def memory(self) -> Memory:
        each = [member.instance.signs.memory for member in self]
        return Memory(sum(memory.weights for memory in each), sum(memory.cache for memory in each))

    # Who may join.

    def _check(self, about: About) -> None:
        if about.name in self._members:
            raise RequestError(f"name: there is an instance {about.name!r} already; give this one another --name")
        if reason := self.unlike(about.max_model_len):
            raise RequestError(reason)
        first = next((each.instance.about for each in self), None)
        fleets = {field: (value, first.name) for field, value in first.identity._asdict().items()} if first else {}
        fleets["config"] = self._config, "the router"
        order = sorted(fleets.items(), key=lambda item: item[0] == "weights")  # last: they tell least
        for field, (value, whose) in order:
            if (own := getattr(about.identity, field)) != value:
                raise RequestError(f"{field} = {own!r}: {whose} has {value!r}; all must have the same")
