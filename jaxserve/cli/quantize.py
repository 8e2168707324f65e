"""`jaxserve quantize`: write a model with INT8 weights."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from jaxserve.cli.show import notes, print_table, progress


def quantize(
    model: Annotated[str, typer.Argument(help="Folder or hub name; embedded is the embedded model.")],
    out: Annotated[Path, typer.Argument(help="A new folder for the INT8 model.")],
    text: Annotated[
        list[Path] | None,
        typer.Option(help="A file to calibrate with, several if repeated; without it, Python's own library."),
    ] = None,
    sequences: Annotated[int, typer.Option(min=1, help="How many pieces of text.")] = 16,
    length: Annotated[int, typer.Option(min=2, help="Tokens of each.")] = 256,
    without: Annotated[
        list[str] | None, typer.Option(help="A part to leave out: outliers, scales, clipping, compensation, mixed.")
    ] = None,
    form: Annotated[
        Literal["compressed-tensors", "orbax"],
        typer.Option("--format", help="What other engines read too, or what restores onto any mesh by itself."),
    ] = "compressed-tensors",
) -> None:
    """Writes a model with INT8 weights, chosen with text that passes through it.

    Takes one layer at a time, so memory is needed for one. Stopped, the same command goes on where it was. For each
    block of a layer it shows the share of its output's squares that INT8 loses: rounded plainly, then after each part.

    outliers: scales and rotations, folded into the weights, even out what enters a matrix. scales: the best ones are
    searched. clipping: of the largest weights. compensation: rounding that makes up for what was lost, and a bias.
    mixed: what would lose too much stays in float.

    jaxserve quantize embedded model-int8

    \b
    jaxserve quantize Qwen/Qwen3-0.6B qwen3-int8 --text my-prompts.txt \\
        --without compensation
    """
    from jaxserve import quantization

    with progress() as shown:
        reports = quantization.quantize(model, out, text or [], (sequences, length), without or [], form, shown)
    names = quantization.head(quantization.columns(reports))
    print_table(
        f"{out}: lost of each block's output, in millionths of its squares", quantization.rows(reports), "right", names
    )
    for line in quantization.starved(reports):
        notes.print(line, soft_wrap=True)
