"""The engine's programs over the ranks of a mesh: each rank runs them for its own sequences, and for its experts.

What belongs to sequences is split over the ranks along its first axis, and numbers of slots and pages are those of a
rank; so on a rank `decode` sees what it sees on a single device, and ranks meet in the exchange of tokens alone.
"""

from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, PartitionSpec

from jaxserve.compilation import OVERLAP
from jaxserve.packed_prefill import SharedPack, prefill_packed
from jaxserve.parallel.mesh import AXES, AnyMesh
from jaxserve.parallel.moves import move
from jaxserve.parallel.ranks import Ranks
from jaxserve.slots import mark
from jaxserve.steps import Chosen, Prefilled, decode

SAME, SPLIT, SECOND = PartitionSpec(), PartitionSpec(AXES), PartitionSpec(None, AXES)


def _each(fields: Any, spec: PartitionSpec, **others: PartitionSpec) -> Any:
    return fields(**(dict.fromkeys(fields._fields, spec) | others))


CHOSEN = _each(Chosen, SECOND, wide=SAME)  # rounds come first
TAKES = {  # after the model and the state
    prefill_packed: (SPLIT, _each(SharedPack, SAME, slots_a=SPLIT, past_slots_p=SPLIT, rows_s=SPLIT), SPLIT),
    decode: (SPLIT, SPLIT, SPLIT, SAME, SAME),
    mark: (SPLIT, SPLIT, SPLIT, SPLIT),
    move: (SAME, SAME),
}
GIVES = {
    prefill_packed: (_each(Prefilled, SECOND, chosen=CHOSEN), SPLIT),  # of what is known, microbatches come first
    decode: (CHOSEN, SPLIT),
    mark: SPLIT,
    move: SPLIT,
}


class Call(NamedTuple):
    """One of the programs and what it is traced for: on one device, or on a mesh, whose `ranks` exchange so.

    The programs are `steps.decode`, `slots.mark`; on one device `steps.prefill`, on meshes `prefill_packed` and
    `moves.move`. What is given may be described only, for a mesh without devices too.
    """

    program: Any
    mesh: AnyMesh | None
    ranks: Ranks
    given: tuple[Any, ...]
    static: Mapping[str, Any] = {}

    def trace(self) -> Any:
        if self.mesh is None:
            return self.program.trace(*self.given, **self.static)
        weights = ()
        if self.program in (prefill_packed, decode):
            weights = (jax.tree.map(lambda leaf: leaf.sharding.spec, self.given[0]),)
        return _over(self.program, self.mesh, self.ranks, weights, **self.static).trace(*self.given)

    def lower(self) -> Any:
        return self.trace().lower()


@lru_cache  # engines of one size share what is traced
def _over(program: Any, mesh: AnyMesh, ranks: Ranks, weights: Any, **static: Any) -> Any:
    """The program as one `shard_map`, jitted; donates what belongs to sequences, or slots of experts."""
    body = partial(getattr(program, "__wrapped__", program), **static)
    if program is not mark:
        body = partial(body, ranks=ranks)
    takes = (*weights, SPLIT, *TAKES[program])
    over = jax.shard_map(body, mesh=mesh, in_specs=takes, out_specs=GIVES[program], check_vma=False)
    platform = mesh.local_devices[0].platform if isinstance(mesh, Mesh) else None
    options = OVERLAP.get(platform or "") if ranks.microbatches > 1 else None
    return jax.jit(over, donate_argnums=len(weights), compiler_options=options)
