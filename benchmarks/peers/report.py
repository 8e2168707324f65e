"""What was measured of each library: as JSON, and as rows of a table."""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from benchmarks.peers.job import Job
from benchmarks.peers.peer import PEERS, PeerError
from jaxserve.parallel.errors import RequestError

HEAD = ("prompts", "library", "weights", "prefill", "ratio", "decode", "ratio")
"""The columns: tokens a second of all prompts together, and how many times as many jaxserve has."""
JUSTIFY: tuple[Literal["left", "right"], ...] = ("right", "left", "left", "right", "right", "right", "right")


@dataclass
class Batch:
    """Prompts of one batch size, by one library; tokens a second of all together, one number a turn."""

    prompts: int
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    different: list[float] = field(default_factory=list)  # of the tokens that are chosen together, how many are unlike
    expected: float | None = None  # seconds that a turn would take, which was too long


@dataclass
class Found:
    """All of one library."""

    weights: str
    version: str = ""
    batches: list[Batch] = field(default_factory=list)

    def note(self, said: Mapping[str, Any], job: Job) -> None:
        """Takes a line of its runner's, as `peer.ask` gives them. Raises PeerError if decode can't be told of it."""
        if "version" in said:
            self.version = said["version"]
            return
        batch = self._batch(said["batch"])
        if "expected" in said:
            batch.expected = said["expected"]
            return
        if said["decode_seconds"] <= 0:
            raise PeerError(f"{batch.prompts} prompts: some had ended before all had begun; give more --new-tokens")
        batch.prefill.append(batch.prompts * job.prompt_tokens / said["prefill_seconds"])
        batch.decode.append(said["decode_tokens"] / said["decode_seconds"])
        batch.different.append(statistics.mean(len(set(column)) for column in zip(*said["tokens"], strict=True)))

    def _batch(self, prompts: int) -> Batch:
        known = next((batch for batch in self.batches if batch.prompts == prompts), None)
        if known is None:
            known = Batch(prompts)
            self.batches.append(known)
        return known


class Speed(NamedTuple):
    """Tokens a second: the median over turns, and of jaxserve's to these in the same turn."""

    tokens: float
    ratio: float | None


def save(path: Path, found: Mapping[str, Found], about: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {**about, "libraries": {name: asdict(each) for name, each in found.items()}}
    path.write_text(json.dumps(content, indent=1) + "\n")


def load(path: Path) -> dict[str, Found]:
    """What `save` was given. Raises RequestError if there is no such file."""
    if not path.exists():
        raise RequestError(f"{path} isn't there; without --table, it is measured and written")
    libraries = json.loads(path.read_text())["libraries"]
    for each in libraries.values():
        each["batches"] = [Batch(**batch) for batch in each["batches"]]
    return {name: Found(**each) for name, each in libraries.items()}


def rows(found: Mapping[str, Found]) -> list[tuple[str, ...]]:
    """One for each batch size and library, in `HEAD`'s columns."""
    sizes = sorted({batch.prompts for each in found.values() for batch in each.batches})
    return [_row(size, name, found) for size in sizes for name in found]


def _row(size: int, name: str, found: Mapping[str, Found]) -> tuple[str, ...]:
    own, other = (_batch(found.get(each), size) for each in (PEERS[0].name, name))
    begin = (f"{size}", name, found[name].weights)
    if other is None:
        return (*begin, "failed", "", "", "")
    if other.expected is not None:
        return (*begin, f"left out: {other.expected / 60:,.0f} minutes", "", "", "")
    speeds = [_speed(getattr(other, phase), getattr(own, phase, [])) for phase in ("prefill", "decode")]
    return *begin, *(cell for speed in speeds for cell in (f"{speed.tokens:,.4g}", _times(speed.ratio)))


def _batch(found: Found | None, size: int) -> Batch | None:
    return next((batch for batch in found.batches if batch.prompts == size), None) if found else None


def _speed(tokens: Sequence[float], own: Sequence[float]) -> Speed:
    ratios = [ours / theirs for ours, theirs in zip(own, tokens, strict=False)]
    return Speed(statistics.median(tokens), statistics.median(ratios) if ratios else None)


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"


def markdown(lines: Iterable[Sequence[str]]) -> str:
    """A table for a README."""
    rules = ["---" if side == "left" else "---:" for side in JUSTIFY]
    return "\n".join("| " + " | ".join(line) + " |" for line in (HEAD, rules, *lines))
