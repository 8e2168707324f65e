"""How soon the first token comes if the cache has the beginning of the prompt already.

`python -m benchmarks.prefix` gives the embedded model prompts of 2,048 tokens, some new, some of which it knows the
first 90 %, in turn.
"""

import random
import statistics
import time
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from jaxserve import LLM, SamplingParams

ONE = SamplingParams(temperature=0, max_tokens=1)


def first_token(llm: LLM, prompt: list[int]) -> tuple[float, int]:
    """Seconds until it is there, and the tokens of the prompt that the cache had."""
    start = time.perf_counter()
    (result,) = llm.generate(prompt, ONE)
    return time.perf_counter() - start, result.num_cached_tokens


def main(
    tokens: Annotated[int, typer.Option(help="Of a prompt.")] = 2048,
    known: Annotated[float, typer.Option(help="Of a prompt, the share that is known.")] = 0.9,
    turns: Annotated[int, typer.Option(help="How often.")] = 15,
) -> None:
    """Prints the time to the first token of prompts that are new and of prompts that are known in part."""
    llm, rng = LLM(max_num_seqs=1, max_model_len=tokens + 64, num_pages=4 * tokens // 64), random.Random(0)
    draw = lambda count: [rng.randrange(2, llm.tokenizer.vocab_size) for _ in range(count)]  # noqa: E731
    new, again, found = [], [], 0
    for _ in track(range(turns), "asking", console=Console(stderr=True)):
        prompt = draw(tokens)
        new.append(first_token(llm, prompt)[0])
        same = int(known * tokens)
        seconds, found = first_token(llm, prompt[:same] + draw(tokens - same))
        again.append(seconds)
    table = Table(
        "prompt", "in the cache", "first token, ms (median)", "ratio", title=f"{tokens} tokens, {turns} turns"
    )
    cold, warm = statistics.median(new), statistics.median(again)
    table.add_row("new", "0", f"{1e3 * cold:.0f}", "1.00")
    table.add_row(f"{known:.0%} known", str(found), f"{1e3 * warm:.0f}", f"{warm / cold:.2f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
