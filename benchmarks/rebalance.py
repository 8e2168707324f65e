"""What expert placements make of a skewed load: how much more than the mean the busiest device has to do.

`python -m benchmarks.rebalance` draws loads as xDeepServe describes them (arXiv:2508.02520, section 4.5): the hottest
expert has 30 times the mean, a fifth of all have more than it, and the hot ones are not always the same. Placements are
made from the first half of the time slices, and judged by these and by the second half, which they have not seen.
"""

from typing import Annotated, NamedTuple

import numpy as np
import typer
from jaxtyping import Float, Int
from rich.console import Console
from rich.table import Table

from jaxserve.parallel.placement import between, eplb, imbalance, load, time_sliced

EXPERTS, SLOTS = 256, 288  # of DeepSeek-V3, and xDeepServe's with as many again as shared experts
GROUPS, DIES = 8, 16  # of DeepSeek-V3's experts; in a node of CloudMatrix384


class Judged(NamedTuple):
    """A kind of placement, means over layers. Imbalance is the maximum over the mean of the ranks' loads."""

    mean: float  # imbalance of the mean load
    seen: float  # of the time slices that it was made from, each waiting for its busiest rank
    later: float  # of later ones
    written: float  # slots, to go on to the placement that is made from the later ones
    rounds: float  # in how many rounds


def power_law(experts: int, peak: float) -> Float[np.ndarray, "e"]:
    """Loads, falling as a power of the place, whose mean is 1 and whose first is `peak`."""
    place_e, low, high = np.arange(1, experts + 1), 0.0, 64.0
    for _ in range(64):
        power = (low + high) / 2
        low, high = (power, high) if experts / (place_e**-power).sum() < peak else (low, power)
    return peak * place_e**-low


def draw(
    rng: np.random.Generator, law_e: Float[np.ndarray, "e"], layers: int, slices: int, moving: float, tokens: int
) -> Int[np.ndarray, "l t e"]:
    """Counts of tokens. Experts take places in the law, one order a layer; in each slice some swap theirs."""
    counts = []
    for _ in range(layers):
        usual = rng.permutation(law_e / law_e.sum())
        for _ in range(slices):
            share, moved = usual.copy(), rng.random(law_e.size) < moving
            share[moved] = rng.permutation(share[moved])
            counts.append(rng.multinomial(tokens, share))
    return np.reshape(counts, (layers, slices, law_e.size))


def placements(count_lte: Int[np.ndarray, "l t e"], slots: int, ranks: int) -> dict[str, Int[np.ndarray, "l x"]]:
    """One of each kind."""
    layers, _, experts = count_lte.shape
    return {
        "in order": np.tile(np.arange(slots) % experts, (layers, 1)),  # the first ones again in what is left
        "EPLB": eplb(count_lte.mean(1), slots, GROUPS, max(ranks // DIES, 1), ranks),
        "time-sliced": time_sliced(count_lte, slots - experts, ranks),
    }


def judge(
    slots_lx: Int[np.ndarray, "l x"],
    next_lx: Int[np.ndarray, "l x"],
    seen_lte: Int[np.ndarray, "l t e"],
    later_lte: Int[np.ndarray, "l t e"],
    ranks: int,
) -> Judged:
    """The placements made from the counts seen; `next_lx` are those made from the later ones."""
    judged = []
    for slots_x, next_x, seen_te, later_te in zip(slots_lx, next_lx, seen_lte, later_lte, strict=True):
        loads = (load(slots_x, counts, ranks) for counts in (seen_te.mean(0), seen_te, later_te))
        rounds = between(slots_x, next_x)
        judged.append((*map(imbalance, loads), sum(each.written.size for each in rounds), len(rounds)))
    return Judged(*np.mean(judged, axis=0).tolist())


def main(
    layers: Annotated[int, typer.Option(help="Drawn and averaged.")] = 8,
    slices: Annotated[int, typer.Option(help="That placements are made from; as many come later.")] = 16,
    peak: Annotated[float, typer.Option(help="The hottest expert's load, in means.")] = 30.0,
    moving: Annotated[float, typer.Option(help="Of the experts, the share that swap loads in a slice.")] = 0.25,
    seed: Annotated[int, typer.Option(help="Of all that is drawn.")] = 0,
) -> None:
    """Prints the imbalance before and after, of the mean load and of time slices, and what the next placement takes."""
    rng, law_e = np.random.default_rng(seed), power_law(EXPERTS, peak)
    seen_lte, later_lte = np.split(draw(rng, law_e, layers, 2 * slices, moving, tokens=2**20), 2, axis=1)
    title = f"max/mean load; {np.mean(law_e > 1):.0%} of {EXPERTS} experts are above the mean"
    table = Table("ranks", "placement", "mean", "by slice", "later", "rewritten", "rounds", title=title)
    for ranks in (SLOTS, 32):
        after = placements(later_lte, SLOTS, ranks)
        for name, slots_lx in placements(seen_lte, SLOTS, ranks).items():
            judged = judge(slots_lx, after[name], seen_lte, later_lte, ranks)
            numbers = f"{judged.mean:.2f}", f"{judged.seen:.2f}", f"{judged.later:.2f}"
            table.add_row(str(ranks), name, *numbers, f"{judged.written:.0f}", f"{judged.rounds:.0f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
