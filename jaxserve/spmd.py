"""The engine's programs over the ranks of a mesh: each rank runs them for its own sequences, and for its experts.

What belongs to sequences is split over the ranks along its first axis, and numbers of slots and pages are those of a
rank; so on a rank the programs see what they see on a single device. The ranks meet in the exchange of tokens alone.
"""

from functools import lru_cache, partial
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from jaxserve.layers.config import Config
from jaxserve.parallel.dispatch import Ranks
from jaxserve.parallel.mesh import AXES
from jaxserve.slots import mark
from jaxserve.steps import Chosen, Pack, Prefilled, decode, prefill

SAME, SPLIT, ROUNDS_FIRST = PartitionSpec(), PartitionSpec(AXES), PartitionSpec(None, AXES)


def _each(fields: Any, spec: PartitionSpec, **others: PartitionSpec) -> Any:
    return fields(**(dict.fromkeys(fields._fields, spec) | others))


CHOSEN = _each(Chosen, ROUNDS_FIRST, wide=SAME)
TAKES = {  # after the model and the state
    prefill: (SPLIT, _each(Pack, SPLIT, reported=SAME), SPLIT),
    decode: (SPLIT, SPLIT, SPLIT, SAME, SAME),
    mark: (SPLIT, SAME, SAME, SAME),
}
GIVES = {prefill: (_each(Prefilled, SPLIT, chosen=CHOSEN), SPLIT), decode: (CHOSEN, SPLIT), mark: SPLIT}


def lower(program: Any, mesh: Mesh | None, *given: Any, **static: Any) -> Any:
    """Traces `prefill` or `decode` of `steps`, or `slots.mark`, for what it is given: on one device, or on a mesh."""
    if mesh is None:
        return program.lower(*given, **static)
    weights = () if program is mark else (jax.tree.map(lambda leaf: leaf.sharding.spec, given[0]),)
    return _over(program, mesh, weights, **static).lower(*given)


@lru_cache  # engines of one size share what is traced
def _over(program: Any, mesh: Mesh, weights: Any, *, cfg: Config | None = None, drafts: int = 0) -> Any:
    """The program as one `shard_map`, jitted; it donates what the program itself does."""
    body = program.__wrapped__
    if program is not mark:
        body = partial(body, cfg=cfg, drafts=drafts, ranks=Ranks())
    takes = (*weights, SPLIT, *TAKES[program])
    over = jax.shard_map(body, mesh=mesh, in_specs=takes, out_specs=GIVES[program], check_vma=False)
    return jax.jit(over, donate_argnums=len(weights))
