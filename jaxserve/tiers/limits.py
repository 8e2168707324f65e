"""How much a tier may hold, in all and of each namespace."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxserve.parallel.errors import RequestError


@dataclass(frozen=True)
class Limits:
    """Capacities in bytes. When one is reached, what was not used for longest goes: of the namespace, or of all.

    total      of all namespaces together
    namespace  of each namespace; None: as much as there is in all
    named      of namespaces that have a capacity of their own, by name
    """

    total: int
    namespace: int | None = None
    named: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self):
        check_bytes("total", self.total)
        if self.namespace is not None:
            check_bytes("namespace", self.namespace)
        for name, size in self.named.items():
            check_bytes(f"named[{name!r}]", size)

    def of(self, namespace: str) -> int:
        """Bytes that a namespace may hold."""
        own = self.named.get(namespace, self.namespace)
        return self.total if own is None else min(own, self.total)


def check_bytes(name: str, value: object) -> None:
    """Raises RequestError if that is no number of bytes."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise RequestError(f"{name} = {value!r}: it must be a whole number of bytes, 0 or more")
