"""`jaxserve bench model`: a standard model as a folder."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from jaxserve.cli.bench.common import FormOption
from jaxserve.cli.show import notes, progress


def model(
    name: Annotated[str, typer.Argument(help="bench-1b, bench-dense or bench-v2-lite.")],
    folder: Annotated[Path, typer.Argument(help="Where it goes; new, or empty.")],
    form: FormOption = "int8",
) -> None:
    """Writes a standard model with random weights, as Hugging Face publishes them.

    INT8 is in the format of compressed-tensors. In each form the weights are the same, but for rounding; what they say
    is noise. The tokenizer is the embedded model's, filled up to the vocabulary.
    """
    from jaxserve.bench import models

    with progress() as tell:
        models.save(folder, name, form, partial(tell, "loading"))
    size = sum(path.stat().st_size for path in folder.iterdir())
    notes.print(f"{folder}: {name} in {form}, {size / 2**20:,.0f} MiB", soft_wrap=True)
