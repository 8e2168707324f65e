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
from tokenizers import Tokenizer

from jaxserve.checkpoints import hf
from jaxserve.checkpoints.embedded import corpus
from jaxserve.checkpoints.embedded.evaluate import Report, evaluate
from jaxserve.checkpoints.embedded.train import CONFIG, CURVE, checkpoint_at, train
from jaxserve.checkpoints.hub import EMBEDDED
from jaxserve.layers.config import Config
from jaxserve.layers.transformer import Model, model_params
from jaxserve.parallel.errors import CheckpointError
from jaxserve.parallel.sharding import abstract

TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
"""The model continues code and was taught no conversation: its chat is what was said, to be continued."""


def export(
    run: Annotated[Path, typer.Argument(help="Folder of a training run.")],
    out: Annotated[Path, typer.Option(help="Where the model goes.")] = EMBEDDED,
    curve: Annotated[Path, typer.Option(help="Where the plot of the loss goes.")] = Path("docs/embedded-loss.png"),
    step: Annotated[int | None, typer.Option(help="Which checkpoint; the newest by default.")] = None,
) -> None:
    """Writes weights in BF16, config, tokenizer and model card, whose numbers are measured here on what was written."""
    at, weights = trained_weights(run, step)
    cfg = Config.from_hf(CONFIG)
    kinds = model_params(cfg, jnp.bfloat16)
    hf.save(out, jax.tree.map(lambda weight, param: weight.astype(param.dtype), weights, kinds), cfg, CONFIG)
    shutil.copy(run / "tokenizer.json", out)
    settings = {"bos_token": corpus.BEGIN, "eos_token": corpus.END, "add_bos_token": True, "chat_template": TEMPLATE}
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    points = [p for line in (run / CURVE).read_text().splitlines() if (p := json.loads(line))["step"] <= at]
    plot(points, curve)
    report = evaluate(hf.load(out)[1], cfg, Tokenizer.from_file(str(out / "tokenizer.json")))
    (out / "README.md").write_text(card(report, points[-1], sum(p.size for p in jax.tree.leaves(kinds))))
    typer.echo(json.dumps(report._asdict(), indent=2))


def trained_weights(run: Path, step: int | None) -> tuple[int, Model]:
    """The weights of a checkpoint, the newest by default, and its step."""
    params = model_params(Config.from_hf(CONFIG))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = {"params": abstract(params, jax.tree.map(lambda _: here, params))}  # and no state of the optimizer
    places = ocp.checkpoint_utils.construct_restore_args(target)
    options = ocp.CheckpointManagerOptions(create=False)
    with ocp.CheckpointManager((run / "checkpoints").absolute(), options=options) as checkpoints:
        at = checkpoint_at(checkpoints, step)
        if at is None:
            raise CheckpointError(f"{run} has no checkpoints; train first: python -m {train.__module__} {run}")
        arguments = ocp.args.PyTreeRestore(target, restore_args=places, partial_restore=True)
        return at, checkpoints.restore(at, args=arguments)["params"]


def card(report: Report, last: dict[str, Any], parameters: int) -> str:
    """The model card: what the model is, what it learned from, what it is worth."""
    return (
        (Path(__file__).parent / "card.md")
        .read_text()
        .format(
            parameters=f"{parameters:,}",
            python=platform.python_version(),
            steps=f"{last['step']:,}",
            tokens=f"{last['tokens'] / 1e6:.1f}",
            backend=jax.default_backend(),
            **{
                name: f"{value:,}" if isinstance(value, int) else f"{value:.3f}"
                for name, value in report._asdict().items()
            },
        )
    )


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


if __name__ == "__main__":
    typer.run(export)
