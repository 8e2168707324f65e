"""What pages that arrive do to answers that are being generated: they are copied to the device between two steps.

`python -m benchmarks.arrivals` has `bench-1b` in INT8 generate answers, and gives it prompts of 4,097 tokens meanwhile,
of which all but the last token is known: on the device, or in the memory tier of the context cache, from where pages
are brought. It prints the gaps between one output of an answer and the next while such a prompt is there; of the two,
the difference is what the pages cost.
"""

import time
from contextlib import closing
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.context_cache import ONE, Prompts, first_tokens
from jaxserve.bench.models import MODELS
from jaxserve.bench.models import random as random_model
from jaxserve.compilation import enable_cache
from jaxserve.context import make_connector
from jaxserve.engine import Engine
from jaxserve.models import resolve_dtype
from jaxserve.options import EngineConfig
from jaxserve.request import Request, SamplingParams
from jaxserve.tiers.limits import Limits
from jaxserve.tiers.store import StoreConfig

ANSWERS = 3
STEPS = 12
"""Of the answers, before a prompt comes; and that are measured if none does."""


def gaps(engine: Engine, prompt: list[int] | None) -> list[float]:
    """Seconds between one output of running answers and the next, from when a prompt comes until it has its token."""
    endless = SamplingParams(temperature=0, ignore_eos=True)
    names = [f"answer {number}" for number in range(ANSWERS)]
    for number, name in enumerate(names):
        engine.add(Request(name, tuple(range(2 + number, 34 + number)), endless))
    last, found = dict[str, float](), list[float]()
    for turn in range(2 * STEPS):
        if turn == STEPS:
            found.clear()
            if prompt:
                engine.add(Request("prompt", tuple(prompt), ONE))
        _step(engine, last, found)
    while prompt and "prompt" not in last:
        _step(engine, last, found)
    for name in names:
        engine.abort(name)
    while engine.busy:
        engine.step()
    return found


def _step(engine: Engine, last: dict[str, float], found: list[float]) -> None:
    outputs, now = engine.step(), time.perf_counter()
    for output in outputs:
        if output.error:
            raise SystemExit(output.error)
        if output.request_id in last:
            found.append(now - last[output.request_id])
        last[output.request_id] = now


def main(
    tokens: Annotated[int, typer.Option(min=128, help="Of a prompt.")] = 4097,
    turns: Annotated[int, typer.Option(min=1, help="Prompts of each kind.")] = 5,
) -> None:
    """Prints gaps between outputs: without a prompt, with one that is on the device, and with one that is brought."""
    enable_cache()
    longer = {"max_position_embeddings": tokens + 1023}
    subject = random_model("bench-1b", MODELS["bench-1b"] | longer, "int8", resolve_dtype("auto", {}))
    options = EngineConfig(max_num_seqs=ANSWERS + 1, max_model_len=tokens + 1023, num_speculative_tokens=0)
    prompts = Prompts(subject.cfg.vocab_size, tokens, 1, options.page_size)
    connector = make_connector(subject.model, subject.cfg, options, StoreConfig(memory=Limits(8 << 30)))
    assert connector is not None
    with closing(connector):
        engine = Engine(subject.model, subject.cfg, subject.tokenizer, options, connector=connector)
        first_tokens(engine, prompts.known)
        connector.flush()
        found: dict[str, list[float]] = {"none": [], "on the device": [], "from memory": []}
        for name in track(list(found) * turns, "asking", console=Console(stderr=True)):
            if name == "from memory":
                engine.reset_prefix_cache()
            found[name] += gaps(engine, None if name == "none" else prompts.known[0])
    nbytes = (tokens - 1) // options.page_size * connector.layout.page_bytes
    Console().print(as_table(found, f"{ANSWERS} answers; prompts of {tokens:,} tokens, {nbytes / 2**20:,.0f} MiB"))


def as_table(found: dict[str, list[float]], title: str) -> Table:
    table = Table("a prompt's pages are", "gap, ms (median)", "99 %", "longest", title=title)
    for name, each in found.items():
        values = 1e3 * np.array([*np.percentile(each, (50, 99)), max(each)])
        table.add_row(name, *(f"{value:,.1f}" for value in values))
    return table


if __name__ == "__main__":
    typer.run(main)
