"""`jaxserve bench`: collects its commands."""

import typer

from jaxserve.cli.bench.decode import decode
from jaxserve.cli.bench.layers import layers
from jaxserve.cli.bench.model import model
from jaxserve.cli.bench.prefill import prefill
from jaxserve.cli.bench.serve import serve
from jaxserve.cli.bench.startup import startup
from jaxserve.cli.bench.throughput import throughput

bench = typer.Typer(
    help="Measure a server, or how far from this machine's limits a model runs.",
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (serve, decode, prefill, throughput, startup, layers, model):
    bench.command()(_command)
