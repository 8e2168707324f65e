"""The command line's root: it collects the commands, and ends the program as a terminal expects."""

import io
import os
import sys
import warnings
from typing import Annotated, Any, NoReturn

import typer
from rich.text import Text

import jaxserve
from jaxserve.cli.bench.group import bench
from jaxserve.cli.chat import chat
from jaxserve.cli.evaluate import evaluate
from jaxserve.cli.generate import generate
from jaxserve.cli.info import info
from jaxserve.cli.models import models
from jaxserve.cli.plan import plan
from jaxserve.cli.quantize import quantize
from jaxserve.cli.serve import serve
from jaxserve.cli.show import notes
from jaxserve.cli.up import up
from jaxserve.parallel.errors import JaxserveError

app = typer.Typer(
    help="Serve mixture-of-experts language models with JAX.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # Rich's help cuts the names of options where the terminal is narrow
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (generate, chat, serve, up, info, quantize, plan):
    app.command()(_command)
app.command("eval")(evaluate)
app.add_typer(bench, name="bench")
app.add_typer(models, name="models")

VersionOption = Annotated[bool, typer.Option("--version", help="Show the version and exit.")]


def main() -> NoReturn:
    """Runs a command and exits: with 130 after Ctrl-C, with 1 if its output can't be written.

    What is wrong with its input is told in one line, with status 2.
    """
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    sys.unraisablehook = _end_if_interrupted
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for a terminal that knows ASCII alone, say
    try:
        sys.exit(app(standalone_mode=False))
    except typer.TyperException as error:
        _fail(f"{error.format_message().rstrip('.')}; --help lists what there is", 2)
    except JaxserveError as error:
        _fail(str(error), 2)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python tries again to write what is left, and complains
        _fail(str(error), 1)


def _end_if_interrupted(unraisable: Any) -> None:
    """Ctrl-C that falls into one of JAX's callbacks, which can't pass it on, ends the program all the same."""
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        return sys.__unraisablehook__(unraisable)
    notes.show_cursor()
    os._exit(130)


def _fail(message: str, status: int) -> NoReturn:
    notes.print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)
    sys.exit(status)


@app.callback(invoke_without_command=True)
def _jaxserve(context: typer.Context, version: VersionOption = False) -> None:
    if version:
        typer.echo(f"jaxserve {jaxserve.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)
