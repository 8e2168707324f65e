"""What a load says of a server: latencies, speed, goodput."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxserve.bench.load import Load, Record
from jaxserve.parallel.errors import RequestError

Row = tuple[str, ...]

NAMES = {
    "ttft": "time to first token",
    "itl": "between chunks",
    "tpot": "per token after the first",
    "e2e": "whole answer",
}
"""Of the latencies, by what they are called in the field."""


class Spread(NamedTuple):
    """How latencies lie, in seconds."""

    mean: float
    p50: float
    p90: float
    p99: float


class Summary(NamedTuple):
    """A load in numbers. Only requests that were answered count, but for the failures."""

    seconds: float
    answered: int
    unfinished: int  # when the load was ended early
    failures: dict[str, int]  # by kind
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    latency: dict[str, Spread | None]  # None: no answer has such a thing
    good: int | None  # answers that meet the goals; None without goals


def latencies(record: Record) -> dict[str, list[float]]:
    """The latencies of an answer in seconds: each gap between chunks, and of the others one, or none."""
    chunks, tokens = record.chunks, record.output_tokens
    return {
        "ttft": [chunks[0] - record.due] if chunks else [],
        "itl": np.diff(chunks).tolist(),
        "tpot": [(chunks[-1] - chunks[0]) / (tokens - 1)] if chunks and tokens > 1 else [],
        "e2e": [record.end - record.due],
    }


def every(records: Iterable[Record]) -> dict[str, list[float]]:
    """The latencies of all answers together."""
    found: dict[str, list[float]] = {name: [] for name in NAMES}
    for record in records:
        for name, values in latencies(record).items():
            found[name] += values
    return found


def spread(values: Sequence[float]) -> Spread | None:
    """The mean and NumPy's percentiles; None of nothing."""
    return Spread(float(np.mean(values)), *np.percentile(values, [50, 90, 99]).tolist()) if len(values) else None


def goals(said: Iterable[str]) -> dict[str, float]:
    """Bounds in seconds of what was said in milliseconds, like `ttft:500`; RequestError for anything else."""
    found = {}
    for one in said:
        parts = re.fullmatch(r"(\w+):(\d+(?:\.\d+)?)", one)
        if not parts or parts[1] not in NAMES:
            raise RequestError(f"--goodput {one}: it must be one of {', '.join(NAMES)} and milliseconds, like ttft:500")
        found[parts[1]] = float(parts[2]) / 1000
    return found


def meets(record: Record, bounds: Mapping[str, float]) -> bool:
    """Whether no latency of an answer is above its bound; of `itl`, no single gap."""
    found = latencies(record)
    return all(value <= bound for name, bound in bounds.items() for value in found[name])


def summarize(load: Load, bounds: Mapping[str, float]) -> Summary:
    """A load in numbers; `bounds` are the goals, in seconds."""
    answered = [record for record in load.records if record.failure is None]
    return Summary(
        seconds=load.seconds,
        answered=len(answered),
        unfinished=load.asked - len(load.records),
        failures=dict(Counter(record.failure for record in load.records if record.failure).most_common()),
        prompt_tokens=sum(record.prompt_tokens for record in answered),
        cached_tokens=sum(record.cached_tokens for record in answered),
        output_tokens=sum(record.output_tokens for record in answered),
        latency={name: spread(values) for name, values in every(answered).items()},
        good=sum(meets(record, bounds) for record in answered) if bounds else None,
    )


LATENCY = ("ms", *Spread._fields)
COUNTS = ("", "in all", "a second")


def latency_rows(summary: Summary) -> list[Row]:
    """In milliseconds."""
    shown = {NAMES[name]: spread for name, spread in summary.latency.items() if spread}
    return [(name, *(f"{1000 * value:,.1f}" for value in spread)) for name, spread in shown.items()]


def count_rows(summary: Summary) -> list[Row]:
    """What was answered, generated and failed; what there is none of is left out."""
    failed = {f"failed: {kind}": count for kind, count in summary.failures.items()}
    counts = {
        "requests answered": summary.answered,
        "that meet the goals": summary.good,
        "prompt tokens": summary.prompt_tokens,
        "of them cached": summary.cached_tokens or None,
        "tokens generated": summary.output_tokens,
    }
    rates = [
        (name, f"{count:,}", f"{count / summary.seconds:,.2f}") for name, count in counts.items() if count is not None
    ]
    lost = failed | ({"not finished": summary.unfinished} if summary.unfinished else {})
    return rates + [(name, f"{count:,}", "") for name, count in lost.items()]


def failures(load: Load) -> list[str]:
    """What a server said to the first failure of each kind."""
    first = {record.failure: record.message for record in reversed(load.records) if record.failure}
    return [f"{kind}: {message}" for kind, message in first.items()]


def as_json(load: Load, summary: Summary, about: Mapping[str, Any]) -> dict[str, Any]:
    """All numbers, in seconds, with every request's."""
    numbers = summary._asdict() | {
        "latency": {name: spread and spread._asdict() for name, spread in summary.latency.items()}
    }
    return {**about, "summary": numbers, "requests": [record._asdict() for record in load.records]}
