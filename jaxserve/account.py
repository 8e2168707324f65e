"""A deployment before there is one: what a rank would hold and send, on a mesh of any size and without its devices.

Weights and cache are those of the described engine, collectives those of its traced program: nothing here is a formula
of what the engine does, but the buffers of the paper beside its own, and what INT8 weights would take.
"""

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, Literal

from jax.sharding import AbstractMesh

from jaxserve import options as sizes
from jaxserve.describe import Row, human
from jaxserve.footprint import Footprint, footprint
from jaxserve.layers.config import Config
from jaxserve.layers.int8 import in_int8
from jaxserve.layers.spread import payload
from jaxserve.layers.transformer import model_params
from jaxserve.options import EngineConfig
from jaxserve.parallel.dispatch import buffer_bytes, published_message_bytes
from jaxserve.parallel.errors import RequestError, ShardingError
from jaxserve.parallel.mesh import Topology
from jaxserve.parallel.ranks import Ranks
from jaxserve.parallel.sharding import DECODE, PREFILL
from jaxserve.parallel.traffic import Collective, collectives, total_sent
from jaxserve.programs import Shapes, Tiles
from jaxserve.tracing import Described, describe, trace_described

Phase = Literal["decode", "prefill"]
RULES = {"decode": {"DECODE": DECODE}, "prefill": {"PREFILL": PREFILL, "DECODE": DECODE}}
"""The tables by which weights can lie for a phase, the better one first."""


@dataclass(frozen=True)
class Account:
    """What a rank holds and sends. Sizes in bytes."""

    model: str
    mesh: tuple[int, int]
    phase: Phase
    tokens: int  # of a rank in a step
    keeps: Footprint
    weights: dict[str, int]  # by each table of rules
    buffers: dict[str, tuple[int, int]]  # of dispatch and combine: "traced", and "published"
    filled: float  # the most that messages fill of a buffer
    traffic: Counter[Collective]  # of a step


def account(
    cfg: Config, options: EngineConfig, dtype: Any, mesh: AbstractMesh, phase: Phase, int8: bool = False,
    past: bool = False,
) -> Account:  # fmt: skip
    """Traces the engine's program for the largest step of a phase; of prefill, with the prompts' `past` or without."""
    if phase not in RULES:
        raise RequestError(f"phase = {phase!r}: it must be one of {', '.join(RULES)}")
    params = in_int8(model_params(cfg, dtype)) if int8 else model_params(cfg, dtype)
    described = {name: describe(cfg, options, dtype, mesh, params, rules) for name, rules in RULES[phase].items()}
    best = next(iter(described.values()))
    shape = _shape(cfg, options, mesh.size, phase, past)
    traffic = _traffic(shape, best, cfg, options)
    tokens = shape.tokens // mesh.size if isinstance(shape, Tiles) else shape * (1 + sizes.drafts(cfg, options))
    return Account(
        model=cfg.model_type,
        mesh=(mesh.shape["node"], mesh.shape["die"]),
        phase=phase,
        tokens=tokens,
        keeps=footprint(best),
        weights={name: footprint(d).weights for name, d in described.items()},
        buffers={"traced": _buffers(traffic), "published": _published(cfg, best, mesh.size, tokens)},
        filled=_filled(cfg, best, mesh.size),
        traffic=traffic,
    )


def _shape(cfg: Config, options: EngineConfig, ranks: int, phase: Phase, past: bool) -> Tiles | int:
    """The largest step."""
    longest = sizes.model_len(cfg, options)
    shapes = Shapes.over(ranks, options.max_num_batched_tokens, options.max_num_seqs, longest)
    if phase == "decode":
        return shapes.decode[-1]
    return [tiles for tiles in shapes.prefill if bool(tiles.past) == past][-1]


def _traffic(shape: Tiles | int, engine: Described, cfg: Config, options: EngineConfig) -> Counter[Collective]:
    mesh = engine.devices.mesh
    assert mesh is not None
    ranks = Ranks(payload=payload(engine.params), implementation=options.expert_exchange)
    return collectives(trace_described(shape, engine, cfg, options, ranks).jaxpr, mesh.shape)


def _buffers(traffic: Counter[Collective]) -> tuple[int, int]:
    """What the largest dispatch and the largest combine send, and have room for again to receive."""
    largest = lambda name: max((one.nbytes for one in traffic if one.scope.endswith(name)), default=0)  # noqa: E731
    return largest("dispatch"), largest("combine")


