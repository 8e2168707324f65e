"""One answer on its way: from whom it is asked next, what, and what of it the client is told.

waiting ── prefill on P ── its pages lie there ── decode on D ── done
   └───────── where nobody computes prompts ──────────┘
   ▲                                               │
   └── P or D is gone, or pages didn't come: what D had said is kept, the rest is asked of others
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from jaxserve.request import Handover, Output, Request, SamplingParams, TokenLogprobs

Stage = Literal["waiting", "prefill", "decode", "done"]


@dataclass(eq=False)
class Job:
    """An answer to a request; times are those of the fleet's clock."""

    request: Request  # the client's, for one answer
    index: int  # which of the answers that the client asked for
    number: int  # in the order of arrival
    came: float
    stage: Stage = "waiting"
    at: str | None = None  # the instance that works on it
    target: str | None = None  # the decode instance that keeps room for it
    task: str = ""  # what it is called there
    said_here: bool = False  # whether that instance has said something of it
    answered: list[int] = field(default_factory=list)  # what the client has been told
    handover: Handover | None = None
    lent: tuple[str, str] | None = None  # the instance where its pages lie to be fetched, and what it was called there
    begun: bool = False  # whether the client has been told anything
    prefilled: bool = False
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    num_cached_tokens: int = 0
    queue_seconds: float | None = None  # from its arrival to when it was first begun
    given: float = 0.0  # when the instance got it
    losses: int = 0  # of its pages on their way
    attempts: int = 0  # that failed
    avoid: str | None = None  # where it failed last
    lost: float | None = None  # since when it waits for another instance to go on

    @property
    def order(self) -> tuple[int, int]:
        """The least comes first."""
        return self.request.priority, self.number

    @property
    def tokens(self) -> int:
        """Of the prompt, and of the answer so far."""
        return len(self.request.prompt_token_ids) + len(self.answered)

    def give(self, stage: Stage, at: str, task: str, now: float) -> Request:
        """It goes to an instance; gives what that is asked."""
        self.stage, self.at, self.task, self.given, self.said_here = stage, at, task, now, False
        if stage == "prefill":
            return self._prefill(task)
        handover, self.handover = self.handover, None
        params = replace(self.request.params, prompt_logprobs=self._prompt_logprobs)
        return replace(self.request, id=task, params=params, answered=tuple(self.answered), handover=handover)

    def has_prefilled(self, output: Output) -> None:
        """Its prompt is computed; where an instance has no pages to give, the next one computes it too."""
        self._note(output)
        self.lent = (self.at, self.task) if self.at and output.handover else None
        self.stage, self.at, self.handover, self.prefilled = "waiting", None, output.handover, True

    def grow(self, output: Output) -> Output:
        """What the client is told of an output of the decode instance."""
        self._note(output)
        self.said_here, self.lost, self.lent = True, None, None
        self.answered += output.token_ids
        told = replace(output, request_id=self.request.id, index=self.index, num_cached_tokens=0, queue_seconds=0.0)
        if not self.begun:
            told = self._first(told)
        if output.finish_reason:
            self.stage, self.at, self.target = "done", None, None
        return told

    def fail(self, now: float, avoid: str | None) -> None:
        """What it had been given to has failed; it waits for another."""
        self.attempts += 1
        self.stage, self.at, self.target, self.handover, self.prefilled = "waiting", None, None, None, False
        self.avoid = avoid or self.avoid
        self.lost = now if self.lost is None else self.lost

    @property
    def _prompt_logprobs(self) -> int | None:
        """How many are still to be reported at each place of the prompt: the first answer's, unless they are known."""
        known = self.begun or self.index > 0 or self.prompt_logprobs is not None
        return None if known else self.request.params.prompt_logprobs

    def _prefill(self, task: str) -> Request:
        """Its pages are wanted; a token comes with them, which nobody needs."""
        params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, prompt_logprobs=self._prompt_logprobs)
        tokens = *self.request.prompt_token_ids, *self.answered
        return replace(self.request, id=task, prompt_token_ids=tokens, prompt=None, params=params, export=True)

    def _note(self, output: Output) -> None:
        """Keeps what the first output that the client gets will say beside its tokens."""
        if self.begun or self.said_here:
            return
        if self.queue_seconds is None:
            self.queue_seconds = self.given - self.came + output.queue_seconds
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        if not self.prefilled:
            self.num_cached_tokens = output.num_cached_tokens

    def _first(self, output: Output) -> Output:
        self.begun = True
        queued = self.queue_seconds or 0.0
        return replace(
            output,
            prompt_logprobs=self.prompt_logprobs,
            num_cached_tokens=self.num_cached_tokens,
            queue_seconds=queued,
        )
