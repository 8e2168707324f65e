"""What a load asks for: prompts, lengths and times, drawn by a seed or read from a file."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxserve.parallel.errors import RequestError

BLOCK = 512  # tokens that an id of a Mooncake trace's `hash_ids` stands for


class Lengths(NamedTuple):
    """Token counts from `low` to `high`, both among them."""

    low: int
    high: int


class Piece(NamedTuple):
    """So many tokens of a prompt. Pieces with the same key are the same tokens, as far as the shorter goes."""

    key: tuple[int, int]  # (SHARED, which) or (OWN, request)
    tokens: int


SHARED, OWN, WARMUP = range(3)


class Ask(NamedTuple):
    """A request, before its words are chosen."""

    pieces: tuple[Piece, ...]  # none if there is a text
    text: str | None
    output_tokens: int
    arrival: float | None = None  # seconds after the start; None: as soon as there is room


def lengths(said: str) -> Lengths:
    """`64` or `64-256`; RequestError for anything else."""
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", said.strip())
    low, high = (int(part or found[1]) for part in found.groups()) if found else (0, 0)
    if not 1 <= low <= high:
        raise RequestError(f"{said!r} is no number of tokens; give one like 64, or a range like 64-256")
    return Lengths(low, high)


def synthetic(count: int, prompt: Lengths, output: Lengths, prefix: int, seed: int) -> list[Ask]:
    """Requests of random lengths; `prefix` tokens before each prompt are the same in all."""
    rng = np.random.default_rng([seed, 0])
    sizes = rng.integers([prompt.low, output.low], [prompt.high, output.high], (count, 2), endpoint=True)
    shared = (Piece((SHARED, 0), prefix),) if prefix else ()
    return [Ask((*shared, Piece((OWN, i), own)), None, out) for i, (own, out) in enumerate(sizes.tolist())]


def warmups(asks: Sequence[Ask], count: int) -> list[Ask]:
    """Requests as long as the first ones, of other words, so that the cache knows nothing of those that count."""
    sizes = [(sum(piece.tokens for piece in ask.pieces) or 128, ask.output_tokens) for ask in asks[:count]]
    return [Ask((Piece((WARMUP, i), prompt),), None, out) for i, (prompt, out) in enumerate(sizes)]


def poisson(rate: float, count: int, seed: int) -> list[float]:
    """Times at which requests come that know nothing of each other, `rate` a second; at an infinite rate all at 0."""
    gaps = np.random.default_rng([seed, 1]).exponential(1 / rate, count) if math.isfinite(rate) else np.zeros(count)
    return np.cumsum(gaps).tolist()


def tokens(pieces: Sequence[Piece], words: Sequence[int], seed: int) -> list[int]:
    """The tokens of a prompt, drawn from `words`."""
    drawn = (np.random.default_rng([seed, *piece.key]).choice(words, piece.tokens) for piece in pieces)
    return [int(token) for piece in drawn for token in piece]


def read_trace(path: Path, count: int | None = None) -> list[Ask]:
    """The requests of a file of JSON Lines, or the first `count`; in order of arrival.

    A line has `prompt` (a text) or `prompt_tokens` (a number), `output_tokens`, and perhaps `arrival`, in seconds.
    Mooncake's names are known too: `input_length`, `output_length`, `timestamp` in milliseconds, `hash_ids`.

    Raises RequestError that names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"--trace {path} can't be read: {error}") from None
    asks = [_ask(f"{path}:{number}", number, line) for number, line in enumerate(lines, 1) if line.strip()][:count]
    if not asks:
        raise RequestError(f"--trace {path} has no requests; give it a line of JSON for each")
    if len({ask.arrival is None for ask in asks}) > 1:
        raise RequestError(f"--trace {path}: some lines have an arrival and some have none; give it to all or to none")
    return sorted(asks, key=lambda ask: ask.arrival or 0.0)


def _ask(at: str, number: int, line: str) -> Ask:
    try:
        said = json.loads(line)
    except ValueError as error:
        raise RequestError(f"{at} is not JSON ({error})") from None
    if not isinstance(said, dict):
        raise RequestError(f"{at} must be an object like {{'prompt_tokens': 128, 'output_tokens': 64}}; got {said!r}")
    text, arrival = said.get("prompt"), _arrival(at, said)
    if text is not None and (not isinstance(text, str) or not text):
        raise RequestError(f"{at}: prompt must be a text, not empty; got {text!r}")
    size = 0 if text else _count(at, said, "prompt_tokens", "input_length")
    return Ask(
        _pieces(at, number, size, said.get("hash_ids", [])),
        text,
        _count(at, said, "output_tokens", "output_length"),
        arrival,
    )


def _pieces(at: str, number: int, size: int, blocks: Any) -> tuple[Piece, ...]:
    """Shared blocks, and of what they leave the request's own words."""
    if not isinstance(blocks, list) or not all(isinstance(block, int) and block >= 0 for block in blocks):
        raise RequestError(f"{at}: hash_ids must be a list of whole numbers; got {blocks!r}")
    sizes = [min(BLOCK, size - start) for start in range(0, size, BLOCK)][: len(blocks)]
    shared = [Piece((SHARED, block), tokens) for block, tokens in zip(blocks, sizes, strict=False)]
    own = size - sum(sizes)
    return (*shared, Piece((OWN, number), own)) if own else tuple(shared)


def _count(at: str, said: Mapping[str, Any], name: str, other: str) -> int:
    value = said.get(name, said.get(other))
    if not isinstance(value, int) or value < 1:
        raise RequestError(f"{at}: {name} must be a whole number, 1 or more; got {value!r}")
    return value


def _arrival(at: str, said: Mapping[str, Any]) -> float | None:
    value = said.get("arrival", said["timestamp"] / 1000 if _is_time(said.get("timestamp")) else said.get("timestamp"))
    if value is not None and not _is_time(value):
        raise RequestError(f"{at}: arrival must be seconds after the start, 0 or more; got {value!r}")
    return value


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value >= 0