def _published(cfg: Config, engine: Described, ranks: int, tokens: int) -> tuple[int, int]:
    """The same by the paper's formula and messages (arXiv:2506.12708, eq. 1 and 2)."""
    if not cfg.experts or not engine.spread:
        return 0, 0
    given = ranks, tokens, cfg.experts.per_token, engine.spread.slots // ranks
    return buffer_bytes(*given, published_message_bytes(cfg.width)), buffer_bytes(*given, 2 * cfg.width)


def _filled(cfg: Config, engine: Described, ranks: int) -> float:
    """The part of a buffer that messages fill: a token has one for each of its experts. The rest is sent empty."""
    if not cfg.experts or not engine.spread:
        return 0.0
    chosen = cfg.experts.per_token + engine.spread.shared
    return chosen / (ranks * min(chosen, engine.spread.slots // ranks))


def memory_rows(found: Account, machine: Topology | None) -> list[Row]:
    """What a rank keeps, and what it has."""
    others = list(found.weights)[1:]
    rows = [("weights", human(found.keeps.weights))]
    rows += [(f"weights, if they lay as for {name.lower()}", human(found.weights[name])) for name in others]
    rows += [("cache", human(found.keeps.cache)), ("what is known of sequences", human(found.keeps.slots))]
    rows.append(("weights, cache, sequences", human(found.keeps.total)))
    if machine and machine.memory:
        rows.append((f"a device of {machine.name} has", human(machine.memory)))
    return rows


def buffer_rows(found: Account) -> list[tuple[str, str, str]]:
    """Buffers of a layer: what is sent; as much is received."""
    names = {"traced": "traced", "published": "paper's formula, INT8"}
    return [(names[kind], human(there), human(back)) for kind, (there, back) in found.buffers.items()]


def traffic_rows(found: Account, machine: Topology | None) -> list[tuple[str, ...]]:
    """A row for each collective of a step: where, which, how often, of what, how much of it leaves a rank, how long."""
    rows = []
    for one, count in found.traffic.items():
        seconds = _duration(one.seconds(machine, found.mesh[1])) if machine else "-"
        kinds = f"{one.kind} ({', '.join(one.axes)})" if len(one.axes) == 1 else one.kind
        rows.append((one.scope or "states", kinds, str(count), one.dtype, human(one.nbytes), human(one.sent), seconds))
    return rows


def step_rows(found: Account, machine: Topology | None) -> list[Row]:
    """All collectives of a step together."""
    rows = [("leaves a rank", human(total_sent(found.traffic)))]
    if found.filled:
        rows.append(("of the buffers, messages fill", f"{found.filled:.1%}"))
    if seconds := step_seconds(found, machine):
        rows.append(("estimate, if nothing overlaps", _duration(seconds)))
    return rows


def _duration(seconds: float) -> str:
    for unit, size in (("us", 1e-6), ("ms", 1e-3)):
        if seconds < 999.5 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:,.3g} s"


def step_seconds(found: Account, machine: Topology | None) -> float | None:
    """An estimate of the time that collectives take, one after another."""
    if machine is None:
        return None
    return sum(one.seconds(machine, found.mesh[1]) * count for one, count in found.traffic.items())


def as_json(found: Account, machine: Topology | None) -> dict[str, Any]:
    """All of it, for programs: bytes and seconds."""
    each = [
        one._asdict()
        | {"count": count, "sent": one.sent}
        | ({"estimated_seconds": one.seconds(machine, found.mesh[1])} if machine else {})
        for one, count in found.traffic.items()
    ]
    total = {"sent": total_sent(found.traffic), "estimated_seconds": step_seconds(found, machine)}
    plain = asdict(found) | {"keeps": found.keeps._asdict(), "traffic": each, "step": total}
    return plain | {"machine": machine.name if machine else None, "device_bytes": machine.memory if machine else None}


def fit_machine(name: str, mesh: tuple[int, int]) -> Topology:
    """The machine by its name. Raises ShardingError if the mesh is more than it has."""
    machine, (nodes, dies) = Topology.named(name), mesh
    if nodes > machine.nodes or dies > machine.dies:
        raise ShardingError(
            f"{name} has {machine.nodes} nodes of {machine.dies} devices; a mesh of {nodes}x{dies} is not part of it"
        )
    return machine
