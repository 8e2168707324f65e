"""What the model cache saves: starts, memory of two instances, and a server's switch of models, cold against warm.

`python -m benchmarks.models` writes bench-1b in bfloat16 and in INT8 into `runs/models` (3.7 GB) and keeps it there
once more, converted. `--part` takes one part at a time.
"""

import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from jaxserve.bench import models
from jaxserve.client import Client
from jaxserve.parallel.errors import ServerError

RUNS = Path("runs/models")
KEPT = RUNS / "kept"
OPTIONS = {"max_num_seqs": 1, "max_model_len": 256, "max_num_batched_tokens": 64}
CHILD = """
import json, sys, time
from jaxserve import LLM, SamplingParams
given = json.loads(sys.argv[1])
ask = lambda count: llm.generate([[5, 7, 11]], SamplingParams(temperature=0, max_tokens=count, ignore_eos=True))
began = time.perf_counter()
llm = LLM(**given, warmup=False)
loaded = time.perf_counter()
ask(1)
first = time.perf_counter()
ask(33)
then = time.perf_counter()
ask(33)
print(json.dumps([loaded - began, first - began, (time.perf_counter() - then) / 33]), flush=True)
sys.stdin.readline()
"""
"""Prints the seconds until the weights are loaded, until there is a token, and of each token; waits to be let go."""

Row = tuple[str, ...]


class Instance:
    """A process with the model."""

    def __init__(self, **given: Any):
        self._process = subprocess.Popen(
            [sys.executable, "-c", CHILD, json.dumps(OPTIONS | given)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._process.stdout
        self.seconds: list[float] = json.loads(self._process.stdout.readline())

    def memory(self) -> dict[str, int]:
        """Bytes by the names that Linux gives them."""
        lines = Path(f"/proc/{self._process.pid}/smaps_rollup").read_text().splitlines()[1:]
        return {name: int(size) * 1024 for name, size, _ in (line.split() for line in lines)}

    def end(self) -> list[float]:
        self._process.communicate("\n")
        return self.seconds


def forget(folder: Path) -> None:
    """Has the system forget what it knows of a folder's files: they are read from the disk again."""
    for path in folder.rglob("*"):
        if path.is_file():
            number = os.open(path, os.O_RDONLY)
            os.fsync(number)
            os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(number)


def starts(given: dict[str, Any], turns: int) -> list[Row]:
    """Seconds of starts with and without the cache, whose files the system knows, or has to read."""
    files = Path(given["model"])
    ways: dict[str, tuple[str, Callable[[], object]]] = {
        "without a cache": ("off", lambda: None),
        "the first, which fills it": (str(KEPT), lambda: shutil.rmtree(KEPT, ignore_errors=True)),
        "another": (str(KEPT), lambda: None),
        "without a cache, from disk": ("off", lambda: forget(files)),
        "another, from disk": (str(KEPT), lambda: forget(KEPT)),
    }
    Instance(**given, model_cache="off").end()  # compiles
    seconds: dict[str, list[list[float]]] = {name: [] for name in ways}
    for _ in range(turns):
        for name, (cache, prepare) in ways.items():
            prepare()
            seconds[name].append(Instance(**given, model_cache=cache).end())
    medians = {
        name: [statistics.median(column) for column in zip(*each, strict=True)] for name, each in seconds.items()
    }
    return [(name, f"{a:.2f}", f"{b:.2f}", f"{1e3 * c:.1f}") for name, (a, b, c) in medians.items()]


def memory(given: dict[str, Any]) -> list[Row]:
    """GiB of one process and of two, that map the weights or have them for themselves."""
    rows = []
    for name, cache in {"without a cache": "off", "mapped": str(KEPT)}.items():
        instances = [Instance(**given, model_cache=cache)]
        alone = instances[0].memory()
        instances.append(Instance(**given, model_cache=cache))
        both = [instance.memory() for instance in instances]
        total = sum(each["Pss:"] for each in both)
        rows.append((name, *(f"{size / 2**30:.2f}" for size in (alone["Rss:"], *(e["Pss:"] for e in both), total))))
        for instance in instances:
            instance.end()
    return rows


def switches(turns: int) -> list[Row]:
    """Seconds in which a server of one model serves the other, by its own word."""
    rows, names = [], [str(RUNS / "bfloat16"), str(RUNS / "int8")]
    for label, cache in {"without a cache": "off", "mapped": str(KEPT)}.items():
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        options = [word for name, value in OPTIONS.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        loadable = [word for name in names for word in ("--loadable", name)]
        server = subprocess.Popen(
            [sys.executable, "-m", "jaxserve", "serve", names[0], "--port", str(port), "--quantization", "int8",
             "--model-cache", cache, *loadable, *options], stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            rows.append((label, *_switch(f"http://127.0.0.1:{port}", names, turns)))
        finally:
            server.terminate()
            server.wait()
    return rows


def _switch(url: str, names: list[str], turns: int) -> Row:
    with Client(url) as client:
        for _ in range(600):
            try:
                client.get("/health")
                break
            except ServerError:
                time.sleep(0.5)
        load = lambda name: client.post("/models/load", {"model": name})["seconds"]  # noqa: E731
        load(names[1])  # compiles, and fills the cache
        seconds = [[load(name) for name in names] for _ in range(turns)]
    return tuple(f"{statistics.median(column):.2f}" for column in zip(*seconds, strict=True))


def main(
    part: Annotated[Literal["starts", "memory", "switches", "all"], typer.Option(help="What to measure.")] = "all",
    form: Annotated[Literal["int8", "bfloat16"], typer.Option(help="Of the weights in memory.")] = "int8",
    turns: Annotated[int, typer.Option(help="How often; medians are shown.")] = 3,
) -> None:
    """Prints seconds and GiB, with the cache and without."""
    for name in ("bfloat16", "int8"):
        if not (RUNS / name).exists():
            models.save(RUNS / name, "bench-1b", name)
    given = {"model": str(RUNS / "bfloat16"), "dtype": "bfloat16" if form == "bfloat16" else "auto"}
    given |= {"quantization": "int8"} if form == "int8" else {}
    parts: dict[str, tuple[tuple[str, ...], Callable[[], list[Row]]]] = {
        "starts": (("a start", "weights, s", "first token, s", "a token, ms"), lambda: starts(given, turns)),
        "memory": (("two processes", "one alone, Rss", "first, Pss", "second, Pss", "both"), lambda: memory(given)),
        "switches": (("a switch", "to bfloat16 as INT8, s", "to INT8 files, s"), lambda: switches(turns)),
    }
    for name in parts if part == "all" else [part]:
        head, run = parts[name]
        table = Table(*head, title=f"{name}, {form if name != 'switches' else 'INT8'}")
        for row in run():
            table.add_row(*row)
        Console().print(table)


if __name__ == "__main__":
    typer.run(main)
