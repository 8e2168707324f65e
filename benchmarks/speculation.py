"""What multi-token prediction is worth on text the embedded model was not trained on: tokens a step, and speed.

`python -m benchmarks.speculation` continues the beginnings of the held-out modules, greedily, without guesses and with
one or two, in turn: whatever else the machine does, it does to all alike.
"""

import itertools
import statistics
import time
from typing import Annotated, NamedTuple

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from jaxserve import LLM, SamplingParams
from jaxserve.checkpoints.embedded import corpus


class Run(NamedTuple):
    """One prompt's continuation."""

    seconds: float
    rows: int  # steps of decoding
    held: int  # guesses that counted


class Worth(NamedTuple):
    """What guesses change, over all prompts."""

    tokens_a_step: float
    tokens_a_second: float
    speedup: float  # against no guesses, the median over prompts


def worth(runs: list[Run], without: list[Run], tokens: int) -> Worth:
    """Of the runs of each prompt, `tokens` new ones each; `without` are those with no guesses."""
    rows = sum(run.rows for run in runs)
    return Worth(
        tokens_a_step=(rows + sum(run.held for run in runs)) / rows,
        tokens_a_second=tokens * len(runs) / sum(run.seconds for run in runs),
        speedup=statistics.median(slow.seconds / fast.seconds for slow, fast in zip(without, runs, strict=True)),
    )


def measure(llm: LLM, prompt: list[int], how: SamplingParams) -> Run:
    """Continues a prompt, and counts."""
    counters = llm.engine.counters
    rows, held, start = counters.decoded_rows, sum(counters.accepted), time.perf_counter()
    llm.generate(prompt, how)
    seconds = time.perf_counter() - start
    return Run(seconds, counters.decoded_rows - rows, sum(counters.accepted) - held)


def beginnings(llm: LLM, tokens: int) -> list[list[int]]:
    """The first tokens of each held-out module that has so many."""
    _, held_out = corpus.split(corpus.modules())
    ids = [llm.tokenizer.encode(module.text)[:tokens] for module in held_out]
    return [prompt for prompt in ids if len(prompt) == tokens]


def main(
    modules: Annotated[int, typer.Option(help="Held-out modules to continue; 0: all.")] = 0,
    begin: Annotated[int, typer.Option(help="Tokens of each that are the prompt.")] = 64,
    tokens: Annotated[int, typer.Option(help="Tokens to continue it by.")] = 128,
    turns: Annotated[int, typer.Option(help="How often.")] = 3,
    entropy: Annotated[float, typer.Option(help="The gate: guesses less sure, in nats, are not verified.")] = 2.0,
    guesses: Annotated[int, typer.Option(min=1, max=8, help="Most guesses a step; none and fewer are run too.")] = 2,
) -> None:
    """Prints tokens a step and tokens a second, with and without guesses."""
    console, keys = Console(stderr=True), range(1 + guesses)
    size = {"max_num_seqs": 1, "max_model_len": begin + tokens, "speculation_entropy": entropy}
    llms = {k: LLM(num_speculative_tokens=k, **size) for k in track(keys, "loading", console=console)}
    how = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    prompts = beginnings(llms[0], begin)[: modules or None]
    for llm in llms.values():
        llm.generate(prompts[0], how)  # whatever is done but once
    runs: dict[int, list[Run]] = {k: [] for k in keys}
    jobs = [(prompt, k) for _, prompt, k in itertools.product(range(turns), prompts, keys)]
    for prompt, k in track(jobs, "continuing", console=console):
        runs[k].append(measure(llms[k], prompt, how))
    columns = "guesses", "tokens a step", "tokens/s", "speed-up (median)"
    table = Table(*columns, title=f"{len(prompts)} prompts, turns: {turns}")
    for k in keys:
        each = worth(runs[k], runs[0], tokens)
        table.add_row(str(k), f"{each.tokens_a_step:.2f}", f"{each.tokens_a_second:.0f}", f"{each.speedup:.2f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
