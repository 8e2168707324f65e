"""The answers that are not complete: how they begin, grow by what steps give, and end."""

import time
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from jaxserve.arrivals import Arrival
from jaxserve.completion import Completion
from jaxserve.counters import Counters
from jaxserve.guidance import Guide, Guides
from jaxserve.layers.sampling import Logprobs
from jaxserve.packing import Spot
from jaxserve.parallel.errors import RequestError
from jaxserve.ranked import Ranked
from jaxserve.reading import Reading, Row
from jaxserve.request import Logprob, Output, Request, TokenLogprobs
from jaxserve.scheduler import Sequence
from jaxserve.slots import NONE_ALLOWED, NOT_FINITE
from jaxserve.tokenizer import Tokenizer

FAULTS = {
    NOT_FINITE: "the model's scores are not finite; its weights may be damaged",
    NONE_ALLOWED: "no token is allowed here: allowed_token_ids, bad_words, min_tokens, structured_outputs exclude all",
}


class Answer(NamedTuple):
    """What the engine keeps of a sequence, beside what the scheduler does."""

    sequence: Sequence
    completion: Completion
    guide: Guide | None
    known: list[TokenLogprobs | None]  # of the prompt's tokens, as far as they have come
    came: float  # when it was asked for


class Answers:
    """Those of all requests; each has a sequence on one of the `ranks`, and leaves it when it ends."""

    def __init__(
        self, *, ranks: Ranked, tokenizer: Tokenizer, eos_ids: frozenset[int], guides: Guides, counters: Counters,
        longest: int, seeds: np.random.Generator, keep: Callable[[Sequence, Output], None],
    ):  # fmt: skip
        """`longest` are the tokens of a prompt and its answer; `seeds` are for requests that have none.

        `keep` is told of a sequence when its prompt is computed and when its answer ends, while it has its pages; and
        what will be said of it then.
        """
        self._ranks, self._tokenizer, self._guides, self._counters = ranks, tokenizer, guides, counters
        self._eos_ids, self._longest, self._seeds, self._keep = eos_ids, longest, seeds, keep
        self._open: dict[str, dict[int, Answer]] = {}
        self._arrivals = 0

    def __len__(self) -> int:
        """Requests that are not answered."""
        return len(self._open)

    def open(self, request: Request, bring: Callable[[Sequence], Arrival | None]) -> None:
        """Queues the answers to a request. Raises RequestError if its id is taken, or there is no room.

        They can begin when the pages are there that are brought for the first of them.
        """
        if request.id in self._open:
            raise RequestError(f"request id {request.id!r} is taken by a request that is not answered yet")
        self._ranks.check(request.params.n)
        answers = [self._new(request, index) for index in range(request.params.n)]
        self._open[request.id] = {answer.sequence.index: answer for answer in answers}
        coming = bring(answers[0].sequence)
        for answer in answers:
            answer.sequence.coming = coming
            self._ranks.add(answer.sequence)

    def abort(self, request_id: str) -> None:
        """Ends what is left of a request."""
        for answer in self._open.pop(request_id, {}).values():
            if answer.sequence.coming:
                answer.sequence.coming.cancel()
            self._ranks.finish(answer.sequence)

    def lose(self, kept: Set[Sequence], error: str) -> Iterator[Output]:
        """Ends all answers but some, with what they had said so far; nobody has their sequences any more."""
        for answer in [answer for answers in self._open.values() for answer in answers.values()]:
            s, completion = answer.sequence, answer.completion
            if s not in kept:
                self._drop(answer)
                yield Output(s.request.id, s.index, completion.rest(), finish_reason="error", error=error)

    def miss(self, s: Sequence, error: str) -> Output:
        """Ends an answer that can't begin, because pages that it needs did not come."""
        self._finish(self._of(s))
        return Output(s.request.id, s.index, finish_reason="error", error=error, lost=True)

    def begin(self, s: Sequence) -> None:
        """Notes that a sequence got a slot."""
        s.queue_seconds = s.queue_seconds or time.perf_counter() - self._of(s).came

    def guides(self, sequences: Iterable[Sequence]) -> dict[Sequence, Guide]:
        """Of those whose next tokens the host decides."""
        found = ((s, self._of(s).guide) for s in sequences if s.by_host)
        return {s: guide for s, guide in found if guide is not None}

    def grow(self, rows: Iterable[Row], found: Reading) -> Iterator[Output]:
        """Adds to each answer what a step chose for it, if it still counts."""
        for s, epoch, row in rows:
            if s.epoch != epoch:
                continue
            answer, said, wanted = self._of(s), found.row(row), s.request.params.logprobs
            scores = []
            if wanted is not None:
                pairs = zip(said.at, said.tokens, strict=True)
                scores = [self._logprobs(found.report, at, token, wanted) for at, token in pairs]
            self._ranks[s.rank].landed(s, found.rounds)
            output = self._extend(answer, said.tokens, scores, said.guesses, bool(said.fault))
            if said.fault and not output.finish_reason:  # what stands after an answer's end is nobody's fault
                output = self._fail(answer, said.fault, output)
            yield output
            if found.rounds is not None:
                self._count_guesses(said.at[: len(output.token_ids)], found)

    def _extend(
        self, answer: Answer, tokens: list[int], found: list[TokenLogprobs], guesses: list[int], faulty: bool
    ) -> Output:
        s, completion, guide, known, _ = answer
        if guide is not None:
            tokens = tokens[: guide.push(tokens)]
            guide.guesses = guesses
        begins = completion.count == len(s.request.answered)
        output = completion.push(tokens, found, over=guide is not None and guide.over)
        self._counters.generated_tokens += len(output.token_ids)
        self._ranks[s.rank].update(s, output.token_ids)
        if begins:
            scores = (None, *known) if s.whole else None
            output = replace(output, prompt_logprobs=scores, num_cached_tokens=s.hit, queue_seconds=s.queue_seconds)
            s.whole = False
        if not faulty and (begins or output.finish_reason):
            self._keep(s, output)
        if output.finish_reason:
            self._finish(answer)
        return output

    def _fail(self, answer: Answer, fault: int, output: Output) -> Output:
        """Ends an answer with what it had said so far."""
        if fault == NOT_FINITE:
            self._ranks[answer.sequence.rank].pool.retract(answer.sequence.pages)
        self._finish(answer)
        text = output.text + answer.completion.rest()
        return replace(output, text=text, finish_reason="error", error=FAULTS[fault])

    def _finish(self, answer: Answer) -> None:
        self._ranks.finish(answer.sequence)
        self._drop(answer)

    def _drop(self, answer: Answer) -> None:
        s = answer.sequence
        answers = self._open[s.request.id]
        del answers[s.index]
        if not answers:
            del self._open[s.request.id]

    def note_known(self, spots: Iterable[Spot], report: Logprobs) -> None:
        """Notes how probable the tokens of prompts were, of those chunks that this process has asked for."""
        for piece, begin, *_ in spots:
            s = piece.sequence
            if s is None or not s.whole or s.epoch != piece.epoch or s.request.params.prompt_logprobs is None:
                continue
            notes, wanted = self._of(s).known, s.request.params.prompt_logprobs
            del notes[piece.start :]  # of a run that was preempted
            for place in range(piece.start, min(piece.start + piece.size, s.num_prompt - 1)):
                notes.append(self._logprobs(report, (begin + place - piece.start,), s.tokens[place + 1], wanted))

    def _logprobs(self, report: Logprobs, at: tuple[int, ...], token: int, wanted: int) -> TokenLogprobs:
        """Of the token at a place, and of so many most probable ones there."""
        chosen, rank, top, ids = (column[at] for column in report)
        found = {token: (float(chosen), int(rank))}
        for place, (other, value) in enumerate(zip(ids[:wanted], top, strict=False), start=1):
            found.setdefault(int(other), (float(value), place))
        return {t: Logprob(value, place, self._tokenizer.decode([t], False)) for t, (value, place) in found.items()}

    def _count_guesses(self, kept: list[tuple[int, int, int]], found: Reading) -> None:
        """Counts the tokens of an answer by where in the step they stood: the first of a round is the model's own."""
        for turn, _, place in kept:
            if place:
                self._counters.accepted[place - 1] += 1
            else:
                self._counters.decoded_rows += 1
                self._counters.wide_rows += int(found.wide[turn])

    def _of(self, s: Sequence) -> Answer:
        return self._open[s.request.id][s.index]

    def _new(self, request: Request, index: int) -> Answer:
        p, prompt = request.params, request.prompt_token_ids
        limit = min(self._longest, len(prompt) + (p.max_tokens or self._longest))
        seed = p.seed if p.seed is not None else int(self._seeds.integers(2**32))
        guide = self._guides.make(p)
        completion = Completion(
            request, index, self._tokenizer.stream(p.skip_special_tokens), self._eos_ids, limit - len(prompt)
        )
        _replay(request, completion, guide)
        sequence = Sequence(
            request=request,
            index=index,
            seed=(seed + index) % 2**32,
            limit=limit,
            arrival=self._arrivals,
            tokens=[*prompt, *request.answered],
            root=self._ranks[0].pool.root(request.cache_salt),
            by_host=guide is not None,
            whole=p.prompt_logprobs is not None and index == 0,
        )
        self._arrivals += 1
        return Answer(sequence, completion, guide, [], time.perf_counter())


def _replay(request: Request, completion: Completion, guide: Guide | None) -> None:
    """Has an answer begin as another engine has begun it. Raises RequestError if nothing can follow that."""
    said = list(request.answered)
    fits = guide is None or not said or (guide.push(said) == len(said) and not guide.over)
    if not fits or completion.push(said).finish_reason:
        raise RequestError(f"answered has {len(said)} tokens after which the answer is complete, or that it can't have")
