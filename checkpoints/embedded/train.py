"""Trains the embedded model: `python -m jaxserve.checkpoints.embedded.train runs/embedded`.

Runs on any JAX backend, saves as it goes and continues where it stopped. The learning rate warms up, stays, and decays
at the end (arXiv:2404.06395), so that a longer run continues from a checkpoint before the decay. Matrices are trained
with Muon (arXiv:2502.16982), the rest with Adam; experts are balanced without a loss, by their selection bias
(arXiv:2408.15664).

The model that ships was trained in three stages, on sequences that grow while the tokens of an update stay:

    python -m jaxserve.checkpoints.embedded.train runs/embedded --steps 800 --decay 0 --length 256 --batch 8
    python -m jaxserve.checkpoints.embedded.train runs/embedded --steps 2000 --decay 0 --length 512 --batch 4
    python -m jaxserve.checkpoints.embedded.train runs/embedded --steps 2800 --decay 800 --length 1024 --batch 2
    python -m jaxserve.checkpoints.embedded.export runs/embedded

These commands give its like, not its bits: its first stage had a BIAS_SPEED of 0.001, under which the busiest expert
kept more than three times the mean load.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import typer
from flax.training.train_state import TrainState
from jaxtyping import Array, Float, Int
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer

from jaxserve.checkpoints.embedded import corpus
from jaxserve.layers.batch import whole
from jaxserve.layers.config import Config
from jaxserve.layers.mtp import draft
from jaxserve.layers.transformer import Model, cache_params, forward, logits, model_params
from jaxserve.parallel.errors import CheckpointError
from jaxserve.parallel.sharding import Param, initialize, zeros

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": corpus.VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "kv_lora_rank": 64,
    "q_lora_rank": 96,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 64,
    "n_group": 4,
    "topk_group": 2,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 1,
    "hidden_act": "silu",
    "attention_bias": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 1,
}

MTP_WEIGHT = 0.3  # of the loss (arXiv:2412.19437, section 4.2)
BIAS_SPEED = 0.005  # of an expert's selection bias, per step; more than for a run of a million steps
WARMUP_STEPS = 100
CURVE = "curve.jsonl"
AHEAD = 2  # tokens of a window after its last position: what that predicts, and what its MTP module does
PROBE_LENGTH, PROBE_BATCH = 256, 48  # of the held-out sequences that every point of the curve is measured on


class Losses(NamedTuple):
    """Mean cross entropies of an update, in nats per token, and the experts' loads."""

    main: Float[Array, ""]
    mtp: Float[Array, ""]
    load_le: Int[Array, "l e"]  # the MTP module's row last


def losses(model: Model, tokens_st: Int[Array, "s t"], cfg: Config) -> Losses:
    """Every position predicts the next token, and through the MTP module the one after it."""
    inputs, following, after = tokens_st[:, :-2], tokens_st[:, 1:-1].reshape(-1), tokens_st[:, 2:].reshape(-1)
    (s, t), batch = inputs.shape, whole(inputs)
    cache = zeros(cache_params(cfg, s, t))
    out = forward(model, batch, cache, cfg)
    ahead = draft(model, model.mtp[0], out.hidden_td, batch._replace(tokens_t=following), cache[-1], cfg)
    entropy = optax.softmax_cross_entropy_with_integer_labels
    return Losses(
        main=entropy(logits(model, out.hidden_td), following).mean(),
        mtp=entropy(logits(model, ahead.hidden_td), after).mean(),
        load_le=jnp.vstack([out.load_le, cast(Array, ahead.load_e)]),
    )


def train_step(state: TrainState, tokens_st: Int[Array, "s t"], cfg: Config) -> tuple[TrainState, Losses]:
    """One update. DONATES the state if jitted so."""

    def total(model):
        parts = losses(model, tokens_st, cfg)
        return parts.main + MTP_WEIGHT * parts.mtp, parts

    gradients, parts = jax.grad(total, has_aux=True)(state.params)
    state = state.apply_gradients(grads=gradients)
    return state.replace(params=balance(cast(Model, state.params), parts.load_le)), parts


def balance(model: Model, load_le: Int[Array, "l e"]) -> Model:
    """Raises the selection bias of experts with less than the mean load, and lowers that of the others."""
    step_le = BIAS_SPEED * jnp.sign(load_le.mean(axis=1, keepdims=True) - load_le.astype(jnp.float32))
    rows = iter(step_le)

    def adjust(layer):
        if not hasattr(layer.ffn, "bias"):
            return layer
        return layer._replace(ffn=layer.ffn._replace(bias=layer.ffn.bias + next(rows)))

    layers = tuple(adjust(layer) for layer in model.layers)
    return model._replace(layers=layers, mtp=tuple(m._replace(layer=adjust(m.layer)) for m in model.mtp))


