"""How much faster answers come together than alone, and what share of a step the device waits for the host.

`python -m benchmarks.batch` lets the embedded model answer 1, 4, 16 and 64 prompts at a time. The host plans a step and
reads the one before while the device works; what counts as its share is the time in which the device had nothing to do.
"""

import statistics
import time
from typing import Annotated, NamedTuple

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from jaxserve import LLM, SamplingParams


class Run(NamedTuple):
    """One batch, from the first prompt to the last token."""

    tokens_a_second: float
    host: float  # of the time of steps, how much was planning, launching, and reading
    exposed: float  # of it, how much the device had to wait for


def measure(llm: LLM, size: int, how: SamplingParams) -> Run:
    """Answers so many prompts at once."""
    before, counters, start = vars(llm.engine.counters).copy(), llm.engine.counters, time.perf_counter()
    prompts = [[2 + place] * 8 for place in range(size)]
    tokens = sum(len(result.outputs[0].token_ids) for result in llm.generate(prompts, how))
    seconds = time.perf_counter() - start
    grown = {name: vars(counters)[name] - before[name] for name in before if name.endswith("_seconds")}
    host = grown["schedule_seconds"] + grown["read_seconds"]
    return Run(tokens / seconds, host / grown["step_seconds"], grown["exposed_seconds"] / grown["step_seconds"])


def main(
    tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 256,
    turns: Annotated[int, typer.Option(help="How often.")] = 5,
) -> None:
    """Prints tokens a second and the host's share by the size of the batch."""
    sizes = (1, 4, 16, 64)
    llm = LLM(max_num_seqs=max(sizes), max_model_len=tokens + 16)
    how = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    for size in sizes:
        measure(llm, size, how)  # whatever is done but once
    jobs = [size for _ in range(turns) for size in sizes]
    runs: dict[int, list[Run]] = {size: [] for size in sizes}
    for size in track(jobs, "answering", console=Console(stderr=True)):
        runs[size].append(measure(llm, size, how))
    table = Table("answers at a time", "tokens/s", "host, of a step", "exposed, of a step", title=f"medians of {turns}")
    for size in sizes:
        speed, host, exposed = (statistics.median(column) for column in zip(*runs[size], strict=True))
        table.add_row(str(size), f"{speed:,.0f}", f"{host:.1%}", f"{exposed:.1%}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
