"""`jaxserve bench layers`: each part of a step alone."""

from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from jaxserve.cli.bench.common import (
    BatchOption,
    ContextOption,
    DtypeOption,
    FormOption,
    ModelOption,
    OutOption,
    PlotOption,
    Setting,
    check_outputs,
    draw,
    keep,
    numbers,
    prepare,
    show_limits,
    title,
)
from jaxserve.cli.options import KvCacheDtypeOption
from jaxserve.cli.show import print_table, progress

if TYPE_CHECKING:
    from jaxserve.bench.roofline import Point


def layers(
    context: typer.Context,
    model: ModelOption = "bench-1b",
    form: FormOption = "int8",
    dtype: DtypeOption = "auto",
    kv_cache_dtype: KvCacheDtypeOption = "auto",
    phase: Annotated[Literal["decode", "prefill", "both"], typer.Option(help="Of which steps.")] = "both",
    batch: BatchOption = "1,16",
    tokens: ContextOption = 512,
    repetitions: Annotated[int, typer.Option(min=1, help="How often each part is run.")] = 10,
    out: OutOption = None,
    plot: PlotOption = None,
) -> None:
    """Measures each part of a step alone: its time, its share of its own roofline, and of the whole step.

    A part is run for all layers, one after another, with weights that come from memory. The step is the engine's, with
    all that the host does. What the parts don't explain is the last row: norms, sums, what moves between parts.
    """
    check_outputs(out, plot)
    batches, results, points = numbers("--batch", batch), [], []
    with progress() as tell:
        setting = prepare(model, form, dtype, kv_cache_dtype, tell)
        cases = [("decode", size) for size in batches if phase != "prefill"]
        cases += [("prefill", 1)] if phase != "decode" else []
        found = [_measure(setting, *case, tokens, repetitions, tell) for case in cases]
    for (name, size), (parts, step) in zip(cases, found, strict=True):
        what = f"{name}, {tokens} tokens" if name == "prefill" else f"{name}, batch {size}, after {tokens} tokens"
        _print(setting, what, parts, step)
        short = f"batch {size}" if name == "decode" else name
        points += [part._replace(name=f"{short}, {part.name}") for part in parts if part.cost.operations]
        results.append({"phase": name, "batch": size, "tokens": tokens, "step": step} | _as_json(setting, parts))
    show_limits(setting)
    keep(out, context, {**setting.as_json(), "results": results})
    draw(plot, setting, f"{title(setting.subject)}, parts of a step", points, "")


def _measure(
    setting: Setting, phase: str, batch: int, tokens: int, repetitions: int, tell: Any
) -> "tuple[list[Point], list[float]]":
    """The parts, and seconds of whole steps."""
    from jaxserve.bench import layers, runs
    from jaxserve.options import EngineConfig

    cfg, page_size, kind = setting.subject.cfg, EngineConfig().page_size, setting.kv_cache_dtype
    if phase == "decode":
        work = layers.decoding(cfg, batch, tokens, page_size)
    else:
        work = layers.prompt(cfg, tokens, page_size)
    parts = layers.measure(setting.subject, work, repetitions, kind, partial(tell, "compiling"))
    tell("measuring", 0, 1)
    if phase == "decode":
        return parts, runs.decoding(setting.subject, batch, tokens, repetitions, kind).seconds
    return parts, runs.filling(setting.subject, tokens, repetitions, max(16, tokens), kind).seconds


def _print(setting: Setting, what: str, parts: "list[Point]", step: list[float]) -> None:
    import numpy as np

    from jaxserve.bench.roofline import head, milliseconds, row, short

    whole = float(np.median(step))
    rows = [row(part, setting.limits, f"{part.median / whole:.1%}") for part in parts]
    rest = whole - sum(part.median for part in parts)
    rows.append(("the rest", short(1000 * rest), "", f"{rest / whole:.1%}"))
    rows.append(("the step", *milliseconds(step), "100%"))
    print_table(f"{title(setting.subject)}, {what}", rows, "right", head("", "of step"))


def _as_json(setting: Setting, parts: "list[Point]") -> dict[str, Any]:
    from jaxserve.bench.roofline import as_json

    return {"parts": [as_json(part, setting.limits) for part in parts]}
