"""From a process's start to its first token, in processes of their own: where the time goes.

Nothing heavy is imported here: the process that is measured begins with this module.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxserve.parallel.errors import EngineError

Progress = Callable[[int, int], None]
Stages = dict[str, float]
"""Seconds of each, in order: they add up to all of it."""

CHILD = "import time; began = time.time(); from jaxserve.bench.startup import child; child(began)"
IMPORTS = {"import jaxserve": "import jaxserve", "from jaxserve import LLM": "from jaxserve import LLM"}
PROMPT = "def add(a, b):"


class Startup(NamedTuple):
    """What starts took."""

    cold: Stages  # nothing compiled before
    warm: list[Stages]  # with what the first has compiled
    imports: dict[str, list[float]]  # seconds of processes that do nothing else, and of one that does nothing


def measure(
    model: str | None, quantization: str | None, repetitions: int, progress: Progress = lambda done, total: None
) -> Startup:
    """Starts one process with an empty cache of programs, and more with what it has left there."""
    total, statements = repetitions + 1 + len(IMPORTS) + 1, {"nothing": "", **IMPORTS}
    with tempfile.TemporaryDirectory() as cache:
        runs = []
        for done in range(1 + repetitions):
            progress(done, total)
            runs.append(start(model, quantization, Path(cache)))
    imports = {}
    for done, (name, code) in enumerate(statements.items(), start=1 + repetitions):
        progress(done, total)
        imports[name] = [_seconds(code) for _ in range(repetitions)]
    return Startup(runs[0], runs[1:], imports)


def start(model: str | None, quantization: str | None, cache: Path) -> Stages:
    """A process that loads the model and says a token. Raises EngineError, with its words, if it fails."""
    given = {"model": model, "quantization": quantization}
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    began = time.time()
    ended = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(given)],
        env=environment | {"XDG_CACHE_HOME": str(cache)},
        capture_output=True,
        text=True,
    )
    if ended.returncode:
        last = ended.stderr.strip().splitlines()[-1:] or ["no reason given"]
        raise EngineError(f"the process that was to be measured failed: {last[0]}")
    return stages(began, json.loads(ended.stdout.splitlines()[-1]))


def stages(began: float, stamps: Mapping[str, float]) -> Stages:
    """The time before each stamp and after the one before it."""
    times = [began, *stamps.values()]
    return {name: after - before for name, before, after in zip(stamps, times, times[1:], strict=False)}


def child(began: float) -> None:
    """The process that is measured: prints when what was done, as seconds of the clock on the wall."""
    stamps = {"interpreter": began}
    given = json.loads(sys.argv[1])

    def stamp(name: str) -> None:
        stamps[name] = time.time()

    from jaxserve import LLM, SamplingParams

    stamp("imports")
    import jax

    jax.devices()
    stamp("JAX's device")
    names = {"loading": "weights and tokenizer", "compiling": "compiling"}

    def told(stage: str, done: int, total: int) -> None:
        if stage == "compiling" and "engine" not in stamps:
            stamp("engine")
        stamp(names[stage])

    llm = LLM(given["model"], quantization=given["quantization"], progress=told)
    stamp("ready")
    next(iter(llm.stream(PROMPT, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))))
    stamp("first token")
    print(json.dumps(stamps))


def _seconds(code: str) -> float:
    """Of a process that runs this."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - began


def rows(found: Startup) -> list[tuple[str, ...]]:
    """Seconds of each stage and of all: cold, warm, and the spread of that; then of imports alone."""
    table = [_row(name, f"{found.cold[name]:.2f}", [run[name] for run in found.warm]) for name in found.cold]
    cold, warm = sum(found.cold.values()), [sum(run.values()) for run in found.warm]
    table.append(_row("from start to first token", f"{cold:.2f}", warm))
    return table + [_row(f"alone: {name}", "", seconds) for name, seconds in found.imports.items()]


def _row(name: str, cold: str, warm: Sequence[float]) -> tuple[str, ...]:
    from jaxserve.bench.roofline import percentiles

    middle, low, high = percentiles(warm)
    return name, cold, f"{middle:.2f}", f"{low:.2f}-{high:.2f}"
