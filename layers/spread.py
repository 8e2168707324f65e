"""A model over the ranks of a mesh: which experts lie where, and the rest on all of them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxserve.layers.config import Config
from jaxserve.layers.moe import Moe, Spread
from jaxserve.layers.transformer import Model, model_params
from jaxserve.parallel.placement import routes
from jaxserve.parallel.sharding import DECODE, Rules, shardings


def in_order(cfg: Config, ranks: int, redundant: int = 0) -> np.ndarray:
    """The plain placement, `slots_lx`: the experts in order, then replicas of the first, for each layer with experts.

    As many replicas as are `redundant`, and as fill the ranks up. MTP modules come last.
    """
    count = cfg.experts.count if cfg.experts else 0
    slots = -(-(count + redundant) // ranks) * ranks
    return np.tile(np.arange(slots) % max(count, 1), (cfg.mixtures, 1))


def spread(model: Model, cfg: Config, mesh: Mesh, slots_lx: np.ndarray, rules: Rules = DECODE) -> Model:
    """The weights where they belong: each expert in its slots of each layer, what the rules do not split on all ranks.

    Raises ShardingError if something does not divide, or an expert has no slot.
    """
    room = Spread.of(cfg, slots_lx.shape[1], mesh.size)
    params = model_params(cfg, model.embed.dtype, room)
    places = jax.tree.leaves(shardings(params, mesh, rules))
    slots = iter(slots_lx)
    arranged = map_mixtures(model, lambda p: arrange(p, next(slots), room))
    leaves, tree = jax.tree.flatten(arranged)
    return tree.unflatten(jax.device_put(leaf, place) for leaf, place in zip(leaves, places, strict=True))


def arrange(p: Moe, slots_x: np.ndarray, room: Spread) -> Moe:
    """A mixture whose experts are in slots, with the routes to them."""
    held_x = jnp.asarray(np.maximum(slots_x, 0))
    experts = jax.tree.map(lambda w: jnp.take(w, held_x, axis=0), p.experts)
    return p._replace(experts=experts, routes=routes(slots_x, p.w_router.shape[0], room.replicas))


def mixtures(model: Model) -> list[Moe]:
    """A model's mixtures, those of MTP modules last."""
    layers = [*model.layers, *(mtp.layer for mtp in model.mtp)]
    return [layer.ffn for layer in layers if isinstance(layer.ffn, Moe)]


def map_mixtures(model: Model, change: Callable[[Moe], Moe]) -> Model:
    """The model with all its mixtures changed, in the same order."""
    one = lambda layer: layer._replace(ffn=change(layer.ffn)) if isinstance(layer.ffn, Moe) else layer  # noqa: E731
    layers = tuple(one(layer) for layer in model.layers)
    return model._replace(layers=layers, mtp=tuple(mtp._replace(layer=one(mtp.layer)) for mtp in model.mtp))
