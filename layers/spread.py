"""A model over the ranks of a mesh: which experts lie where, and the rest on all of them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxserve.layers.config import Config, Experts
from jaxserve.layers.int8 import described, is_int8
from jaxserve.layers.moe import Mlp, Moe, Spread
from jaxserve.layers.transformer import Model, has_biases, model_params
from jaxserve.parallel.errors import ShardingError
from jaxserve.parallel.placement import routes
from jaxserve.parallel.qarray import QArray
from jaxserve.parallel.ranks import Payload
from jaxserve.parallel.sharding import DECODE, Rules, abstract, place, shardings


def in_order(cfg: Config, ranks: int, redundant: int = 0, shared_ranks: int = 0) -> np.ndarray:
    """The plain placement, `slots_lx`: the experts in order, then replicas of the first, for each layer with experts.

    As many replicas as are `redundant`, and as fill the ranks up. MTP modules come last. The first `shared_ranks` hold
    a copy of the shared expert each and nothing else (arXiv:2506.12708, section 5.1); without them every rank has one
    of its own.
    """
    experts = cfg.experts.count if cfg.experts else 1
    if not 0 <= shared_ranks < ranks:
        raise ShardingError(f"{shared_ranks} ranks for the shared expert, of {ranks}: at least one must have others")
    each = -(-(experts + redundant) // (ranks - shared_ranks))
    shared = _shared_slots(experts, shared_parts(cfg, bool(shared_ranks)), shared_ranks, each)
    return np.tile(np.append(shared, np.arange(each * (ranks - shared_ranks)) % experts), (cfg.mixtures, 1))


def _shared_slots(first: int, parts: int, ranks: int, each: int) -> np.ndarray:
    """The parts of the shared expert on ranks with so many slots: all on each, or if they are too few, in turn."""
    if parts <= each:
        return np.tile(np.pad(first + np.arange(parts), (0, each - parts), constant_values=-1), ranks)
    if parts > ranks * each:
        raise ShardingError(f"{ranks} ranks have {ranks * each} slots for the {parts} parts of the shared expert")
    return first + np.arange(ranks * each) % parts


def room(cfg: Config, slots_lx: np.ndarray) -> Spread:
    """What placements like this one ask for: all that is not an expert's only slot may be replicas of a single one."""
    count = cfg.experts.count if cfg.experts else 0
    shared = shared_parts(cfg, bool((slots_lx >= count).any()))
    slots = slots_lx.shape[1]
    return Spread(slots, max(1, slots - count - shared + 1), shared)


def spread(model: Model, cfg: Config, mesh: Mesh, slots_lx: np.ndarray, rules: Rules = DECODE) -> Model:
    """The weights where they belong: each expert in its slots of each layer, what the rules do not split on all ranks.

    Raises ShardingError if something does not divide, or an expert has no slot.
    """
    wanted = room(cfg, slots_lx)
    params = described(model, model_params(cfg, model.embed.dtype, biases=has_biases(model)))
    places = shardings(spread_params(params, cfg, slots_lx), mesh, rules)
    each = zip(slots_lx, mixtures(places), strict=True)

    def arranged(p: Moe) -> Moe:  # one at a time: they don't all fit on one device twice
        slots_x, where = next(each)
        return place(arrange(p, slots_x, wanted), where)

    return place(map_mixtures(model, arranged), places)


def spread_params(params: Model, cfg: Config, slots_lx: np.ndarray) -> Model:
    """The tree of `Param` of a model over ranks, from that of the model on one device."""
    wanted = room(cfg, slots_lx)
    whole = model_params(cfg, params.embed.dtype, wanted, has_biases(params))
    if not is_int8(params):
        return whole
    slots = iter(slots_lx)
    arranged = lambda model: map_mixtures(model, lambda p: arrange(p, next(slots), wanted))  # noqa: E731
    return described(jax.eval_shape(arranged, abstract(params)), whole)


