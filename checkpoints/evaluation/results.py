"""Results as JSON: what a model scored, and each item of it, so that others can be compared with it later."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxserve.checkpoints.evaluation.statistics import Estimate, Parts
from jaxserve.checkpoints.evaluation.suite import Difference, Evaluation, Measured, chance, score
from jaxserve.parallel.errors import CheckpointError


def as_json(evaluation: Evaluation) -> dict[str, Any]:
    """Scores with their intervals, without the items."""
    return {**evaluation.about, "tasks": {name: _summary(one) for name, one in evaluation.tasks.items()}}


def differences_as_json(differences: Mapping[str, Difference]) -> dict[str, Any]:
    """Differences with their intervals."""
    return {name: {**each._asdict(), "by": _estimate(each.by)} for name, each in differences.items()}


def save(path: Path, evaluation: Evaluation) -> None:
    """Writes scores and items."""
    content = as_json(evaluation)
    for name, measured in evaluation.tasks.items():
        columns = zip(*measured.parts, measured.log2, strict=True)
        content["tasks"][name]["items"] = [dict(zip(_COLUMNS, row, strict=True)) for row in columns]
    path.write_text(json.dumps(content, indent=1) + "\n")


def read(path: Path) -> Evaluation:
    """What `save` wrote; CheckpointError if it is something else."""
    try:
        content = json.loads(path.read_text())
        found = content.pop("tasks")
        return Evaluation(content, {name: _measured(task) for name, task in found.items()})
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} holds no results ({type(error).__name__}: {error}); name a file that --out wrote"
        ) from None


_COLUMNS = ("module", "value", "weight", "log2")


def _summary(measured: Measured) -> dict[str, Any]:
    modules = measured.parts.modules
    return {
        "scoring": measured.scoring,
        "score": _estimate(score(measured)),
        "chance": chance(measured),
        "count": len(modules),
        "modules": len(set(modules)),
        "fingerprint": measured.fingerprint,
    }


def _measured(task: Mapping[str, Any]) -> Measured:
    modules, values, weights, log2 = ([item[column] for item in task["items"]] for column in _COLUMNS)
    return Measured(task["scoring"], task["fingerprint"], Parts(modules, values, weights), log2)


def _estimate(given: Estimate) -> dict[str, float | None]:
    """JSON has no infinity: an interval of all numbers has no ends."""
    return {name: number if math.isfinite(number) else None for name, number in given._asdict().items()}
