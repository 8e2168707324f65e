"""Turns a training run into the model that ships: `python -m jaxserve.checkpoints.embedded.export runs/embedded`."""

import json
import platform
import shutil
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import typer

from jaxserve.checkpoints import hf
from jaxserve.checkpoints.embedded import corpus
from jaxserve.checkpoints.embedded.evaluate import Report, evaluate
from jaxserve.checkpoints.embedded.train import CONFIG
from jaxserve.checkpoints.hub import EMBEDDED
from jaxserve.layers.config import Config
from jaxserve.layers.transformer import Model, model_params
from jaxserve.parallel.sharding import abstract
from tokenizers import Tokenizer

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
"""The model continues code and was taught no conversation: its chat is what was said, to be continued."""


def trained_weights(run: Path, step: int | None) -> tuple[int, Model]:
    """The weights of a checkpoint, the newest by default, and its step."""
    with ocp.CheckpointManager((run / "checkpoints").absolute()) as checkpoints:
        at = checkpoints.latest_step() if step is None else step
        target = abstract(model_params(Config.from_hf(CONFIG)))
        arguments = ocp.args.PyTreeRestore({"params": target}, partial_restore=True)
        return at, checkpoints.restore(at, args=arguments)["params"]


def export(
    run: Annotated[Path, typer.Argument(help="Folder of a training run.")],
    out: Annotated[Path, typer.Option(help="Where the model goes.")] = EMBEDDED,
    step: Annotated[int | None, typer.Option(help="Which checkpoint; the newest by default.")] = None,
) -> None:
    """Writes weights in BF16, config, tokenizer, loss curve and model card; the card's numbers are measured here."""
    at, weights = trained_weights(run, step)
    cfg, described = Config.from_hf(CONFIG), model_params(Config.from_hf(CONFIG), jnp.bfloat16)
    hf.save(out, jax.tree.map(lambda w, p: w.astype(p.dtype), weights, described), cfg, CONFIG)
    shutil.copy(run / "tokenizer.json", out / "tokenizer.json")
    settings = {"bos_token": corpus.BEGIN, "eos_token": corpus.END, "add_bos_token": True, "chat_template": TEMPLATE}
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    points = [json.loads(line) for line in (run / "curve.jsonl").read_text().splitlines()]
    plot([p for p in points if p["step"] <= at], out / "curve.png")
    report = evaluate(hf.load(out)[1], cfg, Tokenizer.from_file(str(out / "tokenizer.json")))
    (out / "README.md").write_text(card(report, points, at, out))
    typer.echo(json.dumps(report._asdict(), indent=2))


def plot(points: list[dict[str, Any]], path: Path) -> None:
    """Loss on training and held-out text, of the model and of its MTP module."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    tokens = [p["tokens"] / 1e6 for p in points]
    for name, label, style in (
        ("train", "next token, training", "C0:"),
        ("held_out", "next token, held out", "C0"),
        ("train_mtp", "the one after (MTP), training", "C1:"),
        ("held_out_mtp", "the one after (MTP), held out", "C1"),
    ):
        axes.plot(tokens, [p[name] for p in points], style, label=label)
    axes.set(xlabel="million tokens of training", ylabel="nats per token", title="The embedded model's loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)
