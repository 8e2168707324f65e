"""What the embedded model is worth on held-out text, beside an n-gram model of the same tokens.

`python -m jaxserve.checkpoints.embedded.evaluate` prints it for the model that ships.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import typer
from jaxtyping import Array, Float, Int
from rich.console import Console
from rich.progress import Progress
from tokenizers import Tokenizer

from jaxserve.checkpoints import hf
from jaxserve.checkpoints.embedded import corpus, ngram
from jaxserve.checkpoints.hub import EMBEDDED
from jaxserve.layers.batch import whole
from jaxserve.layers.config import Config
from jaxserve.layers.mtp import draft
from jaxserve.layers.transformer import Model, cache_params, forward, logits
from jaxserve.parallel.sharding import zeros

WINDOW = 1024  # tokens the model sees at once
FRESH = 512  # of those, the last, that count: every token but a module's first has at least this much before it
ROWS = 4  # windows computed together

Show = Callable[[int, int], None]


class Score(NamedTuple):
    """Of each position of a window: what the model gave the next token, and what it and its MTP module expected."""

    log2_t: Float[Array, "s t"]
    expected_t: Int[Array, "s t"]  # the most probable next token
    drafted_t: Int[Array, "s t"]  # the MTP module's guess at the token after the next


class Window(NamedTuple):
    """A stretch of a module, padded to WINDOW + 1 tokens."""

    tokens: np.ndarray
    counted: np.ndarray  # bool[WINDOW]: positions whose next token counts
    drafted: np.ndarray  # bool[WINDOW]: positions whose next but one is in the window too


class Tally(NamedTuple):
    """Sums over held-out text."""

    bits: float
    tokens: int
    right: int  # tokens that were the most probable
    drafted: int  # positions where the MTP module's guess can be compared
    agreed: int  # those where it is the model's own choice

    def plus(self, other: "Tally") -> "Tally":
        return Tally(
            bits=self.bits + other.bits,
            tokens=self.tokens + other.tokens,
            right=self.right + other.right,
            drafted=self.drafted + other.drafted,
            agreed=self.agreed + other.agreed,
        )


class Report(NamedTuple):
    """The numbers of the model card."""

    held_out_modules: int
    held_out_bytes: int
    held_out_tokens: int
    bits_per_byte: float
    perplexity: float  # of a token
    ngram_bits_per_byte: float
    better_than_ngram: float  # share by which the bits fall
    next_token_accuracy: float
    mtp_acceptance: float  # share of positions where the MTP module's greedy guess is the model's own greedy choice


def windows(ids: np.ndarray, begin: int) -> list[Window]:
    """Cuts a module into overlapping windows that together count each of its tokens once."""
    tokens = np.concatenate([[begin], ids]).astype(np.int32)
    cut, done = [], 0
    while done < len(ids):
        end = min(len(ids), done + (WINDOW if done == 0 else FRESH))
        start = max(0, end - WINDOW)
        piece = tokens[start : end + 1]
        position = np.arange(WINDOW)
        counted = (position >= done - start) & (position < end - start)
        cut.append(Window(np.pad(piece, (0, WINDOW + 1 - len(piece))), counted, position < end - start - 1))
        done = end
    return cut


def score(model: Model, tokens_st: Int[Array, "s t"], cfg: Config, int8_cache: bool = False) -> Score:
    """Runs whole windows through the model and its MTP module; attention reads what a cache keeps of latents."""
    s, t = tokens_st.shape[0], tokens_st.shape[1] - 1
    batch, following = whole(tokens_st[:, :-1]), tokens_st[:, 1:].reshape(-1)
    out = forward(model, batch, zeros(cache_params(cfg, s, t, int8=int8_cache)), cfg)
    ahead = draft(model, model.mtp[0], out.hidden_td, batch._replace(tokens_t=following), out.cache[-1], cfg)
    scores_tu = logits(model, out.hidden_td)
    log_t = jnp.take_along_axis(jax.nn.log_softmax(scores_tu), following[:, None], axis=1)[:, 0]
    drafted_t = jnp.argmax(logits(model, ahead.hidden_td), axis=-1)
    parts = (log_t / jnp.log(2.0), jnp.argmax(scores_tu, axis=-1), drafted_t)
    return Score(*(part.reshape(s, t) for part in parts))


def evaluate(
    model: Model, cfg: Config, tokenizer: Tokenizer, show: Show = lambda done, total: None, int8_cache: bool = False
) -> Report:
    """Scores all held-out modules of the running interpreter's library; `show` is told the windows done and in all."""
    training, held_out = corpus.split(corpus.modules())
    begin = cast(int, tokenizer.token_to_id(corpus.BEGIN))
    documents, size = corpus.encode(tokenizer, held_out), sum(len(m.text.encode()) for m in held_out)
    sums = total([window for ids in documents for window in windows(ids, begin)], model, cfg, show, int8_cache)
    baseline = ngram.fit(corpus.encode(tokenizer, training), cfg.vocab_size, bos=begin)
    rival = -sum(float(ngram.log2_probabilities(baseline, ids).sum()) for ids in documents) / size
    return Report(
        held_out_modules=len(held_out),
        held_out_bytes=size,
        held_out_tokens=sums.tokens,
        bits_per_byte=sums.bits / size,
        perplexity=2 ** (sums.bits / sums.tokens),
        ngram_bits_per_byte=rival,
        better_than_ngram=1 - sums.bits / size / rival,
        next_token_accuracy=sums.right / sums.tokens,
        mtp_acceptance=sums.agreed / sums.drafted,
    )


