"""What INT8 costs the embedded model, and a twin with outlier channels: with each part of calibration, and with all.

`python -m benchmarks.quantization` prints the tables of docs/quantization.md. The twin is the same function in float:
a few channels of what enters its matrices are 30 to 100 times as large, and the weights that read them as much smaller.
"""

import json
import math
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import typer
from rich.console import Console
from tokenizers import Tokenizer

from jaxserve.checkpoints import hf
from jaxserve.checkpoints.calibrate import calibrate_model, calibration_text
from jaxserve.checkpoints.embedded import corpus
from jaxserve.checkpoints.evaluation import statistics
from jaxserve.checkpoints.evaluation.suite import Measured, chosen_tasks, difference, measure, perplexity, score
from jaxserve.checkpoints.folding import pairs, rescale
from jaxserve.checkpoints.hub import EMBEDDED
from jaxserve.checkpoints.matrices import BLOCKS, inputs, matrices, sample, with_matrices
from jaxserve.checkpoints.quantize import ROWS, Parts, Study
from jaxserve.checkpoints.rounding import share_lost
from jaxserve.layers.batch import whole
from jaxserve.layers.config import Config
from jaxserve.layers.linear import einsum
from jaxserve.layers.transformer import Layer, Model, cache_params, forward, logits
from jaxserve.parallel.qarray import QArray, quantize
from jaxserve.parallel.sharding import zeros

SEQUENCES, LENGTH = 16, 256  # of the text that is calibrated with, and of that on which distributions are compared
PLANTED = 4  # channels of each norm

NONE = Parts(*(False,) * len(Parts._fields))
FORMS: dict[str, Parts | None] = {
    "float32": None,
    "one scale a matrix": None,
    "INT8, rounded plainly": NONE,
    **{f"with {part}": NONE._replace(**{part: True}) for part in Parts._fields},
    "INT8, all parts": Parts(),
}


class Cost(NamedTuple):
    """What a form of a model costs."""

    lost: float  # of the blocks' outputs, on average
    divergence: float  # of the next token's distribution from float's, in nats
    tasks: dict[str, Measured]


def plant(model: Model) -> Model:
    """The same function with outliers."""
    rng = np.random.default_rng(0)

    def layer(p: Layer) -> Layer:
        for pair in (pair for block in BLOCKS for pair in pairs(p, block) if pair.is_gain):
            width = matrices(p, pair.readers[0].partition(".")[0])[pair.readers[0]].shape[2]
            scale = np.ones((1, width), np.float32)
            scale[0, rng.choice(width, PLANTED, replace=False)] = 1 / rng.uniform(30, 100, PLANTED)
            p = rescale(p, pair, jnp.asarray(scale))
        return p

    mtp = tuple(each._replace(layer=layer(each.layer)) for each in model.mtp)
    return model._replace(layers=tuple(map(layer, model.layers)), mtp=mtp)


def form(name: str, model: Model, cfg: Config, tokens: np.ndarray) -> tuple[Model, float]:
    """A form of a model, and what its blocks lose on the text."""
    if name == "float32":
        return model, 0.0
    if name == "one scale a matrix":
        return per_matrix(model, cfg, tokens)
    parts = FORMS[name]
    assert parts is not None
    made, reports = calibrate_model(model, cfg, tokens, parts)
    return made, float(np.mean([steps[-1].lost for report in reports for steps in report.steps.values()]))


def per_matrix(model: Model, cfg: Config, tokens: np.ndarray) -> tuple[Model, float]:
    """Weights with a single scale for each matrix; activations have one a token."""
    layers, lost = [], []
    for p, found in samples(model, cfg, tokens):
        for block in BLOCKS:
            codes = {name: spread_scale(quantize(w, (1, 2))) for name, w in matrices(p, block).items()}
            lost.append(Study(block, found, cfg).made(p, codes).lost)
            p = with_matrices(p, codes)
        layers.append(p)
    return model._replace(layers=tuple(layers)), float(np.mean(lost))


def spread_scale(w: QArray) -> QArray:
    """A scale for all outputs as one of each."""
    return QArray(w.codes, jnp.broadcast_to(w.scale, (*w.codes.shape[:2], 1)))


def samples(model: Model, cfg: Config, tokens: np.ndarray) -> Iterator[tuple[Layer, Any]]:
    """Each layer, and the text that passed through it."""
    batch = whole(jnp.asarray(tokens[:, :-1]))
    cache = zeros(cache_params(cfg, tokens.shape[0], tokens.shape[1] - 1)[0])
    states_td = model.embed[batch.tokens_t]
    for p in model.layers:
        found = sample(p, states_td, batch, cache, cfg)
        yield p, found
        states_td = found.after_td


def granularity(model: Model, cfg: Config, tokens: np.ndarray) -> dict[tuple[str, str], float]:
    """What products lose, on average, by how many values share a scale: of weights, and of activations."""
    found: dict[tuple[str, str], list[float]] = {}
    for p, passed in samples(model, cfg, tokens):
        for block in BLOCKS:
            entering = inputs(p, block, passed, cfg, ROWS)
            for name, w in matrices(p, block).items():
                exact = jnp.einsum("etd,efd->etf", entering[name], w)
                for weights, w_axes in (("channel", (2,)), ("matrix", (1, 2))):
                    for tokens_, x_axes in (("token", (2,)), ("batch", (1, 2))):
                        codes, x = quantize(w, w_axes), quantize(entering[name], x_axes)
                        lost = share_lost(exact, einsum("etd,efd->etf", x, codes, jnp.float32)).mean()
                        found.setdefault((weights, tokens_), []).append(float(lost))
    return {key: float(np.mean(each)) for key, each in found.items()}


