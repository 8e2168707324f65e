"""A fleet of engines as one: `Serving`, though it has no weights."""

import copy
import heapq
import logging
import operator
import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Set
from dataclasses import dataclass, field, replace

import numpy as np

from jaxserve.acceptance import Acceptance
from jaxserve.counters import Counters
from jaxserve.fleet.health import Patience
from jaxserve.fleet.instance import Event, Gone, Instance, Refused, Said
from jaxserve.fleet.jobs import Job, Stage
from jaxserve.fleet.members import Members
from jaxserve.fleet.policies import Link, choose_decode, choose_prefill, in_doubt, unreached
from jaxserve.identity import digest
from jaxserve.layers.config import Config
from jaxserve.parallel.errors import QueueFullError, RequestError
from jaxserve.request import Output, Request
from jaxserve.serving import Memory
from jaxserve.tokenizer import Tokenizer

log = logging.getLogger("jaxserve.fleet")

LOSSES = 2
"""Times that a job's pages may be lost on their way; then its prompt is computed where its answer is."""
BRIEF = 0.005
"""Seconds that a step waits for something to come."""


@dataclass(frozen=True, kw_only=True)
class FleetOptions:
    """How a fleet goes about its jobs.

    wait            seconds that a job waits for a decode instance while there is none; then it ends with an error
    attempts        times that a job may fail by no fault of its own
    doubt           seconds for which a link is avoided on which pages did not come
    ahead           jobs that are on their way to a decode instance, as a share of what it holds
    max_num_queued  answers that may be open besides those that decode instances generate at once; None: any number
    patience        when an instance is thought to be lost
    seed            of the seeds of requests that have none
    """

    wait: float = 60.0
    attempts: int = 5
    doubt: float = 60.0
    ahead: float = 1.0
    max_num_queued: int | None = None
    patience: Patience = Patience()
    seed: int = 0


@dataclass
class Span:
    """How long something took, each time."""

    count: int = 0
    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        self.count += 1
        self.seconds += seconds


@dataclass
class Tally:
    """What a fleet counts, besides what its instances do."""

    retries: int = 0  # jobs that were given to another instance
    lost: Counter[str] = field(default_factory=Counter)  # instances, by why: gone, dead, hung
    detection: Span = field(default_factory=Span)  # from the last sign of an instance until it was found lost
    recovery: Span = field(default_factory=Span)  # from then until another has gone on with a job of it
    missed: Counter[Link] = field(default_factory=Counter)  # prompts whose pages did not come, by link
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0


