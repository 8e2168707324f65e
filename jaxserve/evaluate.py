"""A model and its scores on held-out code, in rows of text: for `jaxserve eval`."""

import math
import platform
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jaxserve
from jaxserve import echo
from jaxserve.checkpoints.evaluation.statistics import Estimate
from jaxserve.checkpoints.evaluation.suite import (
    Difference,
    Evaluation,
    Measured,
    chance,
    measure,
    measure_by,
    perplexity,
    score,
)
from jaxserve.checkpoints.evaluation.tasks import Task
from jaxserve.checkpoints.hf import read_json
from jaxserve.checkpoints.hub import TOKENIZER_FILES, locate
from jaxserve.client import Client
from jaxserve.compilation import enable_cache
from jaxserve.layers.config import Config
from jaxserve.llm import check_vocabulary, resolve_dtype
from jaxserve.models import open_checkpoint
from jaxserve.progress import Progress
from jaxserve.tokenizer import Tokenizer

Row = tuple[str, ...]

SCORES = ("", "score", "from", "to", "chance", "items", "modules")
DIFFERENCES = ("", "A", "B", "A - B", "from", "to", "only A", "only B", "p")


def evaluate(
    model: str | None, dtype: str, quantization: str | None, some: Sequence[Task], limit: int | None, progress: Progress
) -> Evaluation:
    """Loads a model and puts tasks to it.

    Raises CheckpointError, ConfigError or RequestError that name what is wrong.
    """
    folder = locate(model)
    raw, tokenizer = read_json(folder), Tokenizer.from_folder(folder)
    kind = resolve_dtype(dtype, raw)
    check_vocabulary(tokenizer, Config.from_hf(raw), folder)
    enable_cache()
    checkpoint = open_checkpoint(folder)
    cfg = checkpoint.cfg
    weights = checkpoint.read(dtype=kind, int8=quantization is not None, progress=partial(progress, "loading"))
    about = {"model": model or "embedded", "dtype": str(kind), "quantization": quantization, **_circumstances(limit)}
    return Evaluation(about, measure(weights, cfg, tokenizer.encode, some, limit, partial(progress, "scoring")))


def evaluate_server(
    client: Client, served: str | None, model: str | None, some: Sequence[Task], limit: int | None, progress: Progress
) -> Evaluation:
    """Puts tasks to the model that a server has by the name `served`, or to its first; `model` has its tokenizer.

    Raises ServerError, or CheckpointError if there is no such tokenizer.
    """
    tokenizer, name = Tokenizer.from_folder(locate(model, TOKENIZER_FILES)), served or client.model()["id"]
    ask = partial(echo.likelihoods, client, name, tokenizer.encode, show=partial(progress, "scoring"))
    about = {"model": name, "url": client.url, "tokenizer": model or "embedded", **_circumstances(limit)}
    return Evaluation(about, measure_by(ask, some, limit))


def _circumstances(limit: int | None) -> dict[str, Any]:
    """What else a score depends on."""
    return {"limit": limit, "python": platform.python_version(), "jaxserve": jaxserve.__version__}


def title(evaluation: Evaluation) -> str:
    """Which model it was, in which dtype or where, on the library of which Python."""
    about = evaluation.about
    rounded = ", matrices in INT8" if about.get("quantization") else ""
    how = f" at {about['url']}" if "url" in about else f", {about.get('dtype')}{rounded}"
    return f"{about.get('model')}{how}, Python {about.get('python')}"


def note(*evaluations: Evaluation) -> str:
    """What the columns are, and the perplexity of a token, by each model's own tokenizer."""
    found = [perplexity(evaluation.tasks) for evaluation in evaluations]
    of_a_token = [f"; of a token it is {' and '.join(f'{one:.3f}' for one in found if one)}"] if all(found) else [""]
    return f"perplexity in bits per byte{of_a_token[0]}; all else in percent; from, to: for 95 %"


def score_rows(evaluation: Evaluation) -> list[Row]:
    """The score of each task, with its interval and what guesses would score."""
    return [_score_row(name, measured) for name, measured in evaluation.tasks.items()]


def difference_rows(one: Evaluation, other: Evaluation, differences: Mapping[str, Difference]) -> list[Row]:
    """The scores of two models, and how far they are apart."""
    return [_difference_row(name, one.tasks[name], other.tasks[name], apart) for name, apart in differences.items()]


def _score_row(name: str, measured: Measured) -> Row:
    guessed, modules = chance(measured), measured.parts.modules
    by_chance = "" if guessed is None else f"{100 * guessed:.0f}"
    return name, *_numbers(score(measured), measured), by_chance, f"{len(modules)}", f"{len(set(modules))}"


def _difference_row(name: str, one: Measured, other: Measured, apart: Difference) -> Row:
    scores = (_numbers(score(each), each)[0] for each in (one, other))
    changed = ("", "", "") if apart.p is None else (f"{apart.gained}", f"{apart.lost}", f"{apart.p:.2g}")
    return name, *scores, *_numbers(apart.by, one, "+"), *changed


def _numbers(found: Estimate, measured: Measured, sign: str = "") -> Row:
    """Bits per byte, or percent; an interval without ends is left out."""
    shown = (f"{one:{sign}.4f}" if measured.scoring == "bits" else f"{100 * one:{sign}.1f}" for one in found)
    return tuple(text if math.isfinite(one) else "" for text, one in zip(shown, found, strict=True))
