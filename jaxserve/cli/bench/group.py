"""`jaxserve bench`: collects its commands."""

import typer

from jaxserve.cli.bench.decode import decode
from jaxserve.cli.bench.model import model
from jaxserve.cli.bench.serve import serve

bench = typer.Typer(
    help="Measure a server, or how far from this machine's limits a model runs.",
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (serve, decode, model):
    bench.command()(_command)