def optimizer(params: Model, rate: float, steps: int, decay: int) -> optax.GradientTransformation:
    """Muon for matrices inside layers, Adam for embeddings, gains, biases and routers; gradients clipped to norm 1."""
    stay = max(1, steps - WARMUP_STEPS - decay)
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(0.0, rate, WARMUP_STEPS),
            optax.constant_schedule(rate),
            optax.linear_schedule(rate, 0.02 * rate, max(1, decay)),
        ],
        [WARMUP_STEPS, WARMUP_STEPS + stay],
    )
    kinds = jax.tree.map(_muon_axes, params)._replace(embed=None, head=None)
    muon = optax.contrib.muon(
        schedule, weight_decay=0.1, adam_b2=0.95, consistent_rms=0.2, muon_weight_dimension_numbers=kinds
    )
    return optax.chain(optax.clip_by_global_norm(1.0), muon)


def _muon_axes(param: Param) -> optax.contrib.MuonDimensionNumbers | None:
    """Which axes of a matrix are summed over: weights are `[out…, in…]`, of experts with a leading `e`."""
    axes = param.axes
    if len(axes) < 2 or axes == ("e", "d"):
        return None
    if axes[0] == "e":
        return optax.contrib.MuonDimensionNumbers((2,), (1,))
    outputs = 1 if axes[0] == "d" or len(axes) == 2 else 2
    everything = tuple(range(len(axes)))
    return optax.contrib.MuonDimensionNumbers(everything[outputs:], everything[:outputs])


class Update(NamedTuple):
    """What an update leaves."""

    step: int  # updates so far
    state: TrainState
    losses: Losses  # of the text it learned from


def updates(state: TrainState, windows: "Windows", steps: int, cfg: Config) -> Iterator[Update]:
    """Trains until there are `steps` updates. DONATES each state, so it must be read before the next is asked for."""
    update = jax.jit(train_step, static_argnums=2, donate_argnums=0)
    for step in range(int(state.step), steps):
        state, parts = update(state, jnp.asarray(windows.at(step)), cfg)
        yield Update(step + 1, state, parts)


class Windows(NamedTuple):
    """The training text as one stream, and how it is cut."""

    stream: np.ndarray  # all modules, each between BEGIN and END
    length: int  # tokens of a window, AHEAD more than positions
    batch: int

    def at(self, step: int) -> np.ndarray:
        """The windows of a step, int32[s, t]: a function of the step alone; each epoch is cut and shuffled anew."""
        per_epoch = (len(self.stream) - self.length) // self.length - 1
        first = step * self.batch
        picked = [self._window(*divmod(first + i, per_epoch), per_epoch) for i in range(self.batch)]
        return np.stack(picked).astype(np.int32)

    def _window(self, epoch: int, index: int, per_epoch: int) -> np.ndarray:
        rng = np.random.default_rng(epoch)
        start = rng.integers(self.length) + rng.permutation(per_epoch)[index] * self.length
        return self.stream[start : start + self.length]


def stream(tokenizer: Tokenizer, found: list[corpus.Module]) -> np.ndarray:
    """All modules in one array, each between BEGIN and END."""
    begin, end = (np.array([tokenizer.token_to_id(t)], np.uint16) for t in (corpus.BEGIN, corpus.END))
    return np.concatenate([part for ids in corpus.encode(tokenizer, found) for part in (begin, ids, end)])


def prepare(out: Path) -> tuple[np.ndarray, np.ndarray]:
    """The streams of training and of held-out text, by a tokenizer that is trained once and kept in `out`."""
    training, held_out = corpus.split(corpus.modules())
    path = out / "tokenizer.json"
    if not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        corpus.train_tokenizer([m.text for m in training]).save(str(path))
    tokenizer = Tokenizer.from_file(str(path))
    return stream(tokenizer, training), stream(tokenizer, held_out)


