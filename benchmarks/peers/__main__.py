"""jaxserve beside transformers, llama.cpp and mlx-lm on CPU: prefill and decode of one model, in one run.

`python -m benchmarks.peers --python PEERS/bin/python` measures those that the interpreter named has; with `--check` it
compares what they compute. Each works alone, in a process of its own, in turns; read the ratios.
"""

import itertools
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.peers import check as checks
from benchmarks.peers import report
from benchmarks.peers.files import make, need
from benchmarks.peers.job import Job
from benchmarks.peers.peer import PEERS, ROOT, Peer, PeerError, ask, lacks
from benchmarks.peers.report import Found
from jaxserve.bench.machine import hardware, software
from jaxserve.bench.models import MODELS
from jaxserve.parallel.errors import JaxserveError, RequestError

notes = Console(stderr=True, markup=False, highlight=False)


def main(
    model: Annotated[str, typer.Argument(help=f"A standard model: {', '.join(MODELS)}.")] = "bench-1b",
    python: Annotated[str, typer.Option(help="The interpreter in which the other libraries are.")] = sys.executable,
    only: Annotated[str | None, typer.Option(help="Some of them, like jaxserve,llama.cpp; else all.")] = None,
    batch: Annotated[str, typer.Option(help="Prompts at a time.")] = "1,4,16,64",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens that follow each.")] = 64,
    turns: Annotated[int, typer.Option(min=1, help="How often each is measured.")] = 3,
    patience: Annotated[float, typer.Option(help="Seconds; a batch that would take longer is left out.")] = 600,
    folder: Annotated[Path, typer.Option(help="Where models are written, once.")] = ROOT / "runs" / "peers",
    check: Annotated[bool, typer.Option("--check", help="Compare what they compute, of a tiny model.")] = False,
    table: Annotated[bool, typer.Option("--table", help="Show what was measured last, as Markdown.")] = False,
    out: Annotated[Path | None, typer.Option(help="Else benchmarks/results/peers-MODEL.json.")] = None,
) -> None:
    """Measures, and keeps what it found after each turn."""
    path = out or ROOT / "benchmarks" / "results" / f"peers-{model}.json"
    if model not in MODELS:
        raise RequestError(f"{model!r} is no standard model; there are {', '.join(MODELS)}")
    if table:
        print(report.markdown(report.rows(report.load(path))))
        return
    peers = there(chosen(only), python)
    if check:
        raise typer.Exit(not compare(model, peers, python))
    vocabulary = MODELS[model]["vocab_size"]
    job = Job(str(folder / model), "", sizes(batch), prompt_tokens, new_tokens, vocabulary, 0, patience)
    prepare(model, folder / model, peers)
    lengths = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "turns": turns}
    about = {"model": model, **lengths, "machine": hardware(), **software()}
    found = measure(model, peers, python, job, turns, lambda found: report.save(path, found, about))
    show(f"{model}: tokens/s, prompts of {prompt_tokens} tokens, {new_tokens} new ones each, medians of {turns}", found)


def sizes(text: str) -> tuple[int, ...]:
    """Batch sizes from text like 1,4,16."""
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise RequestError(f"--batch {text}: it must be whole numbers above 0, like 1,4,16")
    return found


def chosen(only: str | None) -> list[Peer]:
    """All, or those that are named."""
    known = {peer.name: peer for peer in PEERS}
    names = list(known) if only is None else only.split(",")
    if unknown := [name for name in names if name not in known]:
        raise RequestError(f"--only {only}: there is no {' and no '.join(unknown)}; there are {', '.join(known)}")
    return [known[name] for name in names]


def there(peers: Iterable[Peer], python: str) -> list[Peer]:
    """Those whose libraries are installed; how to install the others is told, in a line each."""
    found = []
    for peer in peers:
        if missing := lacks(peer, python):
            way = peer.install.format(python=python)
            notes.print(f"{peer.name} is left out: {python} has no {' and no '.join(missing)}. {way}", soft_wrap=True)
        else:
            found.append(peer)
    return found


def prepare(model: str, folder: Path, peers: Iterable[Peer]) -> None:
    """Writes what isn't there yet of the files that are read."""
    with notes.status(f"writing what is missing of {folder}"):
        make(model, folder)
        for peer in peers:
            need(peer, folder, peer.form)


def measure(
    model: str, peers: list[Peer], python: str, job: Job, turns: int, keep: Callable[[Mapping[str, Found]], None]
) -> dict[str, Found]:
    """All, in turns; what one fails at ends its part."""
    found = {peer.name: Found(peer.called) for peer in peers}
    failed: set[str] = set()
    with Progress(console=notes) as bar:
        shown = bar.add_task("", total=turns * len(peers) * len(job.batches))
        for turn, peer in itertools.product(range(turns), peers):
            bar.update(shown, description=peer.name)
            if peer.name not in failed:
                where = job.folder if peer.needs else model
                try:
                    for said in ask(peer, python, job._replace(folder=where, form=peer.form, seed=turn)):
                        found[peer.name].note(said, job)
                        bar.update(shown, advance="batch" in said)
                except PeerError as error:
                    notes.print(f"error: {error}", soft_wrap=True)
                    failed.add(peer.name)
                keep(found)
    return found


def show(title: str, found: Mapping[str, Found]) -> None:
    printed = Table(title=title, caption="ratio: how many times as many jaxserve has")
    for name, justify in zip(report.HEAD, report.JUSTIFY, strict=True):
        printed.add_column(name, justify=justify)
    for row in report.rows(found):
        printed.add_row(*row)
    Console().print(printed)


def compare(model: str, peers: Iterable[Peer], python: str) -> bool:
    """Prints whether each computes what transformers does; whether all do. Raises RequestError without transformers."""
    if not there([checks.REFERENCE], python):
        raise RequestError(
            f"--check compares with {checks.REFERENCE.name}; install it, or name the --python that has it"
        )
    title = f"a tiny {model}, beside transformers in float32"
    printed, holds = Table("library", "weights", "tokens alike", "log-probs differ by", "", title=title), True
    with notes.status("comparing"):
        for verdict in checks.verdicts(model, peers, python):
            same, total, difference = verdict.agreement
            holds = holds and verdict.holds
            exact = verdict.form == "float32"
            said = ("the same" if exact else "near") if verdict.holds else "NOT the same"
            called = verdict.form if exact else verdict.peer.called
            printed.add_row(verdict.peer.name, called, f"{same} of {total}", f"{difference:.1e}", said)
    Console().print(printed)
    return holds


if __name__ == "__main__":
    try:
        typer.run(main)
    except (JaxserveError, PeerError) as error:
        notes.print(f"error: {error}", soft_wrap=True)
        sys.exit(2)
