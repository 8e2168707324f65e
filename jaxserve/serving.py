"""The one seam between those who ask (`LLM`, the server, benchmarks) and whatever answers."""

from typing import Protocol

from jaxserve.request import Output, Request


class Serving(Protocol):
    """An engine, in this process or spread over many."""

    def check(self, request: Request) -> None:
        """Raises RequestError that names the field and its range if the request can never be served."""
        ...

    def add(self, request: Request) -> None:
        """Queues a request, if `check` has nothing against it."""
        ...

    def abort(self, request_id: str) -> None:
        """Ends a request, whatever its state; nothing happens if it is unknown or finished."""
        ...

    def step(self) -> list[Output]:
        """Advances every running request, and returns what that adds; empty if nothing is queued or running."""
        ...
