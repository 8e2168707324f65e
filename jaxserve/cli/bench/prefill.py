"""`jaxserve bench prefill`: prompts, alone."""

from typing import Annotated

import typer

from jaxserve.cli.bench.common import (
    DtypeOption,
    FormOption,
    ModelOption,
    OutOption,
    PlotOption,
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


def prefill(
    context: typer.Context,
    model: ModelOption = "bench-1b",
    form: FormOption = "int8",
    dtype: DtypeOption = "auto",
    kv_cache_dtype: KvCacheDtypeOption = "auto",
    prompt_tokens: Annotated[str, typer.Option(help="Of each prompt: a number, or several.")] = "128,512,2048",
    max_num_batched_tokens: Annotated[int, typer.Option(help="Tokens of a step; longer prompts are cut.")] = 512,
    repetitions: Annotated[int, typer.Option(min=1, help="Prompts that are timed, of each length.")] = 5,
    out: OutOption = None,
    plot: PlotOption = None,
) -> None:
    """Measures prefill: seconds from a prompt to its first token, and their share of what this machine allows.

    Prompts come one after another, and nothing of them is cached. The roofline is the time of all products, each at the
    peak of the dtype of its factors; or that in which all weights and the cache could be read and written once, if that
    is longer.
    """
    from jaxserve.bench import runs
    from jaxserve.bench.costs import Phase
    from jaxserve.bench.roofline import Point, as_json, head, row, short

    check_outputs(out, plot)
    lengths, found = numbers("--prompt-tokens", prompt_tokens), []
    with progress() as tell:
        setting = prepare(model, form, dtype, kv_cache_dtype, tell)
        for done, length in enumerate(lengths):
            tell("measuring", done, len(lengths))
            found.append(runs.filling(setting.subject, length, repetitions, max_num_batched_tokens, kv_cache_dtype))
    points = [Point(str(f.tokens), f.seconds, setting.cost(Phase.prompt(f.tokens, f.visited))) for f in found]
    speeds = (short(f.tokens / point.median) for f, point in zip(found, points, strict=True))
    rows = [row(point, setting.limits, speed) for point, speed in zip(points, speeds, strict=True)]
    print_table(f"{title(setting.subject)}, prefill", rows, "right", head("tokens", "tokens/s"))
    show_limits(setting)
    results = [each._asdict() | as_json(point, setting.limits) for each, point in zip(found, points, strict=True)]
    keep(out, context, {**setting.as_json(), "results": results})
    draw(plot, setting, f"{title(setting.subject)}, prefill", points, "tokens")
