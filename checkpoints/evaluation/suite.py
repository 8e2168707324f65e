"""The tasks put to a model: its scores, kept item by item, so that two models can be compared on the same questions."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxserve.checkpoints.evaluation import statistics, tasks
from jaxserve.checkpoints.evaluation.scoring import Encode, Likelihood, Show, likelihoods
from jaxserve.checkpoints.evaluation.statistics import Estimate, Parts
from jaxserve.checkpoints.evaluation.tasks import TASKS, Item, Scoring, Task
from jaxserve.layers.config import Config
from jaxserve.layers.transformer import Model
from jaxserve.parallel.errors import RequestError


class Measured(NamedTuple):
    """A task under one model."""

    scoring: Scoring
    fingerprint: str  # of the items
    parts: Parts  # of the score: bits and bytes, expected tokens and all, or 1 for right and 1
    log2: Sequence[Sequence[float]]  # of each item's choices


class Difference(NamedTuple):
    """One model's score less another's."""

    by: Estimate
    gained: int | None  # questions that only the one answers right; None for running text
    lost: int | None  # that only the other does
    p: float | None  # McNemar's, of these two


class Evaluation(NamedTuple):
    """The scores of a model."""

    about: Mapping[str, Any]  # how they came about: model, dtype, versions
    tasks: Mapping[str, Measured]


def chosen_tasks(names: Iterable[str] | None = None) -> tuple[Task, ...]:
    """The tasks of these names, all without; RequestError for a name that is none."""
    known = {task.name: task for task in TASKS}
    for name in names or ():
        if name not in known:
            raise RequestError(f"there is no task {name!r}; there are {', '.join(known)}")
    return TASKS if names is None else tuple(known[name] for name in dict.fromkeys(names))


def measure(
    model: Model, cfg: Config, encode: Encode, some: Sequence[Task] = TASKS, limit: int | None = None,
    show: Show = lambda done, total: None,
) -> dict[str, Measured]:  # fmt: skip
    """Puts tasks to a model, or the first `limit` items of each; `show` is told the items done and in all."""
    return measure_by(lambda items: likelihoods(model, cfg, encode, items, show), some, limit)


def measure_by(
    ask: Callable[[Sequence[Item]], Sequence[Sequence[Likelihood]]], some: Sequence[Task] = TASKS,
    limit: int | None = None,
) -> dict[str, Measured]:  # fmt: skip
    """Puts tasks to whatever knows the likelihood of each choice of each item."""
    asked = {task: tasks.items(task)[:limit] for task in some}
    every = list(dict.fromkeys(item for items in asked.values() for item in items))  # two tasks share theirs
    found = dict(zip(every, ask(every), strict=True))
    return {task.name: judge(task.scoring, items, [found[item] for item in items]) for task, items in asked.items()}


def judge(scoring: Scoring, items: Sequence[Item], found: Sequence[Sequence[Likelihood]]) -> Measured:
    """The score of a task whose choices are as probable as was found."""
    pairs = [_part(scoring, item, choices) for item, choices in zip(items, found, strict=True)]
    parts = Parts([item.module for item in items], [value for value, _ in pairs], [weight for _, weight in pairs])
    return Measured(scoring, tasks.fingerprint(items), parts, [[one.log2 for one in choices] for choices in found])


def _part(scoring: Scoring, item: Item, choices: Sequence[Likelihood]) -> tuple[float, float]:
    """What an item adds to its score, and its weight."""
    sizes = [len(choice.encode()) for choice in item.choices]
    if scoring == "bits":
        return -choices[0].log2, float(sizes[0])
    if scoring == "tokens":
        return float(choices[0].expected), float(choices[0].tokens)
    scores = [one.log2 / (size if scoring == "per byte" else 1) for one, size in zip(choices, sizes, strict=True)]
    return float(scores.index(max(scores)) == item.answer), 1.0


def score(measured: Measured) -> Estimate:
    """Bits per byte, or the share that was right."""
    if measured.scoring in ("bits", "tokens"):
        return statistics.ratio(measured.parts)
    return statistics.wilson(int(sum(measured.parts.values)), len(measured.parts.values))


def perplexity(tasks: Mapping[str, Measured]) -> float | None:
    """Of a token of running text, by the model's own tokenizer; None if its tasks were not asked."""
    if not {"perplexity", "next-token"} <= set(tasks):
        return None
    return 2 ** (math.fsum(tasks["perplexity"].parts.values) / math.fsum(tasks["next-token"].parts.weights))


def chance(measured: Measured) -> float | None:
    """The share that guesses would have right; None for running text."""
    if measured.scoring in ("bits", "tokens"):
        return None
    return math.fsum(1 / len(choices) for choices in measured.log2) / len(measured.log2)


def fingerprints(some: Sequence[Task], limit: int | None = None) -> dict[str, str]:
    """What tells the items of tasks from others."""
    return {task.name: tasks.fingerprint(tasks.items(task)[:limit]) for task in some}


def check_items(asked: Mapping[str, str], other: Evaluation) -> None:
    """Raises RequestError if a model had other items than those with these fingerprints."""
    if unlike := sorted(set(asked) ^ set(other.tasks)):
        raise RequestError(f"only one of the two has {', '.join(unlike)}; evaluate both with the same tasks")
    unlike = [name for name, measured in other.tasks.items() if measured.fingerprint != asked[name]]
    if unlike:
        made = ", ".join(f"{key} {other.about[key]}" for key in ("python", "limit") if key in other.about)
        raise RequestError(
            f"{', '.join(unlike)}: {other.about.get('model')} had other items ({made}); "
            "evaluate both with the same Python and the same limit"
        )


def compare(one: Evaluation, other: Evaluation) -> dict[str, Difference]:
    """By how much the one is above the other in each task; RequestError if they had other items."""
    check_items({name: measured.fingerprint for name, measured in one.tasks.items()}, other)
    return {name: difference(measured, other.tasks[name]) for name, measured in one.tasks.items()}


def difference(one: Measured, other: Measured) -> Difference:
    """Of a task under two models."""
    if one.scoring in ("bits", "tokens"):
        return Difference(statistics.ratio_difference(one.parts, other.parts), None, None, None)
    changes = [a - b for a, b in zip(one.parts.values, other.parts.values, strict=True)]
    gained, lost = changes.count(1), changes.count(-1)
    by = statistics.share_difference(one.parts, other.parts)
    return Difference(by, gained, lost, statistics.mcnemar(gained, lost))
