"""`jaxserve serve`: the HTTP server."""

import logging
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from jaxserve.cli.devices import emulate
from jaxserve.cli.fleet import Part, ServeRole, check_effect, collectors, given_in, open_router, run_instance
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
from jaxserve.cli.show import notes, progress
from jaxserve.parallel.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxserve.llm import LLM
    from jaxserve.peers import Peers

LOCAL = ("127.0.0.1", "localhost", "::1")


def serve(
    context: typer.Context,
    model: ModelArgument = None,
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen at; 0.0.0.0 lets other machines in, so give --api-key too. "
            "Of an instance: where other instances reach it."
        ),
    ] = "127.0.0.1",
    port: PortOption = 8000,
    served_model_name: ServedModelNameOption = None,
    api_key: ServerKeyOption = None,
    max_model_len: MaxModelLenOption = None,
    max_num_seqs: MaxNumSeqsOption = 16,
    max_num_batched_tokens: MaxNumBatchedTokensOption = 512,
    max_num_queued: Annotated[
        int, typer.Option(min=0, help="Answers that may wait besides; the next gets status 429.")
    ] = 1024,
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
    loadable: Annotated[
        list[str] | None,
        typer.Option(help="Another model that clients may have served, besides those in the model cache; repeatable."),
    ] = None,
    devices: DevicesOption = None,
    mesh: MeshOption = None,
    chat_template: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="A file with a Jinja template, instead of the model's."),
    ] = None,
    max_body_bytes: Annotated[int, typer.Option(min=1, help="Of a request; more gets status 413.")] = 8 << 20,
    max_prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Of a request's prompt.")] = None,
    max_answers: Annotated[int, typer.Option(min=1, help="Of a request: its prompts times n.")] = 128,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Of an answer; also where a client names none.")] = None,
    max_concurrency: Annotated[
        int | None, typer.Option(min=1, help="Requests at once with the same key; the next gets status 429.")
    ] = None,
    allow_priority: Annotated[
        bool, typer.Option("--allow-priority", help="Clients may say who comes first, in the field priority.")
    ] = False,
    request_timeout: Annotated[
        float, typer.Option(min=0.001, help="Seconds for a request; clients give less in X-Request-Timeout.")
    ] = 600.0,
    step_timeout: Annotated[
        float, typer.Option(min=0.001, help="Seconds for a step of the engine; if it takes longer, the server ends.")
    ] = 60.0,
    drain_timeout: DrainTimeoutOption = 60.0,
    allowed_origin: Annotated[
        list[str] | None, typer.Option(help="Another site whose pages may ask this server, several if repeated.")
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(help="Another name by which clients may call a server without keys, as behind a proxy."),
    ] = None,
    log_requests: Annotated[bool, typer.Option(help="A line of JSON on standard error for each request.")] = True,
    ssl_certfile: Annotated[Path | None, typer.Option(exists=True, help="Serve https with this certificate.")] = None,
    ssl_keyfile: Annotated[Path | None, typer.Option(exists=True, help="Its key.")] = None,
    ssl_keyfile_password: Annotated[str | None, typer.Option(envvar="JAXSERVE_SSL_KEYFILE_PASSWORD")] = None,
    ssl_ca_certs: Annotated[
        Path | None, typer.Option(exists=True, help="Only clients with a certificate by these authorities.")
    ] = None,
    role: Annotated[
        ServeRole | None,
        typer.Option(
            help="Be a part of a fleet: compute prompts, generate answers, or face the clients; else, do all."
        ),
    ] = None,
    router: Annotated[
        str | None, typer.Option(help="With --role prefill or decode: host:port where the router lets instances join.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Of this instance, another for each; else of its role, host and process.")
    ] = None,
    control_host: Annotated[
        str, typer.Option(help="With --role router: address where instances join; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    control_port: Annotated[
        int, typer.Option(min=0, max=65535, help="With --role router: the port there; 0: any that is free.")
    ] = 8001,
    fleet_token: FleetTokenOption = None,
    heartbeat: Annotated[
        float, typer.Option(min=0.01, help="With --role router: seconds between two signs of an instance.")
    ] = 0.5,
    dead_after: Annotated[
        float, typer.Option(min=0.1, help="With --role router: seconds without a sign, then an instance is lost.")
    ] = 5.0,
    hung_after: Annotated[
        float, typer.Option(min=0.1, help="With --role router: seconds at work without a step, then it is lost.")
    ] = 60.0,
    max_attempts: Annotated[
        int, typer.Option(min=1, help="With --role router: times that an answer may lose its instance.")
    ] = 5,
    end_with_stdin: Annotated[
        bool, typer.Option("--end-with-stdin", help="End at once when standard input ends: who started this is gone.")
    ] = False,
) -> NoReturn:
    """Serves a model over HTTP: OpenAI's API at /v1, a page at /, metrics at /metrics.

    Ready when /health says so; until the model is loaded it answers 503. SIGTERM or Ctrl-C: what was accepted is
    finished, what comes is refused; the second time, nothing is finished. Exits with 0 then, with 1 if the engine has
    failed or the time to finish was not enough.

    jaxserve serve

    \b
    jaxserve serve Qwen/Qwen3-0.6B --quantization int8 \\
        --host 0.0.0.0 --api-key "$KEY"

    \b
    curl localhost:8000/v1/completions -H 'Content-Type: application/json' \\
        -d '{"prompt": "def quicksort(items):"}'

    jaxserve serve --mesh 2x4 --max-num-seqs 4

    In a fleet, clients ask the router, which loads no weights; instances of two roles join it, and answer together. All
    are given the same model and --max-model-len, and one secret; `jaxserve up` does that on one machine.

    \b
    export JAXSERVE_FLEET_TOKEN="$SECRET"
    jaxserve serve --role router --control-port 8001
    jaxserve serve --role prefill --router localhost:8001
    jaxserve serve --role decode --router localhost:8001
    """
    from jaxserve.fleet.children import watch_stdin
    from jaxserve.server.run import ServerOptions, serve
    from jaxserve.server.service import Limits

    if end_with_stdin:
        watch_stdin()
    check_effect(role, given_in(context))
    if not all(api_key or [os.environ.get("JAXSERVE_API_KEY", "none").strip()]):
        raise RequestError("--api-key or JAXSERVE_API_KEY is empty; give a key, or leave it out to serve everybody")
    if not all(key.isascii() for key in api_key or ()):
        raise RequestError("--api-key has characters beyond ASCII, which no header can hold; choose another key")
    if any(map(str.isspace, "".join(api_key or ()))):
        raise RequestError("--api-key has white space, which separates keys in JAXSERVE_API_KEY; choose another key")
    if host not in LOCAL and not api_key and role in (None, "router"):
        notes.print(f"warning: whoever can reach {host}:{port} can use the model; --api-key asks for a key")
    part = Part(
        role=role,
        router=router,
        host=host,
        name=name,
        control_host=control_host,
        control_port=control_port,
        token=fleet_token,
        heartbeat=heartbeat,
        dead_after=dead_after,
        hung_after=hung_after,
        max_attempts=max_attempts,
    )
    part.check()
    tell = lambda line: notes.print(line, soft_wrap=True)  # noqa: E731
    tls = {
        "ssl_certfile": ssl_certfile, "ssl_keyfile": ssl_keyfile, "ssl_keyfile_password": ssl_keyfile_password,
        "ssl_ca_certs": ssl_ca_certs,
    }  # fmt: skip
    if ssl_certfile is None and any(tls.values()):
        raise RequestError("--ssl-… options need --ssl-certfile, the certificate to serve with")
    options = ServerOptions(
        names=served_model_name or [model or "embedded"],
        host=host,
        port=port,
        keys=api_key or (),
        origins=allowed_origin or (),
        hosts=None if api_key or host not in LOCAL else (*LOCAL, *(allowed_host or ())),
        limits=Limits(
            body_bytes=max_body_bytes,
            prompt_tokens=max_prompt_tokens,
            answers=max_answers,
            max_tokens=max_tokens,
            concurrency=max_concurrency,
            seconds=request_timeout,
            priority=allow_priority,
        ),
        step_timeout=step_timeout,
        drain_timeout=drain_timeout,
        tls={name: value for name, value in tls.items() if value is not None},
    )
    mesh = emulate(devices, mesh)

    def load(name: str | None, peers: "Peers | None" = None, exports: bool = False) -> "LLM":
        from jaxserve.checkpoints.hub import locate
        from jaxserve.context import store_at
        from jaxserve.llm import LLM

        sizes = context_cache_memory_gb, context_cache_disk_gb, context_cache_shared_gb
        store = store_at(context_cache, *sizes) if context_cache is not None else None
        locate(name)  # a name that is wrong is told before anything else
        if not notes.is_terminal:  # where it is, a bar shows more
            notes.print(f"loading {options.names[0] if name == model else name}", soft_wrap=True)
        with progress() as shown:
            llm = LLM(
                name,
                progress=shown,
                peers=peers,
                exports=exports,
                dtype=dtype,
                quantization=quantization,
                kv_cache_dtype=kv_cache_dtype,
                model_cache=model_cache,
                mesh=mesh,
                max_model_len=max_model_len,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                max_num_queued=None if part.instance else max_num_queued,  # the router has the queue
                num_speculative_tokens=num_speculative_tokens,
                cache_bytes=int(cache_gb * 2**30),
                context_cache=store,
            )
        if chat_template and name == model:
            llm.tokenizer.chat_templates = {"default": chat_template.read_text(encoding="utf-8")}
        return llm

    def open_fleet() -> "LLM":
        queue = {"wait": request_timeout, "max_num_queued": max_num_queued}
        llm = open_router(part, model, max_model_len, tell, **queue)
        if chat_template:
            llm.tokenizer.chat_templates = {"default": chat_template.read_text(encoding="utf-8")}
        return llm

    def find(name: str) -> "Callable[[], LLM]":
        from jaxserve.models import find_cache, is_kept

        if name not in (loadable or ()) and not is_kept(find_cache(model_cache), name, dtype, quantization == "int8"):
            where = "in the model cache, in the form that is served here, nor was it named with --loadable"
            raise RequestError(f"model = {name!r}: it is neither {where}; `jaxserve models prefetch` puts it there")
        return partial(load, name)

    _log(log_requests)
    if part.instance:
        run_instance(part, partial(load, model), host, max_model_len, drain_timeout, tell)
    if role == "router":
        status = serve(open_fleet, options, tell, collect=collectors)
    else:
        status = serve(partial(load, model), options, tell, find)
    notes.print("stopped" if status == 0 else "stopped, with answers lost")
    sys.stderr.flush()
    os._exit(status)  # a thread that loads or hangs can't be waited for


def _log(requests: bool) -> None:
    """Lines of JSON on standard error: warnings and errors, and requests if they are wanted."""
    from jaxserve.server.access import JsonLines

    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    for name, level in {"jaxserve": logging.INFO if requests else logging.WARNING, "uvicorn": logging.WARNING}.items():
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(level)
