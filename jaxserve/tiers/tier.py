"""What each tier promises."""

from typing import Protocol

from jaxserve.tiers.counters import Tally
from jaxserve.tiers.keys import Key

Value = memoryview
"""A page's bytes, read-only. What is below a value that was put must not change: it may be kept without a copy."""


class Tier(Protocol):
    """Values by namespace and key. What is put under a key is always the same, so that nothing is ever replaced.

    Threads may call whatever they like at once. No call raises because of a disk, a server or what is read from them:
    then there is nothing to be found, or a put is without effect, and `tally` says why.
    """

    name: str
    tally: Tally

    def get(self, namespace: str, key: Key) -> Value | None:
        """What was put, if it is still there; it has then been used."""
        ...

    def put(self, namespace: str, key: Key, value: Value) -> None:
        """Keeps a value, or uses it where it is there already. What was not used for longest makes room."""
        ...

    def drop(self, namespace: str) -> bool:
        """Removes all of a namespace; whether that could be done."""
        ...

    def close(self) -> None: ...


def as_value(data: bytes | bytearray | memoryview) -> Value:
    """A view, without a copy; a TypeError if the data isn't contiguous."""
    return memoryview(data).cast("B").toreadonly()
