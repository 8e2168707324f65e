"""`jaxserve bench serve`: a load for a server."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from jaxserve.cli.bench.common import circumstances
from jaxserve.cli.options import ApiKeyOption, check_file
from jaxserve.cli.show import notes, print_table, progress
from jaxserve.parallel.errors import RequestError

if TYPE_CHECKING:
    from jaxserve.bench.load import Load
    from jaxserve.bench.report import Summary
    from jaxserve.bench.workload import Ask


def serve(
    context: typer.Context,
    url: Annotated[str, typer.Option(help="The server's, with or without /v1.")] = "http://127.0.0.1:8000",
    api_key: ApiKeyOption = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Its name there; else the first it lists.")] = None,
    endpoint: Annotated[Literal["completions", "chat"], typer.Option(help="What is asked.")] = "completions",
    requests: Annotated[int | None, typer.Option(min=1, help="How many; else 100, or all of the trace.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Requests from this file of JSON Lines; see above.")] = None,
    prompt_tokens: Annotated[
        str | None, typer.Option(help="Of each prompt: a number, or a range like 64-256; else 128.")
    ] = None,
    output_tokens: Annotated[str | None, typer.Option(help="Of each answer, likewise; else 64.")] = None,
    prefix_tokens: Annotated[int | None, typer.Option(min=1, help="So many more, the same before each prompt.")] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Requests at a time; else 8, and with --rate no bound.")
    ] = None,
    rate: Annotated[float | None, typer.Option(help="Requests a second, at random times; inf: all at once.")] = None,
    warmup: Annotated[int, typer.Option(min=0, help="Requests before those that count.")] = 4,
    ignore_eos: Annotated[
        bool, typer.Option(help="Have answers go on to their length; not all servers know it.")
    ] = True,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable token.")] = 0.0,
    goodput: Annotated[
        list[str] | None, typer.Option(help="Count answers within this, in ms: ttft:500, itl:50, tpot:50, e2e:5000.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of words, lengths and times of arrival.")] = 0,
    timeout: Annotated[float, typer.Option(help="Seconds without a sign of life, after which a request fails.")] = 600,
    out: Annotated[Path | None, typer.Option(help="Write all numbers, of each request too, to this JSON file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw latencies and a timeline to this .png or .svg.")] = None,
) -> None:
    """Puts a load on any OpenAI-compatible server, and shows how long answers took.

    Closed loop: --concurrency requests run at any time, each begins when another ends. Open loop (--rate): requests
    come when they come, as from people, and a server that is too slow has a queue. There latency counts from when a
    request was due, not from when it was sent, so that no queue goes unseen.

    A line of a trace is {"prompt": text, or "prompt_tokens": 128, "output_tokens": 64, "arrival": 0.5}; without
    arrivals (seconds) the loop is closed. Mooncake's traces can be read as they are.

    Ctrl-C ends the load early, and shows what there is.

    jaxserve bench serve --requests 200 --concurrency 16

    \b
    jaxserve bench serve --rate 4 --prompt-tokens 64-512 --prefix-tokens 256 \\
        --goodput ttft:500 --goodput itl:50

    \b
    jaxserve bench serve --url http://gpu:8000 --trace requests.jsonl \\
        --out load.json --plot load.png
    """
    import asyncio

    from jaxserve.bench import load, prompts, report, workload
    from jaxserve.bench import plot as pictures
    from jaxserve.client import AsyncClient, Client

    bounds = report.goals(goodput or ())
    check_file("--out", out)
    check_file("--plot", plot)
    if plot:
        pictures.check(plot)
    asks = _asks(trace, requests, prompt_tokens, output_tokens, prefix_tokens, rate, seed)
    room = concurrency or (8 if asks[0].arrival is None else None)
    with Client(url, api_key, timeout) as client, progress() as shown:
        model, version = model or client.model()["id"], client.version()
        common = {"model": model, "temperature": temperature} | ({"ignore_eos": True} if ignore_eos else {})
        each = (workload.warmups(asks, warmup), asks)
        first, jobs = (prompts.jobs(client, some, endpoint, common, seed) for some in each)
        found = asyncio.run(load.run(AsyncClient(url, api_key, timeout), first, jobs, room, shown))
    summary, title = report.summarize(found, bounds), f"{model} at {client.url}, {_manner(asks, rate, room)}"
    _print(title, found, summary)
    if out:
        about = {"model": model, "server": version, **circumstances(context)}
        out.write_text(json.dumps(report.as_json(found, summary, about), indent=1) + "\n")
    if plot:
        pictures.save(plot, title, found.records, bounds)


def _asks(
    trace: Path | None, requests: int | None, prompt: str | None, output: str | None, prefix: int | None,
    rate: float | None, seed: int,
) -> "list[Ask]":  # fmt: skip
    """What is to be asked, and with a rate, when."""
    from jaxserve.bench import workload

    if rate is not None and not rate > 0:
        raise RequestError(f"--rate {rate}: it must be above 0; inf is all at once")
    if trace is None:
        sizes = workload.lengths(prompt or "128"), workload.lengths(output or "64")
        asks = workload.synthetic(requests or 100, *sizes, prefix or 0, seed)
    elif prompt or output or prefix:
        raise RequestError("--trace says how long prompts and answers are; leave out --prompt-tokens and its like")
    else:
        asks = workload.read_trace(trace, requests)
    times = [ask.arrival for ask in asks] if rate is None else workload.poisson(rate, len(asks), seed)
    return [ask._replace(arrival=time) for ask, time in zip(asks, times, strict=True)]


def _manner(asks: "Sequence[Ask]", rate: float | None, room: int | None) -> str:
    """How requests came."""
    if asks[0].arrival is None:
        return f"{room} at a time"
    capped = f", at most {room} at a time" if room else ""
    if rate is None:
        return f"as the trace says{capped}"
    return ("all at once" if math.isinf(rate) else f"{rate:g} a second") + capped


def _print(title: str, found: "Load", summary: "Summary") -> None:
    from jaxserve.bench import report

    print_table(title, report.latency_rows(summary), "right", report.LATENCY)
    print_table(f"in {found.seconds:.1f} s", report.count_rows(summary), "right", report.COUNTS)
    for line in report.failures(found):
        notes.print(line, soft_wrap=True)
