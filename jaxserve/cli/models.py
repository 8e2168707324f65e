"""`jaxserve models`: the model cache, and the model of a server that runs."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jaxserve.cli.options import ApiKeyOption, DtypeOption, ModelArgument, QuantizationOption
from jaxserve.cli.show import notes, print_table, progress
from jaxserve.parallel.errors import RequestError

if TYPE_CHECKING:
    from jaxserve.checkpoints.blocks import Kept

models = typer.Typer(
    help="Keep weights as they run, for instances on this machine to share, and switch a server's model.",
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

FolderOption = Annotated[
    Path | None, typer.Option("--model-cache", help="Where they are kept; without it, beside compiled programs.")
]
CapacityOption = Annotated[
    float | None, typer.Option(min=0, help="Gigabytes that all may take; what wasn't used for longest goes.")
]


@models.command("list")
def list_kept(model_cache: FolderOption = None) -> None:
    """Lists the models that are kept, the last used first.

    stale: its files are others now, or gone. damaged: it lacks blocks, which the next that loads it makes. mapped: so
    many processes use its memory; on Linux, and where weights stay in the host's memory. Two forms of a model share
    what is the same in both, so they take less than the sum.

    jaxserve models list
    """
    from jaxserve.checkpoints.blocks import mapped_by
    from jaxserve.describe import human
    from jaxserve.models import is_stale, open_cache

    blocks = open_cache(model_cache)
    kept = blocks.kept()
    if not kept:
        notes.print(f"no model is kept in {blocks.folder}; `jaxserve models prefetch` keeps one", soft_wrap=True)
        return
    users = mapped_by(blocks.folder, [each.manifest for each in kept])
    state = lambda each: (  # noqa: E731
        "damaged" if blocks.damaged(each.manifest, thorough=False) else "stale" if is_stale(each.manifest) else ""
    )
    rows = [
        (
            each.manifest.model,
            each.manifest.version[:12],
            each.manifest.form,
            human(sum(each.manifest.blocks.values())),
            _ago(time.time() - each.used),
            str(count),
            state(each),
        )
        for each, count in zip(kept, users, strict=True)
    ]
    title = f"{blocks.folder}: {human(blocks.size())} of {len(kept)} models"
    print_table(title, rows, "right", ("model", "version", "form", "size", "last used", "mapped", ""))


@models.command()
def check(
    model: Annotated[str | None, typer.Argument(help="Folder or hub name; without it, all that are kept.")] = None,
    model_cache: FolderOption = None,
) -> None:
    """Reads what is kept and compares checksums; tells whether a model is kept at all.

    Exits with 1 if one isn't, or is damaged. Blocks that are damaged are removed; the next that loads the model makes
    them anew.

    jaxserve models check
    """
    from jaxserve.models import open_cache

    blocks = open_cache(model_cache)
    kept, wrong = _named(blocks.kept(), model), 0
    for each in kept:
        damaged = blocks.damaged(each.manifest)
        wrong += bool(damaged)
        count = f"{len(damaged)} of {len(each.manifest.blocks)} blocks"
        told = f"{count} are gone or damaged; who loads it makes them anew" if damaged else "whole"
        print(f"{each.manifest.model} ({each.manifest.form}): {told}")
    if not kept:
        told = f"{model} is not in {blocks.folder}" if model else f"no model is kept in {blocks.folder}"
        notes.print(told, soft_wrap=True)
    raise typer.Exit(1 if wrong or (model is not None and not kept) else 0)


@models.command()
def prefetch(
    model: ModelArgument = None,
    dtype: DtypeOption = "auto",
    quantization: QuantizationOption = None,
    model_cache: FolderOption = None,
    capacity_gb: CapacityOption = None,
) -> None:
    """Keeps a model's weights as the engine takes them, without serving it.

    Whoever loads the model with the same dtype and quantization maps them from then on.

    \b
    jaxserve models prefetch Qwen/Qwen3-0.6B --quantization int8
    jaxserve serve Qwen/Qwen3-0.6B --quantization int8
    """
    from functools import partial

    from jaxserve.describe import human
    from jaxserve.models import open_cache
    from jaxserve.models import prefetch as keep

    began, blocks = time.perf_counter(), open_cache(model_cache, _bytes(capacity_gb))
    with progress() as shown:
        manifest = keep(model, dtype, quantization == "int8", blocks, partial(shown, "loading"))
    size, seconds = human(sum(manifest.blocks.values())), time.perf_counter() - began
    print(f"{manifest.model} ({manifest.form}), version {manifest.version[:12]}: {size} in {seconds:.1f} s")


@models.command()
def load(
    model: Annotated[str, typer.Argument(help="As `models list` names it, or as the server was started with it.")],
    url: Annotated[str, typer.Option(help="Of a server that runs.")] = "http://127.0.0.1:8000",
    api_key: ApiKeyOption = None,
) -> None:
    """Has a server serve another model: one that is in its model cache, or was named when it was started.

    What it has accepted is finished first; until the model is loaded, it answers 503.

    jaxserve models load Qwen/Qwen3-0.6B --url http://127.0.0.1:8000
    """
    from jaxserve.client import Client

    with Client(url, api_key) as client:
        answer = client.post("/models/load", {"model": model})
    print(f"{answer['model']} is served at {url}, after {answer['seconds']:.1f} s")


@models.command()
def evict(
    model: Annotated[
        list[str] | None, typer.Argument(help="As `models list` names it; in all versions and forms.")
    ] = None,
    stale: Annotated[bool, typer.Option("--stale", help="Those whose files are others now, or gone.")] = False,
    capacity_gb: CapacityOption = None,
    model_cache: FolderOption = None,
) -> None:
    """Removes models from the cache: by name, stale ones, or until the rest fits. Who has one loaded keeps it.

    \b
    jaxserve models evict Qwen/Qwen3-0.6B
    jaxserve models evict --stale --capacity-gb 100
    """
    from jaxserve.models import is_stale, open_cache

    if not (model or stale or capacity_gb is not None):
        raise RequestError("nothing to evict; name models, or give --stale or --capacity-gb")
    blocks = open_cache(model_cache, _bytes(capacity_gb))
    kept = blocks.kept()
    if missing := [name for name in model or () if not _named(kept, name)]:
        raise RequestError(f"{', '.join(missing)}: not in {blocks.folder}; `jaxserve models list` shows what is")
    named = [each for name in model or () for each in _named(kept, name)]
    gone = {each.manifest.key: each.manifest for each in [*named, *(k for k in kept if stale and is_stale(k.manifest))]}
    for key in gone:
        blocks.remove(key)
    for manifest in [*gone.values(), *blocks.make_room(0)]:
        print(f"removed {manifest.model} ({manifest.form}), version {manifest.version[:12]}")


def _named(kept: "list[Kept]", model: str | None) -> "list[Kept]":
    from jaxserve.models import name_of

    return [each for each in kept if model is None or each.manifest.model in (model, name_of(model))]


def _bytes(gigabytes: float | None) -> int:
    from jaxserve.checkpoints.blocks import LIMIT

    return LIMIT if gigabytes is None else int(gigabytes * 2**30)


def _ago(seconds: float) -> str:
    """How long ago, in the largest unit of which it is one or more."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(0, seconds):.0f} s ago"