def train(
    out: Annotated[Path, typer.Argument(help="Folder of checkpoints, curve and tokenizer; an earlier run continues.")],
    steps: Annotated[int, typer.Option(help="Updates in all.")] = 2800,
    decay: Annotated[int, typer.Option(help="Updates at the end during which the learning rate falls.")] = 800,
    rate: Annotated[float, typer.Option(help="Learning rate between warm-up and decay.")] = 4e-3,
    batch: Annotated[int, typer.Option(help="Sequences of an update.")] = 4,
    length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 512,
    every: Annotated[int, typer.Option(help="Updates between checkpoints.")] = 100,
    start: Annotated[
        int | None,
        typer.Option(help="Continue from this checkpoint, not from the newest; what the run has after it is DELETED."),
    ] = None,
) -> None:
    """Trains the embedded model on the standard library of this Python."""
    cfg = Config.from_hf(CONFIG)
    training, held_out = prepare(out)
    windows = Windows(training, length + AHEAD, batch)
    probe = jnp.asarray(Windows(held_out, PROBE_LENGTH + AHEAD, PROBE_BATCH).at(0))
    tx = optimizer(model_params(cfg), rate, steps, decay)
    with ocp.CheckpointManager(out.absolute() / "checkpoints") as checkpoints, progress() as bar:
        state = resume(checkpoints, out / CURVE, tx, cfg, start)
        task = bar.add_task("training", total=steps, completed=int(state.step), note="compiling")
        for update in updates(state, windows, steps, cfg):
            if update.step % every == 0 or update.step == steps:
                save(checkpoints, update)
                record(out / CURVE, update, length * batch, probe, cfg)
            if update.step % 10 == 1:
                note = f"loss {update.losses.main:.3f}, draft {update.losses.mtp:.3f} nats/token"
                bar.update(task, completed=update.step, note=note)


def resume(checkpoints: ocp.CheckpointManager, curve: Path, tx: Any, cfg: Config, start: int | None) -> TrainState:
    """The state of the checkpoint `start`, or of the newest, or a new one if there is none; nothing later is kept."""
    params = initialize(model_params(cfg), jax.random.key(0))
    state = TrainState.create(apply_fn=forward, params=params, tx=tx)
    at = checkpoint_at(checkpoints, start)
    if at is not None:
        state = cast(TrainState, checkpoints.restore(at, args=ocp.args.StandardRestore(state)))
    forget(checkpoints, curve, later_than=at or 0)
    return state


def checkpoint_at(checkpoints: ocp.CheckpointManager, step: int | None) -> int | None:
    """`step`, which must be that of a checkpoint, or without it the newest; None if there is none at all."""
    there = sorted(checkpoints.all_steps())
    if step is not None and step not in there:
        named = ", ".join(map(str, there)) or "none"
        raise CheckpointError(f"{checkpoints.directory} has no checkpoint {step}; name one that is there: {named}")
    return checkpoints.latest_step() if step is None else step


def forget(checkpoints: ocp.CheckpointManager, curve: Path, later_than: int) -> None:
    """Deletes later checkpoints, which orbax would keep new ones from being saved for, and later points of the curve.

    A run that was killed can leave a point whose checkpoint was not yet written.
    """
    for step in sorted(checkpoints.all_steps(), reverse=True):
        if step > later_than:
            checkpoints.delete(step)
    if curve.exists():
        kept = [line for line in curve.read_text().splitlines() if json.loads(line)["step"] <= later_than]
        curve.write_text("".join(line + "\n" for line in kept))


def save(checkpoints: ocp.CheckpointManager, update: Update) -> None:
    """Saves a checkpoint; raises CheckpointError where orbax says that it did not."""
    if not checkpoints.save(update.step, args=ocp.args.StandardSave(update.state)):
        raise CheckpointError(
            f"{checkpoints.directory}: checkpoint {update.step} was not saved; the newest there is "
            f"{checkpoints.latest_step()}, and a new one must be later"
        )


def record(curve: Path, update: Update, tokens: int, probe: Int[Array, "s t"], cfg: Config) -> None:
    """Adds a point to the curve: an update has so many `tokens`; `probe` is held-out text."""
    held = jax.jit(losses, static_argnums=2)(update.state.params, probe, cfg)
    with curve.open("a") as file:
        print(json.dumps(_point(update.step, tokens, update.losses, held)), file=file)


def _point(step: int, tokens: int, parts: Losses, held: Losses) -> dict[str, Any]:
    """A line of the curve: tokens seen, nats per token, and the busiest expert's load over the mean of its layer."""
    skew = (parts.load_le.max(axis=1) / parts.load_le.mean(axis=1)).max()
    losses = {
        "train": parts.main,
        "train_mtp": parts.mtp,
        "held_out": held.main,
        "held_out_mtp": held.mtp,
        "skew": skew,
    }
    return {"step": step, "tokens": step * tokens} | {name: round(float(x), 4) for name, x in losses.items()}


def progress() -> Progress:
    """A progress bar with a note at its end."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, TextColumn("{task.fields[note]}"))


if __name__ == "__main__":
    typer.run(train)