def payload(model: Model) -> Payload:
    """What tokens are sent to experts as: INT8 if all of them would round a token so, with one scale; else floats."""
    first = [w for p in mixtures(model) for w in (p.experts.w_gate, p.experts.w_up)]
    rounded = [isinstance(w, QArray) and w.scale.shape[-1] == 1 for w in first]
    return "int8" if rounded and all(rounded) else "float"


def arrange(p: Moe, slots_x: np.ndarray, wanted: Spread) -> Moe:
    """A mixture whose experts are in slots, with the routes to them."""
    held_x, experts = jnp.asarray(np.maximum(slots_x, 0)), p.experts
    if p.shared is not None and wanted.shared:
        experts = jax.tree.map(lambda *parts: jnp.concatenate(parts), experts, _cut(p.shared, experts, wanted.shared))
        p = p._replace(shared=None)
    placed = jax.tree.map(lambda w: jnp.take(w, held_x, axis=0), experts)
    return p._replace(experts=placed, routes=routes(slots_x, experts.w_gate.shape[0], wanted.replicas))


def _cut(p: Mlp, experts: Mlp, count: int) -> Mlp:
    """A network as so many narrower ones, whose results add up to its own, to lie among these experts."""
    if not _fits(p, experts, count):
        raise ShardingError("shared and routed experts are not INT8 in the same way; shared ones can have no own ranks")
    rows = lambda w: w.reshape(count, -1, w.shape[1])  # noqa: E731
    columns = lambda w, like: _cut_columns(w, count, like.shape[-1])  # noqa: E731
    gate, up = jax.tree.map(rows, (p.w_gate, p.w_up))
    return Mlp(gate, up, jax.tree.map(columns, p.w_down, experts.w_down))


def _fits(p: Mlp, experts: Mlp, count: int) -> bool:
    """Whether the same matrices are INT8, with scales for the same inputs, or for some that can be cut."""
    if jax.tree.structure(p) != jax.tree.structure(experts):
        return False
    columns = lambda tree: [w.shape[-1] for w in jax.tree.leaves(tree)]  # noqa: E731
    whole, part = columns(p.w_down), columns(experts.w_down)
    return columns(p[:2]) == columns(experts[:2]) and not any(count * m % n for n, m in zip(whole, part, strict=True))


def _cut_columns(w: jax.Array, count: int, width: int) -> jax.Array:
    """Codes, or scales, of which there may be fewer: one is for several columns, or all."""
    return jnp.repeat(w, count * width // w.shape[1], axis=1).reshape(w.shape[0], count, -1).swapaxes(0, 1)


def shared_parts(cfg: Config, apart: bool) -> int:
    """How many experts of a routed one's width the shared one is cut into; 0 if it is not to lie in slots."""
    match cfg.experts:
        case Experts(shared_width=shared, width=width) if apart and shared and shared % width == 0:
            return shared // width
        case Experts(shared_width=0) if apart:
            raise ShardingError("the model has no shared expert; it can have no ranks of its own")
        case Experts(shared_width=shared, width=width) if apart:
            raise ShardingError(f"the shared expert, of width {shared}, can't be cut into experts of width {width}")
    return 0


def mixtures(model: Model) -> list[Moe]:
    """A model's mixtures, those of MTP modules last."""
    layers = [*model.layers, *(mtp.layer for mtp in model.mtp)]
    return [layer.ffn for layer in layers if isinstance(layer.ffn, Moe)]


def map_mixtures(model: Model, change: Callable[[Moe], Moe]) -> Model:
    """The model with all its mixtures changed, in the same order."""
    one = lambda layer: layer._replace(ffn=change(layer.ffn)) if isinstance(layer.ffn, Moe) else layer  # noqa: E731
    layers = tuple(one(layer) for layer in model.layers)
    return model._replace(layers=layers, mtp=tuple(mtp._replace(layer=one(mtp.layer)) for mtp in model.mtp))
