"""What the context cache saves: prompts of which a part was computed before, found in each of its tiers.

`python -m benchmarks.context_cache` asks `bench-1b` in INT8 for the first token of prompts of 4,096 tokens: one alone,
and some at once. A share of each was computed before and is in one tier, but not on the device; so nothing is shared
that does not come from there. In turns, medians; beside an engine without context cache.
"""

import gc
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import stores
from jaxserve.bench.models import MODELS, Subject
from jaxserve.bench.models import random as random_model
from jaxserve.compilation import enable_cache
from jaxserve.connector import Connector
from jaxserve.context import make_connector
from jaxserve.engine import Engine
from jaxserve.models import resolve_dtype
from jaxserve.options import EngineConfig
from jaxserve.request import Request, SamplingParams
from jaxserve.tiers.limits import Limits
from jaxserve.tiers.store import StoreConfig, open_store

ONE = SamplingParams(temperature=0, max_tokens=1)
NOTHING = Limits(1)
"""For a memory tier that keeps nothing, so that what is found comes from behind it."""
WAIT = 600.0


class Asked(NamedTuple):
    """Prompts that were answered."""

    first: float  # seconds to the first token of one alone
    throughput: float  # tokens a second of prompts that came all at once
    known: int  # tokens of the one alone that were not computed


def first_tokens(engine: Engine, prompts: Sequence[Sequence[int]]) -> tuple[float, int]:
    """Seconds until all prompts, which come at once, have their first token; tokens of the first that were known."""
    began, known = time.perf_counter(), 0
    for number, prompt in enumerate(prompts):
        engine.add(Request(str(number), tuple(prompt), ONE))
    while engine.busy:
        for output in engine.step():
            if output.error:
                raise SystemExit(output.error)
            known = output.num_cached_tokens if output.request_id == "0" else known
    return time.perf_counter() - began, known


class Prompts:
    """Random ones of so many tokens, of which a share is known: the beginning of one of those computed before."""

    def __init__(self, vocabulary: int, tokens: int, count: int, page_size: int):
        self._rng, self._vocabulary, self._tokens, self._page = random.Random(0), vocabulary, tokens, page_size
        self.known = [self._draw(tokens) for _ in range(count)]
        """Those to compute before."""

    def with_known(self, share: float) -> list[list[int]]:
        """One for each that is known."""
        same = int(share * self._tokens) // self._page * self._page
        return [each[:same] + self._draw(self._tokens - same) for each in self.known]

    def _draw(self, count: int) -> list[int]:
        return [self._rng.randrange(2, self._vocabulary) for _ in range(count)]


def ask(engine: Engine, connector: Connector | None, prompts: Prompts, share: float) -> Asked:
    """One prompt alone, then all together; of other prompts with the same known part."""
    engine.reset_prefix_cache()
    seconds, known = first_tokens(engine, prompts.with_known(share)[:1])
    engine.reset_prefix_cache()
    if connector:
        connector.flush()
    together = prompts.with_known(share)
    whole, _ = first_tokens(engine, together)
    if connector and connector.store:
        connector.flush()
        connector.store.flush(WAIT)  # what is written is not in the way of whoever comes next
    return Asked(seconds, sum(map(len, together)) / whole, known)


def tiers(folder: Path, url: str | None) -> dict[str, StoreConfig]:
    """Stores in each of which one tier answers."""
    found = {
        "memory": StoreConfig(memory=Limits(8 << 30)),
        "disk": StoreConfig(memory=NOTHING, folder=folder, queue_bytes=2 << 30),
        "shared": StoreConfig(memory=NOTHING, url=url, queue_bytes=2 << 30),
    }
    return {name: config for name, config in found.items() if name != "shared" or url}


def make(subject: Subject, options: EngineConfig, connector: Connector | None) -> Engine:
    return Engine(subject.model, subject.cfg, subject.tokenizer, options, connector=connector)


def main(
    tokens: Annotated[int, typer.Option(min=128, help="Of a prompt.")] = 4096,
    count: Annotated[int, typer.Option(min=1, help="Prompts at once.")] = 2,
    turns: Annotated[int, typer.Option(min=1, help="How often each is asked.")] = 3,
) -> None:
    """Prints the time to the first token, and the throughput of prompts, by tier and by the share that is known."""
    enable_cache()
    longer = {"max_position_embeddings": tokens + 64}
    subject = random_model("bench-1b", MODELS["bench-1b"] | longer, "int8", resolve_dtype("auto", {}))
    options = EngineConfig(max_num_seqs=count, max_model_len=tokens + 64, num_speculative_tokens=0)
    prompts = Prompts(subject.cfg.vocab_size, tokens, count, options.page_size)
    shares, found = (0.0, 0.5, 0.9), dict[tuple[str, float], list[Asked]]()
    with ExitStack() as stack:
        folder, server = Path(stack.enter_context(tempfile.TemporaryDirectory())), stack.enter_context(stores.server())
        configs = tiers(folder / "pages", server and server.url)
        connector = make_connector(subject.model, subject.cfg, options, StoreConfig(memory=NOTHING))
        assert connector is not None and connector.store is not None
        stack.callback(connector.close)
        plain, engine = make(subject, options, None), make(subject, options, connector)
        connector.store.close()
        opened = {name: open_store(config) for name, config in configs.items()}
        cases = [("none", 0.0), *((name, share) for name in configs for share in shares)]
        for name in opened:  # each is given what is known
            connector.store = opened[name]
            engine.reset_prefix_cache()
            first_tokens(engine, prompts.known)
            connector.flush()
            connector.store.flush(WAIT)
        first_tokens(plain, prompts.known)
        for name, share in track(cases * turns, "asking", console=Console(stderr=True)):
            connector.store = opened.get(name, connector.store)
            subjects = (plain, None) if name == "none" else (engine, connector)
            found.setdefault((name, share), []).append(ask(*subjects, prompts, share))
            gc.collect()
        for store in opened.values():
            if store is not connector.store:
                store.close()
    Console().print(as_table(found, tokens, turns, count))
    if server is None:
        Console(stderr=True).print(f"shared: none of {', '.join(stores.PROGRAMS)} is installed")


def as_table(found: dict[tuple[str, float], list[Asked]], tokens: int, turns: int, count: int) -> Table:
    """Medians, and how they are beside those without a context cache."""
    table = Table(
        "tier", "known", "first token, s", "less by", "tokens/s", "ratio",
        title=f"prompts of {tokens:,} tokens, {count} at once for tokens/s; medians of {turns}",
    )  # fmt: skip
    median = lambda key, field: statistics.median(getattr(each, field) for each in found[key])  # noqa: E731
    base = median(("none", 0.0), "first"), median(("none", 0.0), "throughput")
    for name, share in found:
        first, throughput = median((name, share), "first"), median((name, share), "throughput")
        known = found[name, share][-1].known
        less = f"{1 - first / base[0]:.0%}", f"{throughput / base[1]:.2f}"
        table.add_row(name, f"{known:,}", f"{first:.2f}", less[0], f"{throughput:,.0f}", less[1])
    return table


if __name__ == "__main__":
    typer.run(main)
