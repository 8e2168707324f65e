"""`jaxserve up`: a router and its instances on one machine."""

import secrets
import signal
import sys
from typing import Annotated, NoReturn

import typer
from rich.text import Text

from jaxserve.cli.fleet import check_sizes, given_in
from jaxserve.cli.options import (
    CacheGbOption,
    ContextCacheDiskOption,
    ContextCacheMemoryOption,
    ContextCacheOption,
    ContextCacheSharedOption,
    DevicesOption,
    DrainTimeoutOption,
    DtypeOption,
    FleetTokenOption,
    KvCacheDtypeOption,
    MaxModelLenOption,
    MaxNumBatchedTokensOption,
    MaxNumSeqsOption,
    MeshOption,
    ModelArgument,
    ModelCacheOption,
    NumSpeculativeTokensOption,
    PortOption,
    QuantizationOption,
    ServedModelNameOption,
    ServerKeyOption,
)
from jaxserve.cli.show import notes

COLOURS = "cyan", "green", "magenta", "yellow", "blue"


def up(
    context: typer.Context,
    model: ModelArgument = None,
    prefill: Annotated[int, typer.Option(min=0, help="Instances that compute prompts.")] = 1,
    decode: Annotated[int, typer.Option(min=1, help="Instances that generate answers.")] = 1,
    host: Annotated[str, typer.Option(help="Address to listen at, for clients.")] = "127.0.0.1",
    port: PortOption = 8000,
    served_model_name: ServedModelNameOption = None,
    api_key: ServerKeyOption = None,
    max_model_len: MaxModelLenOption = None,
    max_num_seqs: MaxNumSeqsOption = 16,
    max_num_batched_tokens: MaxNumBatchedTokensOption = 512,
    num_speculative_tokens: NumSpeculativeTokensOption = None,
    cache_gb: CacheGbOption = 4.0,
    dtype: DtypeOption = "auto",
    quantization: QuantizationOption = None,
    kv_cache_dtype: KvCacheDtypeOption = "auto",
    context_cache: ContextCacheOption = None,
    context_cache_memory_gb: ContextCacheMemoryOption = 1.0,
    context_cache_disk_gb: ContextCacheDiskOption = 16.0,
    context_cache_shared_gb: ContextCacheSharedOption = 64.0,
    model_cache: ModelCacheOption = None,
    devices: DevicesOption = None,
    mesh: MeshOption = None,
    drain_timeout: DrainTimeoutOption = 60.0,
    fleet_token: FleetTokenOption = None,
) -> NoReturn:
    """Starts a router and instances on this machine, and ends them together.

    Some instances compute prompts, the others go on from there and generate the answers; clients ask the router, as
    they would ask `jaxserve serve`. What the processes say is shown with their names. One that dies is told and not
    started again: the others go on with its answers. SIGTERM or Ctrl-C: what was accepted is finished first; the second
    time, nothing is.

    jaxserve up

    jaxserve up --prefill 2 --decode 1 Qwen/Qwen3-0.6B --quantization int8

    If this process is killed, the others end at once, and finish nothing.

    Instances share the folders of --context-cache and --model-cache; each has a cache in memory of its own.
    """
    from jaxserve.fleet.children import Children

    check_sizes(given_in(context))
    common = _given(model, max_model_len=max_model_len, drain_timeout=drain_timeout)
    facing = _given(None, host=host, port=port, served_model_name=served_model_name, control_port=0)
    own = _given(
        None, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens,
        num_speculative_tokens=num_speculative_tokens, cache_gb=cache_gb, dtype=dtype, quantization=quantization,
        kv_cache_dtype=kv_cache_dtype, devices=devices, mesh=mesh, model_cache=model_cache,
    )  # fmt: skip
    if context_cache is not None:
        own += _given(
            None, context_cache=context_cache, context_cache_memory_gb=context_cache_memory_gb,
            context_cache_disk_gb=context_cache_disk_gb, context_cache_shared_gb=context_cache_shared_gb,
        )  # fmt: skip
    serve = [sys.executable, "-m", "jaxserve", "serve", *common, "--end-with-stdin"]
    instances = {
        f"{role}-{number}": [*serve, *own, "--role", role, "--name", f"{role}-{number}"]
        for role, count in {"prefill": prefill, "decode": decode}.items()
        for number in range(1, count + 1)
    }
    secret = {"JAXSERVE_FLEET_TOKEN": fleet_token or secrets.token_hex(16)}
    environment = secret | ({"JAXSERVE_API_KEY": " ".join(api_key)} if api_key else {})
    children = Children(environment, Teller(["router", *instances]))
    for name in ("SIGTERM", "SIGINT", "SIGHUP"):  # a terminal that is closed ends them too
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda *_: children.end())
    sys.exit(children.run([*serve, *facing, "--role", "router", "--no-log-requests"], instances))


def _given(model: str | None, **options: object) -> list[str]:
    """A command's arguments, of those that have a value, or several."""
    words = [] if model is None else [model]
    for name, given in options.items():
        for value in given if isinstance(given, list) else [] if given is None else [given]:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return words


class Teller:
    """Shows the lines of many processes, each with the name of whose it is."""

    def __init__(self, names: list[str]):
        self._width = max(map(len, names))
        self._colours = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}

    def __call__(self, name: str, line: str) -> None:
        notes.print(Text.assemble((f"{name:<{self._width}} | ", self._colours[name]), line), soft_wrap=True)
