"""Instances that do what a test tells them, and what a model of theirs would say."""

import time
import zlib
from collections.abc import Callable, Sequence

from jaxserve.counters import Counters
from jaxserve.fleet.fleet import Fleet, FleetOptions
from jaxserve.fleet.instance import About, Event, Gone, Refused, Role, Said, Signs
from jaxserve.identity import Identity, digest
from jaxserve.request import Handover, Logprob, Output, Request, SamplingParams
from jaxserve.serving import Memory
from tests.jaxserve.conftest import loaded, word_tokenizer

LENGTH = 128
PAGE = 16


def identity() -> Identity:
    return Identity(digest(loaded("deepseek_v3")[0]), 1, "00", "float32", "auto", PAGE, True)


def about(name: str, role: Role, **other) -> About:
    given = {"identity": identity(), "max_model_len": LENGTH, "capacity": 64 * PAGE, "slots": 4} | other
    return About(name, role, **given)


def make_fleet(clock: Callable[[], float] = time.monotonic, **options) -> Fleet:
    cfg = loaded("deepseek_v3")[0]
    return Fleet(cfg, word_tokenizer(cfg.vocab_size), LENGTH, FleetOptions(**options), clock)


def said(prompt: Sequence[int], seed: int | None, count: int) -> tuple[int, ...]:
    """What the model says to a prompt: at each place, a token of the prompt, the seed and the place."""
    return tuple(zlib.crc32(repr((tuple(prompt), seed, place)).encode()) % 97 for place in range(count))


def prompt_logprobs(prompt: Sequence[int]) -> tuple[dict[int, Logprob] | None, ...]:
    return (None, *({token: Logprob(-1.0, 1, f"t{token}")} for token in prompt[1:]))


def asked(id: str, prompt: Sequence[int], count: int = 4, **params) -> Request:
    return Request(id, tuple(prompt), SamplingParams(max_tokens=count, ignore_eos=True, **params))


class Fake:
    """An instance that says something when it is told to; `offers` are the pages that lie somewhere to be taken."""

    def __init__(self, name: str, role: Role, offers: set[str], clock: Callable[[], float], **other):
        self.about, self.draining, self.closed, self.silent = about(name, role, **other), False, False, False
        self.tasks: dict[str, Request] = {}
        self.places: dict[str, int] = {}
        self.given: list[Request] = []
        self.beat = self.pages = 0
        self._offers, self._clock, self._at = offers, clock, clock()

    def begin(self, hear: Callable[[Event], object]) -> None:
        self.hear = hear

    @property
    def signs(self) -> Signs:
        if not self.silent:
            self._at = self._clock()
        counters = Counters(pages_used=self.pages, pages=64, page_size=PAGE, slots=self.about.slots)
        return Signs(self.beat, bool(self.tasks), counters, Memory(1, 2), self._at)

    def add(self, request: Request) -> None:
        assert request.params.n == 1 and request.id not in self.tasks
        self.given.append(request)
        self.tasks[request.id] = request

    def abort(self, task: str) -> None:
        self.tasks.pop(task, None)
        self._offers.discard(self._offer(task))

    def close(self) -> None:
        """What it still offers, nobody will fetch; it notices that its router is gone."""
        self.closed = True
        self._offers -= {name for name in self._offers if name.startswith(self._offer(""))}

    # What a test tells it.

    def work(self, count: int = 1) -> None:
        """Goes on with each of its tasks, by so many tokens."""
        self.beat += 1
        for task in list(self.tasks):
            self.go_on(task, count)

    def go_on(self, task: str, count: int = 1) -> None:
        request = self.tasks[task]
        output = self._prefill(request) if self.about.role == "prefill" else self._decode(request, count)
        if output.finish_reason:
            del self.tasks[task]
            self.places.pop(task, None)
        self.hear(Said([output]))

    def fail(self) -> None:
        """A step fails, and the engine recovers: what ran is lost."""
        outputs = [Output(task, text="held", finish_reason="error", error="a step failed") for task in self.tasks]
        self.tasks.clear()
        self.hear(Said(outputs, good=False))

    def refuse(self, task: str) -> None:
        del self.tasks[task]
        self.hear(Refused(task, "not so"))

    def die(self) -> None:
        self.hear(Gone("killed"))

    def _prefill(self, request: Request) -> Output:
        assert request.export and request.params.max_tokens == 1
        name = self._offer(request.id)
        if not self.closed:
            self._offers.add(name)
        handover = Handover("host", 1, name, len(request.prompt_token_ids) + len(request.answered))
        return Output(
            request.id, token_ids=(0,), finish_reason="length", handover=handover, num_cached_tokens=1,
            queue_seconds=0.5, prompt_logprobs=self._known(request),
        )  # fmt: skip

    def _decode(self, request: Request, count: int) -> Output:
        assert not request.export
        began = request.id in self.places
        if not began and request.handover:
            if request.handover.name not in self._offers:
                return Output(request.id, finish_reason="error", error="the pages did not come", lost=True)
            self._offers.remove(request.handover.name)
        place, p = self.places.get(request.id, len(request.answered)), request.params
        answer = said(request.prompt_token_ids, p.seed, p.max_tokens or 0)
        assert answer[: len(request.answered)] == request.answered
        tokens = answer[place : place + count]
        self.places[request.id] = place + len(tokens)
        reason = "length" if place + len(tokens) == p.max_tokens else None
        known = None if began else self._known(request)
        text = "".join(f"{token} " for token in tokens)
        return Output(request.id, text=text, token_ids=tokens, finish_reason=reason, prompt_logprobs=known)

    def _offer(self, task: str) -> str:
        return f"{self.about.name}/{task}"

    def _known(self, request: Request):
        wanted = request.params.prompt_logprobs is not None
        return prompt_logprobs(request.prompt_token_ids) if wanted else None


class Clock:
    """Time that goes on when a test says so."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now
