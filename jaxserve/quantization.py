"""A model folder as INT8, and in rows of text how it became that: for `jaxserve quantize`."""

import os
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from jaxserve.checkpoints import hf, store
from jaxserve.checkpoints.calibrate import calibration_text
from jaxserve.checkpoints.convert import convert, written_dtype
from jaxserve.checkpoints.hub import check_new, locate
from jaxserve.checkpoints.quantize import FEW_TOKENS, LayerReport, Parts
from jaxserve.compilation import enable_cache
from jaxserve.layers.config import Config
from jaxserve.llm import check_vocabulary
from jaxserve.parallel.errors import RequestError
from jaxserve.progress import Progress
from jaxserve.tokenizer import Tokenizer

Row = tuple[str, ...]


def quantize(
    model: str, out: Path, files: Sequence[Path], shape: tuple[int, int], without: Sequence[str],
    form: Literal["compressed-tensors", "orbax"], progress: Progress,
) -> list[LayerReport]:  # fmt: skip
    """Writes a model as INT8; `files` are text to calibrate with, `shape` so many pieces of so many tokens.

    Raises CheckpointError, ConfigError or RequestError that name what is wrong.
    """
    parts = _parts(without)
    folder = locate(model)
    raw, tokenizer = hf.read_json(folder), Tokenizer.from_folder(folder)
    cfg = Config.from_hf(raw)
    check_vocabulary(tokenizer, cfg, folder)
    if shape[1] > cfg.max_positions:
        raise RequestError(f"--length {shape[1]}: the model has {cfg.max_positions} positions; it must be at most that")
    documents = [_read(path) for path in files] or None
    tokens_st = calibration_text(partial(tokenizer.encode, add_special_tokens=False), *shape, documents)
    enable_cache()
    show = partial(progress, "quantizing")
    if form == "compressed-tensors":
        return convert(folder, out, tokens_st, parts, show)
    check_new(out)
    tensors, part = (out.with_name(out.name + ending) for ending in (".tensors", ".part"))
    reports = convert(folder, tensors, tokens_st, parts, show)
    shutil.rmtree(part, ignore_errors=True)
    store.save(part, hf.load(tensors, written_dtype(raw))[1], tensors)
    os.replace(part, out)
    shutil.rmtree(tensors)
    return reports


def head(parts: Sequence[str]) -> Row:
    """The columns of `rows`."""
    return ("layer", "block", *parts, "in float")


def rows(reports: Sequence[LayerReport]) -> list[Row]:
    """A row for each block: millionths that are lost after each part, and which matrices stayed in float."""
    found, names = [], columns(reports)
    for number, report in enumerate(reports):
        for block, steps in report.steps.items():
            lost = {step.part: f"{1e6 * step.lost:,.0f}" for step in steps}
            kept = ", ".join(name.partition(".")[2] for name in report.kept if name.startswith(block))
            found.append((str(number), block, *(lost.get(name, "") for name in names), kept))
    return found


def columns(reports: Sequence[LayerReport]) -> list[str]:
    """All parts, in the order in which they were done."""
    return list(dict.fromkeys(step.part for report in reports for steps in report.steps.values() for step in steps))


def starved(reports: Sequence[LayerReport]) -> list[str]:
    """A line for each layer with experts that too few tokens chose."""
    return [
        f"layer {number}: fewer than {FEW_TOKENS} tokens chose the experts {', '.join(map(str, report.starved))}; "
        "their errors were measured with the tokens nearest to them. More text helps: --sequences"
        for number, report in enumerate(reports)
        if report.starved
    ]


def _parts(without: Sequence[str]) -> Parts:
    for name in without:
        if name not in Parts._fields:
            raise RequestError(f"--without {name}: there is no such part; there are {', '.join(Parts._fields)}")
    return Parts()._replace(**dict.fromkeys(without, False))


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"--text {path} can't be read ({error}); name a file of UTF-8 text") from None
