"""An engine's arrays and programs before there are any: arrays are described, programs traced for them.

The engine itself makes and lowers its own by the same functions, so what is said here of a step is true of it.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxserve import options as sizes
from jaxserve.layers.config import Config
from jaxserve.layers.moe import Spread
from jaxserve.layers.spread import in_order, room, spread_params
from jaxserve.layers.transformer import Model, model_params
from jaxserve.options import EngineConfig
from jaxserve.packed_prefill import prefill_packed
from jaxserve.packing import Packer
from jaxserve.parallel.devices import Devices
from jaxserve.parallel.mesh import AnyMesh, abstract_mesh
from jaxserve.parallel.ranks import Ranks
from jaxserve.parallel.sharding import DECODE, Param, Rules, abstract, shardings, zeros
from jaxserve.programs import Tiles
from jaxserve.slots import empty
from jaxserve.spmd import Call
from jaxserve.steps import Gate, State, decode, prefill
from jaxserve.table import SlotTable


class Described(NamedTuple):
    """What an engine keeps, as `jax.ShapeDtypeStruct` with its place on a mesh."""

    params: Model  # the `Param` it is described by
    model: Model
    state: State
    devices: Devices
    spread: Spread | None  # of the experts; None: on one device


def describe(
    cfg: Config, options: EngineConfig, dtype: Any, mesh: AnyMesh | None, params: Model | None = None,
    rules: Rules = DECODE,
) -> Described:  # fmt: skip
    """An engine on one device, or on a mesh. Raises ShardingError if something does not divide.

    `params` describe its weights as they are loaded, by default in floats.
    """
    where = abstract_mesh(1, 1) if mesh is None else mesh.abstract_mesh if isinstance(mesh, Mesh) else mesh
    extra = options.num_redundant_experts, options.num_shared_expert_ranks
    slots_lx = None if mesh is None else in_order(cfg, mesh.size, *extra)
    spread, devices = None if slots_lx is None else room(cfg, slots_lx), Devices(where)
    params = params or model_params(cfg, dtype)
    params = params if slots_lx is None else spread_params(params, cfg, slots_lx)
    model = abstract(params, shardings(params, where, rules))
    return Described(params, model, empty_state(cfg, options, dtype, devices), devices, spread)


def empty_state(cfg: Config, options: EngineConfig, dtype: Any, devices: Devices) -> State:
    """The state of all ranks, before there is a sequence."""
    slots, drafts = options.max_num_seqs * devices.count, sizes.drafts(cfg, options)
    pages = sizes.num_pages(cfg, options, dtype) * devices.count
    cache = sizes.cache_of(cfg, options, pages, dtype)
    experts = cfg.experts.count if cfg.experts else 1
    load = Param((devices.count, max(1, cfg.mixtures), experts), (None, "l", "e"), jnp.int32)
    return devices.make(lambda: State(empty(slots, drafts, cfg.vocab_size), *zeros((cache, load))))


def make_gate(options: EngineConfig, devices: Devices) -> Gate:
    """When guesses are verified."""
    most = min(options.speculation_max_seqs, options.max_num_seqs)
    return Gate(*devices.same((np.float32(options.speculation_entropy), np.int32(most))))


def call_of(
    shape: Tiles | int, given: tuple[Any, Any, Any], packer: Packer, gate: Gate, devices: Devices, ranks: Ranks,
    **static: Any,
) -> Call:  # fmt: skip
    """The program of a shape, for a model, a state and a table: prefill for tiles, decode for rows."""
    mesh = devices.mesh
    if isinstance(shape, Tiles) and mesh:
        ranks = ranks._replace(microbatches=shape.parts)
        return Call(prefill_packed, mesh, ranks, (*given, *packer.shared_chunks([], shape, {})), static)
    if isinstance(shape, Tiles):
        return Call(prefill, mesh, ranks, (*given, *packer.chunks([], shape, {})), static)
    rows = packer.rows({}, shape, {})
    return Call(decode, mesh, ranks, (*given, *rows, gate, packer.number(1)), static)


def trace_described(shape: Tiles | int, given: Described, cfg: Config, options: EngineConfig, ranks: Ranks) -> Any:
    """The program of a shape on the mesh of a described engine: as `Engine` lowers it, for arrays that don't exist."""
    devices, drafts, slots = given.devices, sizes.drafts(cfg, options), options.max_num_seqs
    columns = -(-sizes.model_len(cfg, options) // options.page_size)
    table = SlotTable(slots, columns, frozenset(cfg.eos_ids), devices).on_device()
    packer = Packer(drafts, cfg.vocab_size, slots, devices)
    arrays = given.model, given.state, table
    call = call_of(shape, arrays, packer, make_gate(options, devices), devices, ranks, cfg=cfg, drafts=drafts)
    return call.trace()
