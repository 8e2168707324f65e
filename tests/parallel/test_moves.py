import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxserve.parallel.mesh import AXES
from jaxserve.parallel.moves import move
from jaxserve.parallel.ranks import Ranks


def test_slots_get_what_others_held_before_any_was_written(mesh):
    rng, none = np.random.default_rng(0), 2**31 - 1
    held = {"a": rng.normal(size=(16, 3, 2)).astype(np.float32), "b": rng.integers(-128, 127, (16, 5), dtype=np.int8)}
    sources = np.array([3, 15, 0, none, 7, 8], np.int32)
    targets = np.array([15, 3, 4, 9, none, 8], np.int32)
    over = jax.shard_map(
        lambda tree, s, t: move(tree, s, t, Ranks()),
        mesh=mesh, in_specs=(P(AXES), P(), P()), out_specs=P(AXES), check_vma=False,
    )  # fmt: skip
    found = jax.jit(over)(held, jnp.asarray(sources), jnp.asarray(targets))
    for name, before in held.items():
        wanted = before.copy()
        wanted[15], wanted[3], wanted[4], wanted[9] = before[3], before[15], before[0], 0
        np.testing.assert_array_equal(found[name], wanted)