class Fleet:
    """Gives each answer to an instance that computes its prompt, and then to one that goes on from there.

    Nothing in it blocks. What instances say is taken in `step`, so it is always one thread that moves jobs; instances
    may join from any.
    """

    def __init__(
        self, cfg: Config, tokenizer: Tokenizer, max_model_len: int, options: FleetOptions | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):  # fmt: skip
        """Serves the model of this config, once instances have joined."""
        self.options = options or FleetOptions()
        self.max_model_len, self.tally = max_model_len, Tally()
        self.members = Members(digest(cfg), max_model_len, self.options.patience, clock)
        self._acceptance, self._clock = Acceptance(cfg, tokenizer, max_model_len), clock
        self._seeds = np.random.default_rng(self.options.seed)
        self._jobs: dict[str, list[Job]] = {}  # that are not done, by the client's request
        self._tasks: dict[str, tuple[Job, Instance]] = {}  # those at an instance, by what they are called there
        self._waiting: list[tuple[tuple[int, int], Job]] = []  # a heap
        self._arrivals = self._names = 0
        self._missed: dict[Link, float] = {}  # when pages did not come last, unless others have since
        self._own = secrets.token_hex(4)  # an instance may still have tasks of a router that was there before
        self._deserted: float | None = None  # since when there is no decode instance
        self._events: deque[tuple[Instance, Event]] = deque()
        self._come = threading.Condition()
        self._said: list[Output] = []

    # What `Serving` promises.

    @property
    def counters(self) -> Counters:
        stages, tally = self.stages(), self.tally
        return replace(
            self.members.counters(),
            waiting=stages["waiting"],
            running=stages["prefill"] + stages["decode"],
            prompt_tokens=tally.prompt_tokens,
            cached_tokens=tally.cached_tokens,
            generated_tokens=tally.generated_tokens,
        )

    @property
    def memory(self) -> Memory:
        return self.members.memory()

    @property
    def busy(self) -> bool:
        return bool(self._jobs or self._said)

    @property
    def many(self) -> bool:
        return False

    @property
    def ready(self) -> bool:
        """Whether an instance is there that generates answers."""
        return bool(self.members.ready("decode"))

    @property
    def expert_layers(self) -> tuple[int, ...]:
        """None: what experts get is known where they are."""
        return ()

    def expert_load(self) -> np.ndarray:
        return np.zeros((0, 0), np.int64)

    def check(self, request: Request) -> None:
        self._acceptance.check(request)

    def add(self, request: Request) -> None:
        request = copy.deepcopy(request)  # whoever asks may change lists that were given
        request = replace(request, prompt_token_ids=tuple(map(operator.index, request.prompt_token_ids)))
        self.check(request)
        if request.id in self._jobs:
            raise RequestError(f"request id {request.id!r} is taken by a request that is not answered yet")
        self._check_queue(request.params.n)
        self._jobs[request.id] = jobs = self._split(request)
        for job in jobs:
            self._push(job)
        self._dispatch()

    def abort(self, request_id: str) -> None:
        for job in self._jobs.pop(request_id, []):
            self._recall(job)
            job.stage = "done"

    def step(self) -> list[Output]:
        with self._come:
            self._come.wait_for(lambda: self._events or self._said, BRIEF)
        self.look_after()
        while self._events:
            self._take(*self._events.popleft())
        self._dispatch()
        self._expire()
        outputs, self._said = self._said, []
        return outputs

    def recover(self) -> list[Output]:
        open_jobs = [job for jobs in self._jobs.values() for job in jobs]
        for job in open_jobs:
            self._recall(job)
            self._end(job, "the router failed in a step")
        outputs, self._said = self._said, []
        return outputs

    def close(self) -> None:
        """Has no more to do with its instances, which stop what they do for it."""
        for instance in (member.instance for member in self.members):
            if self.members.remove(instance):
                instance.close()

    # Instances. They may join, speak and leave in any thread.

    def join(self, instance: Instance) -> None:
        """Adds an instance. Raises RequestError that names the field if it doesn't fit the others."""
        self.look_after()  # one that is lost may come back under its name
        self.members.join(instance, lambda event: self._hear(instance, event))
        log.info("%s has joined, for %s", instance.about.name, instance.about.role)

    def stages(self) -> Counter[Stage]:
        """How many jobs there are in each."""
        return Counter(job.stage for jobs in list(self._jobs.values()) for job in list(jobs))

    def look_after(self) -> None:
        """Parts with those of which nothing more is to be expected. Any thread may."""
        for instance, health, reason in self.members.troubled():
            self._part(instance, health, reason)

    def _hear(self, instance: Instance, event: Event) -> None:
        if isinstance(event, Gone):
            self._part(instance, "gone", event.reason)
            return
        with self._come:
            self._events.append((instance, event))
            self._come.notify()

    def _part(self, instance: Instance, why: str, reason: str) -> None:
        """An instance has left, or is lost: nothing more goes to it; its jobs are moved in the next step."""
        if not self.members.remove(instance):
            return
        instance.close()
        left = why == "gone" and instance.draining
        if left:
            log.info("%s has left", instance.about.name)
        else:
            log.warning("%s is lost: %s", instance.about.name, reason)
        if not self.ready:
            log.warning("there is no instance that generates answers; those that are asked for wait for one")
        with self._come:
            if not left:
                self.tally.lost[why] += 1
                self.tally.detection.add(max(0.0, self._clock() - instance.signs.at))
            self._events.append((instance, Gone(reason)))
            self._come.notify()

    # What they have said.

    def _take(self, instance: Instance, event: Event) -> None:
        """Does what follows from it."""
        name = instance.about.name
        match event:
            case Said():
                for output in event.outputs:
                    if job := self._job(output.request_id, instance):
                        self._hear_of(job, name, output, event.good)
            case Refused():
                if job := self._job(event.task, instance):
                    self._end(job, f"{name} refuses it: {event.reason}")
            case Gone():
                self._missed = {link: at for link, at in self._missed.items() if name not in link}
                for job in [job for job, its in self._tasks.values() if its is instance]:
                    self._again(job, f"{name} was lost: {event.reason}", avoid=name)
                if not instance.draining:  # who drains leaves when its pages are taken
                    self._lose_pages(name, event.reason)

    def _lose_pages(self, name: str, reason: str) -> None:
        """Has jobs begin again whose pages lie at an instance that is lost: nobody is to wait for a link's patience."""
        for job in [job for jobs in self._jobs.values() for job in jobs if job.lent and job.lent[0] == name]:
            if job.stage == "waiting":
                job.lent, job.handover, job.prefilled = None, None, False
            else:
                self._recall(job)
                self._again(job, f"{name}, which had its pages, was lost: {reason}", avoid=name)

    def _job(self, task: str, instance: Instance) -> Job | None:
        """The job of a task, if it is still that instance's."""
        job, its = self._tasks.get(task, (None, None))
        return job if its is instance else None

    # Jobs.

    def _split(self, request: Request) -> list[Job]:
        """A job for each answer. Each has a seed of its own: whoever goes on with it must draw the same."""
        p, now = request.params, self._clock()
        seed = p.seed if p.seed is not None else int(self._seeds.integers(2**32))
        jobs = []
        for index in range(p.n):
            own = replace(request, params=replace(p, n=1, seed=(seed + index) % 2**32))
            jobs.append(Job(own, index, self._arrivals + index, now))
        self._arrivals += p.n
        return jobs

    def _check_queue(self, count: int) -> None:
        places, open_jobs = self.options.max_num_queued, sum(map(len, self._jobs.values()))
        if places is None:
            return
        slots = sum(instance.about.slots for instance in self.members.ready("decode"))
        if open_jobs + count > places + slots:
            raise QueueFullError(
                f"the queue is full: {open_jobs} answers are open, of {places} that may wait besides {slots} that "
                f"can run; {count} needed; try again later"
            )

    def _push(self, job: Job) -> None:
        heapq.heappush(self._waiting, (job.order, job))

    def _dispatch(self) -> None:
        """Gives away what waits, in order, until there is no room for the first."""
        while self._waiting:
            job = self._waiting[0][1]
            if job.stage == "waiting" and not self._place(job):
                return
            heapq.heappop(self._waiting)

    def _place(self, job: Job) -> bool:
        """Gives a job to an instance; whether there is one that has room."""
        others = [other for jobs in self._jobs.values() for other in jobs if other is not job]
        alone = job.prefilled or job.losses >= LOSSES
        prefills = [] if alone else self.members.prefill_loads(others)
        doubts = in_doubt(self._missed, self._clock(), self.options.doubt)
        if not self.members.usable(job.target):
            sources = [job.lent[0]] if job.lent else [load.name for load in prefills]
            job.target = self._choose_target(job, others, doubts, sources)
        if job.target is None:
            return False
        near = [load for load in prefills if (load.name, job.target) not in doubts]
        where = choose_prefill(near, job.tokens, self.members.doubtful() | {job.avoid})
        stage, name = ("prefill", where) if where else ("decode", job.target)
        instance = self.members.get(name)
        if instance is None:
            return False
        self._names += 1
        task = f"{self._own}-{self._names}"
        self._tasks[task] = job, instance
        instance.add(job.give(stage, name, task, self._clock()))
        return True

    def _choose_target(self, job: Job, others: list[Job], doubts: Set[Link], sources: list[str]) -> str | None:
        """The decode instance that is to have a job, whose pages come from one of the sources."""
        loads = self.members.decode_loads(others)
        far = unreached(doubts, sources, [load.name for load in loads])
        avoid = far | self.members.doubtful() | {job.avoid}
        return choose_decode(loads, job.tokens, self.options.ahead, avoid)

    def _hear_of(self, job: Job, name: str, output: Output, good: bool) -> None:
        """Moves a job on by an output of the instance that works on it."""
        no_fault = job.stage == "prefill" or output.lost or not good
        job.losses += output.lost
        if output.finish_reason == "error" and no_fault:
            avoid = self._miss(job, name, output) if output.lost else name
            self._again(job, f"{name}: {output.error}", avoid)
        elif job.stage == "decode":
            self._tell(job, output)
        elif output.finish_reason:
            del self._tasks[job.task]
            job.has_prefilled(output)
            if not self._place(job):
                self._push(job)

    def _miss(self, job: Job, name: str, output: Output) -> str | None:
        """Notes that a job's pages did not come to an instance; gives from where."""
        if job.lent is None:
            return None
        lender, _ = job.lent
        self.tally.missed[lender, name] += 1
        self._missed[lender, name] = self._clock()
        log.warning("pages did not come from %s to %s: %s", lender, name, output.error)
        return lender

    def _tell(self, job: Job, output: Output) -> None:
        """Tells the client."""
        begun, lost, tally = job.begun, job.lost, self.tally
        if job.lent and job.at and output.token_ids:  # its pages have come
            self._missed.pop((job.lent[0], job.at), None)
        told = job.grow(output)
        if not begun:
            tally.prompt_tokens += len(job.request.prompt_token_ids)
            tally.cached_tokens += told.num_cached_tokens
        if lost is not None:
            tally.recovery.add(self._clock() - lost)
        tally.generated_tokens += len(told.token_ids)
        self._said.append(told)
        if job.stage == "done":
            self._tasks.pop(job.task, None)
            self._forget(job)

    def _again(self, job: Job, cause: str, avoid: str | None) -> None:
        """Asks another instance, unless it has been tried too often."""
        self._tasks.pop(job.task, None)
        self._withdraw(job)
        job.fail(self._clock(), avoid)
        if job.attempts >= self.options.attempts:
            self._end(job, f"given up after {job.attempts} attempts; at the last, {cause}")
            return
        self.tally.retries += 1
        self._push(job)

    def _end(self, job: Job, error: str) -> None:
        job.lost = None
        self._withdraw(job)
        self._tell(job, Output(job.task, finish_reason="error", error=error))

    def _forget(self, job: Job) -> None:
        jobs = self._jobs[job.request.id]
        jobs.remove(job)
        if not jobs:
            del self._jobs[job.request.id]

    def _recall(self, job: Job) -> None:
        """Tells the instances that work on a job, or have its pages, that nobody wants it."""
        _, instance = self._tasks.pop(job.task, (None, None))
        if instance:
            instance.abort(job.task)
        self._withdraw(job)

    def _withdraw(self, job: Job) -> None:
        """Tells the instance where a job's pages may still lie that nobody will fetch them."""
        (where, task), job.lent = job.lent or ("", ""), None
        if instance := self.members.get(where):
            instance.abort(task)

    def _expire(self) -> None:
        """Ends what has waited too long for somebody to come."""
        if self.ready:
            self._deserted = None
            return
        now, wait = self._clock(), self.options.wait
        self._deserted = now if self._deserted is None else self._deserted
        for job in [job for _, job in self._waiting if job.stage == "waiting"]:
            if now - max(job.came, self._deserted) > wait:
                self._end(job, f"no decode instance has come within {wait:g} s; start one")
