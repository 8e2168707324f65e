"""What the commands that measure share: options, the model and the limits, what is kept."""

import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

from jaxserve.cli.options import check_file
from jaxserve.cli.show import notes
from jaxserve.parallel.errors import RequestError

if TYPE_CHECKING:
    from jaxserve.bench.costs import Cost, Phase
    from jaxserve.bench.limits import Limits
    from jaxserve.bench.models import Subject
    from jaxserve.bench.roofline import Point

ModelOption = Annotated[
    str,
    typer.Option(
        "--model", "-m", help="bench-1b, bench-dense, bench-v2-lite, embedded, a folder, or a name on the hub."
    ),
]
FormOption = Annotated[
    Literal["int8", "bfloat16", "float32"],
    typer.Option(help="Of the weights; int8: matrices in INT8, and of the standard models the head."),
]
DtypeOption = Annotated[
    Literal["auto", "float32", "bfloat16"],
    typer.Option(help="With --form int8, of activations and what isn't INT8; auto: float32 on CPU, else bfloat16."),
]
BatchOption = Annotated[str, typer.Option(help="Answers at a time: a number, or several like 1,4,16,64.")]
ContextOption = Annotated[int, typer.Option("--context", min=1, help="Tokens of each prompt.")]
OutOption = Annotated[Path | None, typer.Option(help="Write all numbers to this JSON file, with machine and versions.")]
PlotOption = Annotated[Path | None, typer.Option(help="Draw the roofline, and where this is, to this .png or .svg.")]


class Setting(NamedTuple):
    """A model that is loaded, on a machine whose limits are known."""

    subject: "Subject"
    limits: "Limits"
    kv_cache_dtype: Literal["auto", "int8"]

    @property
    def cache(self) -> Any:
        """The tree of `Param` of the cache."""
        from jaxserve.options import EngineConfig, cache_of

        options = EngineConfig(kv_cache_dtype=self.kv_cache_dtype)
        return cache_of(self.subject.cfg, options, 1, self.subject.params.norm.dtype)

    def cost(self, phase: "Phase") -> "Cost":
        """Of all parts together."""
        from jaxserve.bench.costs import parts, total

        return total(parts(self.subject.cfg, self.subject.params, self.cache, phase).values())

    def as_json(self) -> dict[str, Any]:
        """What results are compared with."""
        return {"model": self.subject.about(), "limits": self.limits._asdict()}


def check_outputs(out: Path | None, plot: Path | None = None) -> None:
    """Raises RequestError for files that could not be written in the end."""
    check_file("--out", out)
    check_file("--plot", plot)
    if plot:
        from jaxserve.bench.plot import check

        check(plot)


def numbers(option: str, said: str) -> list[int]:
    """`1,4,16`; RequestError for anything else."""
    try:
        found = [int(one) for one in said.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise RequestError(f"{option} {said}: it must be whole numbers from 1 on, like 1,4,16")
    return found


def load(model: str, form: Any, dtype: str, tell: Callable[[str, int, int], None]) -> "Subject":
    """The model; what is compiled for it is kept for the next time."""
    from jaxserve.bench import models
    from jaxserve.compilation import enable_cache

    if obstacle := enable_cache():
        notes.print(f"warning: compiled programs can't be kept for the next time: {obstacle}", soft_wrap=True)
    return models.load(model, form, dtype, partial(tell, "loading"))


def prepare(model: str, form: Any, dtype: str, kv_cache_dtype: Any, tell: Callable[[str, int, int], None]) -> Setting:
    """Loads the model and finds the machine's limits."""
    from jaxserve.bench import limits

    subject = load(model, form, dtype, tell)
    return Setting(subject, limits.measure(progress=partial(tell, "limits")), kv_cache_dtype)


def title(subject: "Subject") -> str:
    """The model, in a few words."""
    from jaxserve.describe import human

    return f"{subject.name} in {subject.form}, {human(subject.bytes)} of weights"


def show_limits(setting: Setting) -> None:
    """A line below a table: what its shares are of."""
    from rich.console import Console

    from jaxserve.bench.roofline import limit_line

    Console(highlight=False).print(limit_line(setting.limits), soft_wrap=True)


def circumstances(context: typer.Context) -> dict[str, Any]:
    """What was asked for, as JSON can hold it, without the key; when, and by what."""
    from jaxserve.bench.machine import software

    given = {name: value for name, value in context.params.items() if name != "api_key"}
    given |= {name: str(value) for name, value in given.items() if isinstance(value, Path) or value == math.inf}
    return {"command": context.info_name, "options": given, **software()}


def keep(out: Path | None, context: typer.Context, content: dict[str, Any]) -> None:
    """Writes the numbers, if there is a file for them."""
    if out:
        from jaxserve.bench.machine import hardware

        out.write_text(json.dumps({**circumstances(context), "machine": hardware(), **content}, indent=1) + "\n")


def draw(plot: Path | None, setting: Setting, title: str, points: "Sequence[Point]", unit: str) -> None:
    """Draws the roofline, if there is a file for it."""
    if plot:
        from jaxserve.bench.plot import roofline

        roofline(plot, title, points, setting.limits, unit)
