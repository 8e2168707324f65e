"""The command line. Heavy imports wait until a command needs them, so that help is instant."""

import secrets
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from jaxserve.llm import LLM
    from jaxserve.request import SamplingParams

app = typer.Typer(
    help="Serve mixture-of-experts language models with JAX.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
notes = Console(stderr=True)

ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", help="Folder of a Hugging Face model, or its name on the hub (without it, the embedded one)."
    ),
]
DtypeOption = Annotated[
    str, typer.Option(help="float32, bfloat16, float16; auto: the checkpoint's own, on CPU float32.")
]


def main() -> None:
    """Runs a command; what is wrong with its input is told in one line, with exit status 2."""
    from jaxserve.parallel.errors import JaxserveError

    try:
        app()
    except JaxserveError as error:
        notes.print("[bold red]error:[/]", escape(str(error)), highlight=False, soft_wrap=True)
        sys.exit(2)


@app.callback()
def _commands() -> None:
    pass


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads it from standard input.")],
    model: ModelOption = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable token; higher is more varied.")] = 0.6,
    top_p: Annotated[float, typer.Option(help="Draw from the most probable tokens that reach this mass.")] = 0.9,
    top_k: Annotated[int, typer.Option(help="Draw from this many most probable tokens; 0: all.")] = 0,
    min_p: Annotated[float, typer.Option(help="Draw from tokens this probable, relative to the most probable.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Repeats what was drawn; without it, another each time.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="A text that ends the answer; may be given several times.")
    ] = None,
    dtype: DtypeOption = "auto",
) -> None:
    """Continues a prompt and streams the text.

    jaxserve generate "def quicksort(items):"

    jaxserve generate -m Qwen/Qwen3-0.6B --temperature 0.7 --top-p 0.9 "The supernode"
    """
    from jaxserve.request import SamplingParams

    seed = secrets.randbelow(2**32) if seed is None else seed
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        seed=seed,
        stop=stop or (),
    )
    with _loading() as progress:
        from jaxserve.llm import LLM

        llm = LLM(model, dtype=dtype, max_num_seqs=1, progress=progress)
    _stream(llm, sys.stdin.read() if prompt == "-" else prompt, params)


def _stream(llm: "LLM", prompt: str, params: "SamplingParams") -> None:
    """Prints the prompt and what follows it as it comes, then how fast it was."""
    from jaxserve.stopwatch import Stopwatch

    outputs = llm.stream(prompt, params)  # refuses what can't be served before anything is shown
    watch = Stopwatch()
    sys.stdout.write(prompt)
    sys.stdout.flush()
    for output in outputs:
        watch.count(len(output.token_ids))
        sys.stdout.write(output.text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    notes.print(f"\n[dim]{watch.summary(llm)} | seed {params.seed}[/]", highlight=False, soft_wrap=True)


@contextmanager
def _loading():
    """A progress bar of bytes loaded."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("[dim]{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=notes, transient=True) as bar:
        task = bar.add_task("loading the model", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@app.command()
def info(
    model: Annotated[str | None, typer.Argument(help="Folder or hub name; without it, the embedded model.")] = None,
    dtype: Annotated[str, typer.Option(help="Of weights and cache, for the memory they take.")] = "bfloat16",
) -> None:
    """Shows a model's architecture, its parameters by part, and the memory of weights and cache.

    Reads config.json alone: the weights need not be there.
    """
    from jaxserve.checkpoints.hf import read_json
    from jaxserve.checkpoints.hub import locate
    from jaxserve.describe import architecture, memory, parts
    from jaxserve.layers.config import Config
    from jaxserve.llm import resolve_dtype

    folder = locate(model, wanted=("config.json",))
    raw = read_json(folder)
    cfg, kind = Config.from_hf(raw), resolve_dtype(dtype, raw)
    console = Console()
    for title, rows in (
        (f"{cfg.model_type}  {folder}", architecture(cfg)),
        ("parameters", parts(cfg)),
        (f"memory in {kind}", memory(cfg, kind)),
    ):
        table = Table(
            title=title, title_justify="left", title_style="bold", show_header=False, box=None, padding=(0, 2)
        )
        for row in rows:
            table.add_row(*row)
        console.print(table, "")


if __name__ == "__main__":
    main()
