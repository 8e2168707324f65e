"""Moves experts between the ranks while requests are served, so that all have about as much to do."""

from collections import deque
from collections.abc import Callable
from itertools import zip_longest
from typing import Any

import jax
import numpy as np

from jaxserve.layers.moe import Moe
from jaxserve.layers.spread import map_mixtures, mixtures
from jaxserve.layers.transformer import Model
from jaxserve.parallel.devices import Devices
from jaxserve.parallel.errors import ShardingError
from jaxserve.parallel.moves import MOVES
from jaxserve.parallel.placement import Round, between, held, routes

Move = Callable[[Any, Any, Any], Any]
"""`parallel.moves.move` on a mesh; takes the weights over."""


class Rebalancer:
    """The placement of a model's experts, and the way to the one that is wanted.

    Moves are programs between two steps: what was launched before runs with the weights and routes that it was given,
    what comes after has the new ones, and waits for them. So no step ever finds a slot half written; and as shapes
    stay, nothing is compiled.
    """

    def __init__(self, model: Model, devices: Devices):
        self._devices = devices
        self.slots_lx = np.array([held(jax.device_get(p.routes), p.experts.w_gate.shape[0]) for p in mixtures(model)])
        self._rounds: deque[tuple[Round | None, ...]] = deque()

    @property
    def busy(self) -> bool:
        return bool(self._rounds)

    def aim(self, slots_lx: np.ndarray) -> None:
        """Sets the placement that is wanted; the way there starts with the next `advance`. Raises as `ways` does."""
        self._rounds = deque(zip_longest(*self.ways(slots_lx)))

    def ways(self, slots_lx: np.ndarray) -> list[tuple[Round, ...]]:
        """The rounds in which each layer gets there.

        Raises ShardingError if the placement has another shape, leaves an expert without a slot, or can't be reached.
        """
        if slots_lx.shape != self.slots_lx.shape:
            raise ShardingError(f"slots_lx has shape {slots_lx.shape}; the model's has {self.slots_lx.shape}")
        return [between(now_x, new_x) for now_x, new_x in zip(self.slots_lx, slots_lx, strict=True)]

    def advance(self, model: Model, move: Move) -> Model:
        """The model after the next round of every layer."""
        rounds = iter(enumerate(self._rounds.popleft()))
        return map_mixtures(model, lambda p: self._apply(p, next(rounds), move))

    def _apply(self, p: Moe, numbered: tuple[int, Round | None], move: Move) -> Moe:
        layer, step = numbered
        if step is None or p.routes is None:
            return p
        experts = p.experts
        sources = {int(expert): slot for slot, expert in enumerate(step.disabled_x) if expert >= 0}
        pairs = [(sources[int(step.slots_x[slot])], slot) for slot in step.written if step.slots_x[slot] >= 0]
        for first in range(0, len(pairs), MOVES):
            some = np.transpose(pairs[first : first + MOVES])
            padded = np.pad(some, ((0, 0), (0, MOVES - some.shape[1])), constant_values=step.slots_x.size)
            experts = move(experts, *self._devices.same(tuple(padded.astype(np.int32))))
        self.slots_lx[layer] = step.slots_x
        count, width = p.routes.slots_em.shape
        return p._replace(experts=experts, routes=self._devices.same(routes(step.slots_x, count, width)))
