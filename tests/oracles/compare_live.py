"""Compare jaxserve with the checkpoints and golden outputs that `make_live.py` made.

`python -m tests.oracles.compare_live DIR...` reads every folder below each DIR, prints a line for it, and then the
largest relative error of the logits and how many greedy continuations are identical. The exit status is 1 if any
continuation differs or any error is above ERROR.

Logits come from the model, of every position of a prompt in one step; continuations from the engine, which prefills
prompts in chunks and decodes them together.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxserve.checkpoints import hf
from jaxserve.engine import Engine
from jaxserve.layers.config import Config
from jaxserve.layers.transformer import Model
from jaxserve.options import EngineConfig
from tests.jaxserve.conftest import greedy, serve, tokens, word_tokenizer
from tests.layers.helpers import batch_of, empty_cache, page_table, step

ERROR = 1e-4  # relative to the largest logit of a prompt: what is promised against Hugging Face
PAGE = 16


class Comparison(NamedTuple):
    """How far jaxserve is from Hugging Face transformers."""

    error: float  # of the logits, the largest over positions, relative to the largest logit of their prompt
    identical: int  # greedy continuations
    total: int

    @property
    def passed(self) -> bool:
        return self.identical == self.total > 0 and self.error <= ERROR  # NaN passes no comparison


def main() -> None:
    """Compare every folder below the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dirs", type=Path, nargs="+", metavar="DIR")
    folders = [file.parent for path in parser.parse_args().dirs for file in sorted(path.glob("*/golden.npz"))]
    sys.exit(0 if check(folders).passed else 1)


def check(folders: list[Path]) -> Comparison:
    """Compare each folder and print what is found, then all of them together."""
    found = []
    for folder in folders:
        found.append(compare(folder))
        print(line(folder.name, found[-1]), flush=True)
    errors, identical, totals = zip(*found, strict=True) if found else ((np.nan,), (), ())
    together = Comparison(float(np.max(errors)), sum(identical), sum(totals))
    print(line(f"{len(folders)} folders", together))
    return together


def line(name: str, found: Comparison) -> str:
    verdict = "" if found.passed else "  DIFFERS"
    return f"{name:20} error {found.error:.1e}  {found.identical}/{found.total} continuations identical{verdict}"


def compare(folder: Path) -> Comparison:
    """Compare one checkpoint with its golden outputs."""
    cfg, model = hf.load(folder)
    golden = np.load(folder / "golden.npz")
    count = sum(name.startswith("prompt_") for name in golden)
    prompts, logits, follow = ([golden[f"{kind}_{i}"] for i in range(count)] for kind in ("prompt", "logits", "greedy"))
    same = [a == b.tolist() for a, b in zip(continuations(model, cfg, prompts, len(follow[0])), follow, strict=True)]
    return Comparison(largest_error(model, cfg, prompts, logits), sum(same), len(same))


def largest_error(model: Model, cfg: Config, prompts: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """Of logits at every position; NaN if any is NaN."""
    pages = -(-max(map(len, prompts)) // PAGE)
    batch = batch_of(prompts, page_table(len(prompts), pages, seed=0))
    found, _ = step(model, batch, empty_cache(cfg, len(prompts) * pages, PAGE), cfg)
    rows = zip(np.asarray(found, np.float64), expected, strict=True)
    return float(np.max([np.abs(row[: len(e)] - e).max() / np.abs(e).max() for row, e in rows]))


def continuations(model: Model, cfg: Config, prompts: list[np.ndarray], length: int) -> list[list[int]]:
    """The greedy tokens that follow each prompt."""
    options = EngineConfig(max_model_len=max(map(len, prompts)) + length, warmup=False)
    engine = Engine(model, cfg, word_tokenizer(cfg.vocab_size), options)
    return [tokens(outputs) for outputs in serve(engine, prompts, greedy(length))]


if __name__ == "__main__":
    main()
