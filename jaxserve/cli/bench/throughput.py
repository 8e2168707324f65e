"""`jaxserve bench throughput`: many requests at once."""

from typing import Annotated

import typer

from jaxserve.cli.bench.common import DtypeOption, FormOption, ModelOption, OutOption, check_outputs, keep, load, title
from jaxserve.cli.options import KvCacheDtypeOption
from jaxserve.cli.show import print_table, progress


def throughput(
    context: typer.Context,
    model: ModelOption = "bench-1b",
    form: FormOption = "int8",
    dtype: DtypeOption = "auto",
    kv_cache_dtype: KvCacheDtypeOption = "auto",
    requests: Annotated[int, typer.Option(min=1, help="How many come at once.")] = 64,
    prompt_tokens: Annotated[str, typer.Option(help="Of each: a number, or a range.")] = "32-512",
    output_tokens: Annotated[str, typer.Option(help="Of each answer, likewise.")] = "16-128",
    batch: Annotated[int, typer.Option(min=1, help="Answers that run together at most.")] = 16,
    repetitions: Annotated[int, typer.Option(min=1, help="How often all are answered.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Of lengths.")] = 0,
    out: OutOption = None,
) -> None:
    """Measures throughput: requests of many lengths come all at once, and are answered as fast as it goes.

    Prompts and answers share steps. All is compiled, and answered once, before it is timed.
    """
    from jaxserve.bench import runs, workload
    from jaxserve.bench.roofline import percentiles

    check_outputs(out)
    asks = workload.synthetic(
        requests, workload.lengths(prompt_tokens), workload.lengths(output_tokens), prefix=0, seed=seed
    )
    with progress() as tell:
        subject = load(model, form, dtype, tell)
        tell("measuring", 0, 1)
        found = runs.serving(subject, asks, batch, repetitions, kv_cache_dtype)
    middle, low, high = percentiles(found.seconds)
    counts = {"requests": found.requests, "prompt tokens": found.prompt_tokens, "tokens": found.output_tokens}
    rows = [(name, f"{count:,}", f"{count / middle:,.1f}") for name, count in counts.items()]
    about = f"{title(subject)}, {requests} requests at once, {batch} run together"
    print_table(about, rows, "right", ("", "in all", "a second"))
    print_table(f"in {middle:.2f} s ({low:.2f} to {high:.2f})", [], "right")
    keep(
        out,
        context,
        {"model": subject.about(), "result": found._asdict() | {"median": middle, "p10": low, "p90": high}},
    )
