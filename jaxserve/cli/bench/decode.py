"""`jaxserve bench decode`: a token for each answer, over and over."""

from typing import TYPE_CHECKING, Annotated

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
    from jaxserve.bench.runs import Decoding


def decode(
    context: typer.Context,
    model: ModelOption = "bench-1b",
    form: FormOption = "int8",
    dtype: DtypeOption = "auto",
    kv_cache_dtype: KvCacheDtypeOption = "auto",
    batch: BatchOption = "1,4,16,64",
    tokens: ContextOption = 512,
    repetitions: Annotated[int, typer.Option(min=1, help="Steps that are timed, of each batch.")] = 32,
    out: OutOption = None,
    plot: PlotOption = None,
) -> None:
    """Measures decoding: seconds of a step, and their share of what this machine allows.

    The engine answers a batch of prompts; timed is each step in which all of them get a token, as medians with what a
    tenth is below and above. The roofline is the time in which memory could be read once: the weights, of experts those
    that some token of the batch visits (counted), and the cache; or the time of all products, if that is longer.
    """
    from jaxserve.bench import runs
    from jaxserve.bench.roofline import as_json, head, row, short

    check_outputs(out, plot)
    batches, found = numbers("--batch", batch), []
    with progress() as tell:
        setting = prepare(model, form, dtype, kv_cache_dtype, tell)
        for done, size in enumerate(batches):
            tell("measuring", done, len(batches))
            found.append(runs.decoding(setting.subject, size, tokens, repetitions, kv_cache_dtype))
    points = [_point(setting, each) for each in found]
    rows = []
    for each, point in zip(found, points, strict=True):
        experts = (f"{each.visited:,.0f}",) if setting.subject.cfg.experts else ()
        rows.append(row(point, setting.limits, short(each.batch / point.median), *experts))
    experts = ("experts",) if setting.subject.cfg.experts else ()
    print_table(
        f"{title(setting.subject)}, decoding after {tokens} tokens", rows, "right", head("batch", "tokens/s", *experts)
    )
    show_limits(setting)
    results = [each._asdict() | as_json(point, setting.limits) for each, point in zip(found, points, strict=True)]
    keep(out, context, {**setting.as_json(), "results": results})
    draw(plot, setting, f"{title(setting.subject)}, decoding", points, "answers")


def _point(setting: Setting, found: "Decoding") -> "Point":
    from jaxserve.bench import costs
    from jaxserve.bench.roofline import Point

    phase = costs.Phase.decoding(found.batch, found.seen, found.visited)
    return Point(str(found.batch), found.seconds, setting.cost(phase))
