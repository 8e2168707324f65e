"""What a prompt that takes long does to answers that are being generated: in one engine, and in a fleet.

`python -m benchmarks.disaggregation` lets the embedded model generate answers, and gives it a prompt meanwhile that is
held up on purpose for some seconds. It prints the gaps between one output of an answer and the next.
"""

import time
from collections.abc import Callable
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from jaxserve import SamplingParams
from jaxserve import options as sizes
from jaxserve.checkpoints import hf
from jaxserve.checkpoints.hub import EMBEDDED
from jaxserve.compilation import enable_cache
from jaxserve.connector import Connector
from jaxserve.engine import Engine
from jaxserve.fleet.fleet import Fleet
from jaxserve.fleet.instance import Local, about
from jaxserve.layout import PageLayout
from jaxserve.options import EngineConfig
from jaxserve.peers import Peers
from jaxserve.request import Request
from jaxserve.serving import Serving
from jaxserve.tokenizer import Tokenizer

OPTIONS = EngineConfig(max_num_seqs=8, max_model_len=1024, max_num_batched_tokens=128, num_speculative_tokens=0)
ANSWERS = 4


def engines(names: list[str]) -> dict[str, Engine]:
    """Engines of the embedded model that can hand each other pages."""
    cfg, model = hf.load(EMBEDDED)
    layout, tokenizer = PageLayout(sizes.cache_of(cfg, OPTIONS, 1, np.float32)), Tokenizer.from_folder(EMBEDDED)
    made = {}
    for name in names:
        connector = Connector(layout, OPTIONS.page_size, peers=Peers(b"token", name), exports=True)
        made[name] = Engine(model, cfg, tokenizer, OPTIONS, connector=connector)
    return made


def delay(engine: Engine, seconds: float) -> Callable[[], None]:
    """Has each step with a prompt take so much longer; what is returned ends that."""
    prefill = engine._prefill

    def later(*given):
        time.sleep(seconds)
        return prefill(*given)

    engine._prefill = later  # type: ignore[method-assign]
    return lambda: delattr(engine, "_prefill")


def gaps(serving: Serving, slow: Engine, tokens: int, seconds: float, prompts: int) -> list[float]:
    """Seconds between one token and the next of running answers, while prompts come that are held up."""
    how = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    for number in range(ANSWERS):
        serving.add(Request(f"answer {number}", tuple(range(2 + number, 34 + number)), how))
    last, found, undo, asked, began = dict[str, float](), list[float](), None, 0, time.perf_counter()
    while serving.busy:
        outputs, now = serving.step(), time.perf_counter()
        for output in outputs:
            if output.request_id.startswith("answer") and output.token_ids:
                if undo and output.request_id in last:
                    found.append(now - last[output.request_id])
                last[output.request_id] = now
        if len(last) == ANSWERS and asked < prompts and now - began > asked * seconds:
            undo = undo or delay(slow, seconds)
            prompt = tuple(range(100 + asked, 200 + asked))
            serving.add(Request(f"prompt {asked}", prompt, SamplingParams(temperature=0, max_tokens=1)))
            asked += 1
    if undo:
        undo()
    return found


def main(
    tokens: Annotated[int, typer.Option(min=64, help="Of each of four answers.")] = 900,
    seconds: Annotated[float, typer.Option(min=0.0, help="That a prompt is held up.")] = 2.0,
    prompts: Annotated[int, typer.Option(min=1, help="That are held up.")] = 1,
) -> None:
    """Prints gaps between outputs: without a prompt, with one that is held up in a fleet, and in one engine."""
    enable_cache()
    made = engines(["prefill", "decode", "alone"])
    fleet = Fleet(made["alone"].cfg, Tokenizer.from_folder(EMBEDDED), made["alone"].max_model_len)
    for role in ("prefill", "decode"):
        fleet.join(Local(made[role], about(made[role], role, role)))
    cases: dict[str, tuple[Serving, Engine, float]] = {
        "a fleet, no delay": (fleet, made["prefill"], 0.0),
        f"a fleet, {seconds:g} s": (fleet, made["prefill"], seconds),
        "one engine, no delay": (made["alone"], made["alone"], 0.0),
        f"one engine, {seconds:g} s": (made["alone"], made["alone"], seconds),
    }
    for serving, slow, _ in cases.values():
        gaps(serving, slow, 64, 0.0, 1)  # compiles
    table = Table(
        "prompts are held up in", "gap, ms (median)", "99 %", "longest", title=f"{ANSWERS} answers, {prompts} prompts"
    )
    for name, (serving, slow, held) in cases.items():
        found = [1e3 * gap for gap in gaps(serving, slow, tokens, held, prompts)]
        table.add_row(name, *(f"{value:,.1f}" for value in (*np.percentile(found, (50, 99)), max(found))))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
