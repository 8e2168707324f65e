"""Options that several commands have."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from jaxserve.parallel.errors import RequestError

PromptArgument = Annotated[str, typer.Argument(help="The text to continue; - reads it from standard input.")]
ModelArgument = Annotated[str | None, typer.Argument(help="Folder or hub name; without it, the embedded model.")]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", help="Folder of a Hugging Face model, or its name on the hub (without it, the embedded one)."
    ),
]
MaxTokensOption = Annotated[int, typer.Option(help="Tokens to generate at most.")]
TemperatureOption = Annotated[float, typer.Option(help="0 takes the most probable token; higher is more varied.")]
TopPOption = Annotated[float, typer.Option(help="Draw from the most probable tokens that reach this mass.")]
TopKOption = Annotated[int, typer.Option(help="Draw from this many most probable tokens; 0: all.")]
MinPOption = Annotated[float, typer.Option(help="Draw from tokens this probable, relative to the most probable.")]
SeedOption = Annotated[int | None, typer.Option(help="Repeats what was drawn; without it, another each time.")]
StopOption = Annotated[list[str] | None, typer.Option(help="A text that ends the answer; may be given several times.")]
MaxModelLenOption = Annotated[
    int | None, typer.Option(help="Tokens of prompt and answer together at most; the cache has room for them.")
]
MaxNumSeqsOption = Annotated[int, typer.Option(min=1, help="Answers generated together, on each device.")]
MaxNumBatchedTokensOption = Annotated[int, typer.Option(help="Prompt tokens of a step.")]
NumSpeculativeTokensOption = Annotated[
    int | None,
    typer.Option(help="Guesses a step, by the MTP module; without it, 1 if the model has one, on CPU 0."),
]
CacheGbOption = Annotated[float, typer.Option(min=0.001, help="Gigabytes of the cache at most, on each device.")]
DtypeOption = Annotated[
    str, typer.Option(help="float32, bfloat16, float16; auto: the checkpoint's own, on CPU float32.")
]
QuantizationOption = Annotated[
    Literal["int8"] | None,
    typer.Option(help="int8: the matrices of attention, networks and experts, and products, in INT8."),
]
KvCacheDtypeOption = Annotated[
    Literal["auto", "int8"],
    typer.Option(help="Of the cache; int8: latents in INT8, keys in 16 bits; auto: that of activations."),
]
ModelCacheOption = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER|off",
        help="Keep weights there as they run, for the next to map; without it, look where models prefetch keeps them.",
    ),
]
DevicesOption = Annotated[
    int | None,
    typer.Option(min=1, help="On CPU, emulate so many devices in this process; without it, those that --mesh needs."),
]
MeshOption = Annotated[
    str | None,
    typer.Option(help="Run on several devices: nodes x devices of each, like 2x4; experts are spread over them."),
]
CoordinatorOption = Annotated[
    str | None,
    typer.Option(help="Share the mesh with other processes, which meet at this host:port; it is on the first's host."),
]
NumProcessesOption = Annotated[int, typer.Option(min=1, help="How many processes share the mesh.")]
ProcessIdOption = Annotated[int, typer.Option(min=0, help="Which of them this is, from 0.")]
ContextCacheOption = Annotated[
    str | None,
    typer.Option(
        metavar="PLACES",
        help="Keep what was computed of prompts beyond the device: memory; disk, the user's cache folder, or ./FOLDER; "
        "redis://HOST:PORT, for many instances. Several with commas; memory is always one.",
    ),
]
ContextCacheMemoryOption = Annotated[float, typer.Option(min=0, help="Gigabytes of it in memory.")]
ContextCacheDiskOption = Annotated[float, typer.Option(min=0, help="Gigabytes of it on disk.")]
ContextCacheSharedOption = Annotated[
    float, typer.Option(min=0, help="Gigabytes that a tenant may have of it in the server for many instances.")
]
FleetTokenOption = Annotated[
    str | None,
    typer.Option(envvar="JAXSERVE_FLEET_TOKEN", help="A secret that the router and its instances share."),
]
PortOption = Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")]
ServedModelNameOption = Annotated[
    list[str] | None,
    typer.Option(help="How clients call the model, several if repeated; else as it is given here."),
]
ServerKeyOption = Annotated[
    list[str] | None,
    typer.Option(
        "--api-key", help="Only clients with this key are served, several if repeated.", envvar="JAXSERVE_API_KEY"
    ),
]
DrainTimeoutOption = Annotated[
    float, typer.Option(min=0.0, help="Seconds to finish what was accepted, after SIGTERM or Ctrl-C.")
]
UrlOption = Annotated[
    str | None, typer.Option(help="Ask the OpenAI-compatible server there, rather than a model in this process.")
]
ApiKeyOption = Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="Of the server, if it wants one.")]


def check_file(option: str, path: Path | None) -> None:
    """Raises RequestError if what takes long could not be written there in the end."""
    if path and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise RequestError(f"{option} {path}: it must be a file, in a folder that is there")
