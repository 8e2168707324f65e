"""The load of experts, for those who watch the server."""

import asyncio
import time
from contextlib import suppress

import numpy as np

from jaxserve.async_engine import AsyncEngine
from jaxserve.parallel.errors import EngineError

PAUSE = 1.0
"""Seconds between two looks: each waits for the steps that are on their way, and the engine for it."""


class ExpertLoad:
    """Tokens that each expert has got so far, as they were at the last look."""

    def __init__(self, engine: AsyncEngine):
        self._engine = engine
        self._look: asyncio.Task[None] | None = None
        self.layers = engine.engine.expert_layers
        self._load_le: np.ndarray | None = None
        self._at = -PAUSE

    async def read(self) -> np.ndarray | None:
        """int64 `[l, e]`, a row for each of `layers`; None if there are none. An engine that hangs holds nobody."""
        if self._look is None and time.monotonic() - self._at >= PAUSE:
            self._look = asyncio.create_task(self._fetch())
        if self._look:
            await asyncio.wait([self._look], timeout=PAUSE)
        return self.last

    async def _fetch(self) -> None:
        try:
            with suppress(EngineError):
                self._load_le = await self._engine.ask(self._engine.engine.expert_load)
        finally:
            self._at, self._look = time.monotonic(), None

    @property
    def last(self) -> np.ndarray | None:
        """What the last look saw."""
        return self._load_le if self.layers else None
