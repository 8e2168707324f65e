"""The one seam between those who ask (`LLM`, the server, benchmarks) and whatever answers."""

from typing import NamedTuple, Protocol

import numpy as np

from jaxserve.counters import Counters
from jaxserve.request import Output, Request


class Memory(NamedTuple):
    """Bytes on the devices."""

    weights: int
    cache: int


class Serving(Protocol):
    """An engine, in this process or spread over many."""

    @property
    def counters(self) -> Counters: ...

    @property
    def max_model_len(self) -> int:
        """Tokens of a prompt and its answer."""
        ...

    @property
    def memory(self) -> Memory: ...

    @property
    def busy(self) -> bool:
        """Whether any request is not answered, of this process, or at its last step of one that shares the steps."""
        ...

    @property
    def many(self) -> bool:
        """Whether other processes share the steps: all must make them, until none is busy."""
        ...

    @property
    def ready(self) -> bool:
        """Whether there is, now, who answers; requests that are added while there is nobody wait."""
        ...

    def check(self, request: Request) -> None:
        """Raises RequestError that names the field and its range if the request can never be served."""
        ...

    def add(self, request: Request) -> None:
        """Queues a request, if `check` has nothing against it and the queue has room."""
        ...

    def abort(self, request_id: str) -> None:
        """Ends a request, whatever its state; nothing happens if it is unknown or finished."""
        ...

    def step(self) -> list[Output]:
        """Advances every running request, and returns what has come; it may be a step that gives nothing yet.

        Each answer's last output, and no other, has a `finish_reason`. Raises what went wrong in it, and RuntimeError
        ever after, unless it recovers.
        """
        ...

    @property
    def expert_layers(self) -> tuple[int, ...]:
        """The numbers of layers that have experts; those of MTP modules follow the model's last."""
        ...

    def expert_load(self) -> np.ndarray:
        """Tokens that each expert has got so far, int64 `[l, e]`, a row for each of these layers.

        Waits for what is launched.
        """
        ...

    def recover(self) -> list[Output]:
        """Makes an engine whole again of which a step has failed.

        Answers that ran are lost, each gets its last output, an error; those that wait go on waiting; what was cached
        is forgotten. Raises RuntimeError if it can't be done, or what goes wrong in doing so.
        """
        ...