@partial(jax.jit, static_argnames="cfg")
def log_probabilities(model: Model, tokens_st: jax.Array, cfg: Config) -> jax.Array:
    """Of each next token, for whole sequences."""
    s, t = tokens_st.shape
    out = forward(model, whole(tokens_st), zeros(cache_params(cfg, s, t)), cfg)
    return jax.nn.log_softmax(logits(model, out.hidden_td))


def divergence(exact: Model, found: Model, cfg: Config, tokens: np.ndarray) -> float:
    """The mean Kullback-Leibler divergence of the one's distributions from the other's, in nats."""
    sums = []
    for i in range(0, len(tokens), 4):
        p, q = (log_probabilities(model, jnp.asarray(tokens[i : i + 4, :-1]), cfg) for model in (exact, found))
        sums.append(float((jnp.exp(p) * (p - q)).sum(-1).mean()))
    return float(np.mean(sums))


def rows(costs: dict[str, Cost]) -> Iterator[list[str]]:
    """The table of a model, a row for each form."""
    exact = costs["float32"].tasks
    start = perplexity(exact) or math.nan
    for name, cost in costs.items():
        known = perplexity(cost.tasks) or math.nan
        shares = {task: each for task, each in cost.tasks.items() if each.scoring != "bits"}
        drops = {task: -difference(each, exact[task]).by.value for task, each in shares.items()}
        worst = max(drops, key=lambda task: drops[task])
        beyond = [task for task, drop in drops.items() if drop > half_width(exact[task])]
        mean = float(np.mean([score(each).value for each in shares.values()]))
        yield [
            name, f"{cost.lost:.2e}", f"{cost.divergence:.2e}", f"{known:.3f}", f"{100 * (known / start - 1):+.2f} %",
            f"{100 * mean:.2f} %", f"{-100 * drops[worst]:+.1f} ({worst})" if drops[worst] > 0 else "none",
            ", ".join(beyond) or "none",
        ]  # fmt: skip


def half_width(measured: Measured) -> float:
    """Of the interval of a score."""
    found = score(measured)
    return (found.high - found.low) / 2


HEAD = (
    "form", "lost of a block's output", "divergence, nats", "perplexity", "of float", "mean of tasks",
    "largest drop, points", "drops beyond the interval",
)  # fmt: skip


def main(
    limit: Annotated[int | None, typer.Option(help="Items of each task; without it, all.")] = None,
    keep: Annotated[Path | None, typer.Option(help="A folder for what is done, to go on from after a stop.")] = None,
) -> None:
    """Prints what INT8 costs, as Markdown."""
    notes = Console(stderr=True)
    cfg, model = hf.load(EMBEDDED)
    tokenizer = Tokenizer.from_file(str(EMBEDDED / "tokenizer.json"))
    _, held_out = corpus.split(corpus.modules())
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids  # noqa: E731
    tokens = calibration_text(encode, SEQUENCES, LENGTH)
    unseen = calibration_text(encode, SEQUENCES, LENGTH, [module.text for module in held_out])
    for title, subject in {"The embedded model": model, "Its twin with outliers": plant(model)}.items():
        costs = {}
        for name in FORMS:
            notes.print(f"{title}: {name}")
            costs[name] = cost(title, name, subject, cfg, tokenizer, tokens, unseen, limit, keep)
        print_table(title, HEAD, rows(costs))
        found = granularity(subject, cfg, tokens)
        print_table(
            f"{title}: what products lose, by what shares a scale",
            ("weights", "activations", "lost"),
            ([f"a {weights}", f"a {shared}", f"{lost:.2e}"] for (weights, shared), lost in found.items()),
        )


def cost(
    title: str, name: str, model: Model, cfg: Config, tokenizer: Tokenizer, tokens: np.ndarray, unseen: np.ndarray,
    limit: int | None, keep: Path | None,
) -> Cost:  # fmt: skip
    """What a form costs, measured or read again."""
    path = keep and keep / f"{title}, {name}, {limit or 'all'}.json".replace(" ", "-")
    if path and path.exists():
        lost, apart, tasks = json.loads(path.read_text())
        return Cost(lost, apart, {task: _again(each) for task, each in tasks.items()})
    made, lost = form(name, model, cfg, tokens)
    begin = tokenizer.token_to_id(corpus.BEGIN)
    encode = lambda each: [begin, *tokenizer.encode(each, add_special_tokens=False).ids]  # noqa: E731
    found = Cost(lost, divergence(model, made, cfg, unseen), measure(made, cfg, encode, chosen_tasks(), limit))
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found))
    return found


def _again(row: list[Any]) -> Measured:
    """A `Measured` that was JSON."""
    scoring, fingerprint, scores, log2 = row
    return Measured(scoring, fingerprint, statistics.Parts(*scores), log2)


def print_table(title: str, head: tuple[str, ...], found: Iterator[list[str]]) -> None:
    """Markdown on standard output."""
    print(f"\n{title}:\n")
    print("| " + " | ".join(head) + " |")
    print("| --- |" + " ---: |" * (len(head) - 1))
    for row in found:
        print("| " + " | ".join(row) + " |")
    sys.stdout.flush()


if __name__ == "__main__":
    typer.run(main)
