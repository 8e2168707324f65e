"""`jaxserve bench startup`: from a process's start to its first token."""

from functools import partial
from typing import Annotated

import typer

from jaxserve.cli.bench.common import OutOption, check_outputs, keep
from jaxserve.cli.options import ModelOption, QuantizationOption
from jaxserve.cli.show import print_table, progress


def startup(
    context: typer.Context,
    model: ModelOption = None,
    quantization: QuantizationOption = None,
    repetitions: Annotated[int, typer.Option(min=1, help="Warm starts.")] = 5,
    out: OutOption = None,
) -> None:
    """Measures from a process's start to its first token, and where that time goes.

    Each start is a process of its own. The first, cold, has to compile all programs; the others, warm, find them in the
    cache of compiled programs that it has left (not the user's). The model's files have been read before, mostly.
    """
    from jaxserve.bench import models, startup
    from jaxserve.checkpoints.hub import locate
    from jaxserve.parallel.errors import RequestError

    check_outputs(out)
    if model in models.MODELS:
        raise RequestError(f"--model {model}: starting needs files; `jaxserve bench model {model} FOLDER` writes them")
    locate(model)
    with progress() as tell:
        found = startup.measure(model, quantization, repetitions, partial(tell, "measuring"))
    head = "seconds", "cold", "warm", "p10-p90"
    print_table(f"{model or 'embedded'}, from start to first token", startup.rows(found), "right", head)
    keep(out, context, {"model": {"name": model or "embedded"}, "result": found._asdict()})
