"""`jaxserve eval`: score a model."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from jaxserve.cli.options import ApiKeyOption, DtypeOption, ModelArgument, QuantizationOption, UrlOption, check_file
from jaxserve.cli.show import print_table, progress
from jaxserve.parallel.errors import RequestError

if TYPE_CHECKING:
    from jaxserve.checkpoints.evaluation.suite import Evaluation


def evaluate(
    model: ModelArgument = None,
    against: Annotated[
        str | None, typer.Option(help="Compare with this model, or with results that --out wrote.")
    ] = None,
    dtype: DtypeOption = "auto",
    quantization: QuantizationOption = None,
    against_quantization: Annotated[
        Literal["none", "int8"] | None,
        typer.Option(help="Of the model to compare with; without --against, that is the same model."),
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Only these, with commas between them: keyword,bracket.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="So many items of each task, for a quick look.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write scores and all items to this file, as JSON.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print scores as JSON, for programs.")] = False,
    url: UrlOption = None,
    served: Annotated[
        str | None, typer.Option("--model", "-m", help="The model's name at the server; else the first it lists.")
    ] = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Scores a model on fourteen tasks of Python code, made from modules of the standard library.

    They are the modules held out from the embedded model's training. Of two models each item is compared with itself,
    so that small differences show: A is the model, B the one to compare with. A model behind a server (--url) is asked
    over HTTP, with the tokenizer of the folder; the scores are the same.

    jaxserve eval

    jaxserve eval Qwen/Qwen3-0.6B --limit 50 --tasks keyword,name

    jaxserve eval path/to/model --quantization int8 --against path/to/model

    jaxserve eval --out float.json

    jaxserve eval --quantization int8 --against float.json

    jaxserve eval Qwen/Qwen3-0.6B --url http://127.0.0.1:8000 --limit 50
    """
    from jaxserve.checkpoints.evaluation import results, suite
    from jaxserve.checkpoints.hub import TOKENIZER_FILES, WANTED, locate
    from jaxserve.evaluate import evaluate

    check_file("--out", out)
    some = suite.chosen_tasks(tasks.replace(" ", "").split(",") if tasks else None)
    other = None
    if against and Path(against).is_file():
        if against_quantization:
            raise RequestError(f"--against-quantization is for a model, and {against} is a file; leave it out")
        other = results.read(Path(against))
        suite.check_items(suite.fingerprints(some, limit), other)
    both = other is None and bool(against or against_quantization)
    _check_place(url, served, quantization, None if both else dtype)
    with progress() as shown:
        locate(model, TOKENIZER_FILES if url else WANTED)  # a name that is wrong is told before the first is scored
        if both:
            locate(against or model)
        if url:
            found = _ask_server(url, api_key, served, model, some, limit, shown)
        else:
            found = evaluate(model, dtype, quantization, some, limit, shown)
        if out:
            results.save(out, found)
        if both:
            int8 = "int8" if against_quantization == "int8" else None
            other = evaluate(against or model, dtype, int8, some, limit, shown)
    _print_evaluation(found, other, as_json)


def _check_place(url: str | None, served: str | None, quantization: str | None, dtype: str | None) -> None:
    """Raises RequestError for what has no meaning for a model at a server, or without one."""
    if served and not url:
        raise RequestError(f"--model {served} is a name at a server; give --url too, or a folder without --model")
    here = {"--quantization": quantization, "--dtype": None if dtype == "auto" else dtype}
    if url and (given := [name for name, value in here.items() if value]):
        raise RequestError(f"{given[0]} is for a model in this process; leave it out, or --url")


def _ask_server(url: str, api_key: str | None, *asked: Any) -> "Evaluation":
    from jaxserve.client import Client
    from jaxserve.evaluate import evaluate_server

    with Client(url, api_key) as client:
        return evaluate_server(client, *asked)


def _print_evaluation(found: "Evaluation", other: "Evaluation | None", as_json: bool) -> None:
    from jaxserve import evaluate
    from jaxserve.checkpoints.evaluation import results, suite

    differences = suite.compare(found, other) if other else {}
    if as_json:
        content = results.as_json(found)
        if other:
            content["against"] = results.as_json(other)
            content["differences"] = results.differences_as_json(differences)
        typer.echo(json.dumps(content, indent=2))
        return
    if other:
        typer.echo(f"A: {evaluate.title(found)}")
        rows = evaluate.difference_rows(found, other, differences)
        print_table(f"B: {evaluate.title(other)}", rows, "right", evaluate.DIFFERENCES)
    else:
        print_table(evaluate.title(found), evaluate.score_rows(found), "right", evaluate.SCORES)
    typer.echo(evaluate.note(found, other) if other else evaluate.note(found))