def total(cut: list[Window], model: Model, cfg: Config, show: Show, int8_cache: bool = False) -> Tally:
    """Scores windows, ROWS at a time, and adds up what counts."""
    run, sums = jax.jit(score, static_argnums=(2, 3)), Tally(0.0, 0, 0, 0, 0)
    for i in range(0, len(cut), ROWS):
        part = Window(*(np.stack(column) for column in zip(*_filled(cut[i : i + ROWS]), strict=True)))
        sums = sums.plus(tally(part, run(model, jnp.asarray(part.tokens), cfg, int8_cache)))
        show(min(i + ROWS, len(cut)), len(cut))
    return sums


def tally(part: Window, got: Score) -> Tally:
    """Sums over the positions that count."""
    log2, expected, drafted = (np.asarray(column) for column in got)
    of, pairs = part.counted, (part.counted & part.drafted)[:, :-1]
    return Tally(
        bits=-float(log2[of].sum(dtype=np.float64)),
        tokens=int(of.sum()),
        right=int((expected == part.tokens[:, 1:])[of].sum()),
        drafted=int(pairs.sum()),
        agreed=int((drafted[:, :-1] == expected[:, 1:])[pairs].sum()),
    )


def _filled(rows: list[Window]) -> list[Window]:
    """ROWS windows: the last ones, if any are missing, count nothing."""
    empty = Window(*(np.zeros_like(column) for column in rows[0]))
    return rows + [empty] * (ROWS - len(rows))


def main(
    folder: Annotated[
        Path, typer.Argument(help="A Hugging Face folder with the embedded model's tokenizer.")
    ] = EMBEDDED,
    kv_cache_dtype: Annotated[
        Literal["auto", "int8"], typer.Option(help="Of the cache; int8: latents in INT8, keys in 16 bits.")
    ] = "auto",
) -> None:
    """Prints held-out bits per byte, accuracy and MTP acceptance as JSON."""
    cfg, model = hf.load(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("scoring windows", total=None)
        show = lambda done, total: bar.update(task, completed=done, total=total)  # noqa: E731
        report = evaluate(model, cfg, tokenizer, show, int8_cache=kv_cache_dtype == "int8")
    typer.echo(json.dumps(report._asdict(), indent=2))


if __name__ == "__main__":
    typer.run(main)
