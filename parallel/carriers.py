"""How the bytes of arrays get from one end of a link to the other: two implementations of one protocol.

`sockets` sends them as they are over the link itself, and works always. `jax` only says there where they lie, and
`jax.experimental.transfer` moves them. That has no deadlines (a pull waits for ever for what is not there, and for a
host that is not), no way to take an offer back, and asks nobody who they are; so it is told of arrays only when they
have been asked for, under a number that can't be guessed, and is looked at until it is too late.
"""

import secrets
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from jaxserve.parallel.devices import empty
from jaxserve.parallel.errors import TransferError
from jaxserve.parallel.frames import Frames

Implementation = Literal["sockets", "jax"]

BLOCK = 1 << 20
"""Bytes that share a checksum."""

GLANCE = 0.001
"""Seconds between two looks at what `jax` has brought."""

Spec = jax.ShapeDtypeStruct


@runtime_checkable
class Carrier(Protocol):
    """Of one end of one link. `kind` is that of the frame that says what comes."""

    def give(self, frames: Frames, kind: int, name: str, arrays: Sequence[np.ndarray]) -> None:
        """Sends arrays, with their checksums."""
        ...

    def take(self, frames: Frames, words: dict[str, Any], specs: Sequence[Spec], deadline: float) -> list[np.ndarray]:
        """What comes after such a frame. Raises TransferError, `damaged` if bytes are not those that were sent."""
        ...

    def settle(self, name: str, taken: bool) -> None:
        """Lets go of what was given: the other end has it, or will never ask for it."""
        ...


def carriers(implementation: str | None) -> Callable[[str], Carrier]:
    """What makes the carrier of a link's end, whose host has this address.

    Raises NotImplementedError if there is no such implementation; so does what is returned, if this JAX has none.
    """
    if implementation in (None, "sockets"):
        return lambda _: Sockets()
    if implementation == "jax":
        return Direct
    raise NotImplementedError(f"implementation {implementation!r} of transfer; there are: sockets, jax")


def checksums(array: np.ndarray) -> np.ndarray:
    """CRC-32 of each block of the array's bytes, uint32."""
    view = _bytes_of(array)
    return np.array([zlib.crc32(view[at : at + BLOCK]) for at in range(0, len(view), BLOCK)], np.uint32)


class Sockets:
    """Of each array first the checksums, then the bytes."""

    def give(self, frames: Frames, kind: int, name: str, arrays: Sequence[np.ndarray]) -> None:
        def body() -> Iterator[memoryview]:
            for array in arrays:
                yield _bytes_of(checksums(array))
                yield _bytes_of(array)

        frames.send(kind, {"name": name}, body())

    def take(self, frames: Frames, words: dict[str, Any], specs: Sequence[Spec], deadline: float) -> list[np.ndarray]:
        arrays = [empty(spec.shape, spec.dtype) for spec in specs]
        damaged = sum([_fill(frames, array, deadline) for array in arrays])  # all are read: the next frame follows
        _check(words["name"], damaged)
        return arrays

    def settle(self, name: str, taken: bool) -> None:
        """Nothing is held."""


class Direct:
    """By `jax.experimental.transfer`, with a server of its own, so that links have nothing in common."""

    def __init__(self, host: str):
        """Listens at `host`. Raises NotImplementedError if this JAX can't."""
        try:
            from jax.experimental import transfer  # not there on all platforms

            self._device = jax.local_devices()[0]
            self._server = transfer.start_transfer_server(
                self._device.client, f"{host}:0", [f"{host}:0"], max_num_parallel_copies=2, transfer_size=BLOCK
            )  # by default a server maps gigabytes
        except (ImportError, AttributeError, RuntimeError) as error:
            raise NotImplementedError(f"implementation 'jax' of transfer: {error}") from error
        self._lent: dict[str, tuple[int, list[Spec]]] = {}

    def give(self, frames: Frames, kind: int, name: str, arrays: Sequence[np.ndarray]) -> None:
        arrays = [array for array in arrays if array.size]  # JAX never brings an empty one
        number, sums = secrets.randbits(63), [checksums(array).tolist() for array in arrays]
        self._lent[name] = number, self._specs(arrays)
        self._server.await_pull(number, jax.device_put(arrays, self._device))
        frames.send(kind, {"name": name, "number": number, "address": self._server.address(), "sums": sums})

    def take(self, frames: Frames, words: dict[str, Any], specs: Sequence[Spec], deadline: float) -> list[np.ndarray]:
        full = [spec for spec in specs if spec.size]
        pulled = self._server.connect(words["address"]).pull(words["number"], self._specs(full))
        arrays = _wait(words["name"], pulled, deadline)
        found = [checksums(array) for array in arrays]
        damaged = sum(int((one != said).sum()) for one, said in zip(found, words["sums"], strict=True))
        _check(words["name"], damaged)
        brought = iter(arrays)
        return [next(brought) if spec.size else np.empty(spec.shape, spec.dtype) for spec in specs]

    def settle(self, name: str, taken: bool) -> None:
        """What the other end did not take is pulled by this one: nothing else makes JAX let go of it."""
        number, specs = self._lent.pop(name, (0, []))
        if specs and not taken:
            self._server.connect(self._server.address()).pull(number, specs)

    def _specs(self, arrays: Sequence[Any]) -> list[Spec]:
        where = SingleDeviceSharding(self._device)
        return [jax.ShapeDtypeStruct(each.shape, each.dtype, sharding=where) for each in arrays]


def _bytes_of(array: np.ndarray) -> memoryview:
    return memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def _fill(frames: Frames, array: np.ndarray, deadline: float) -> int:
    """How many of the array's blocks came damaged."""
    view = _bytes_of(array)
    said = np.empty(-(-len(view) // BLOCK), np.uint32)
    frames.fill(_bytes_of(said), deadline)
    damaged = 0
    for at, wanted in zip(range(0, len(view), BLOCK), said, strict=True):
        frames.fill(view[at : at + BLOCK], deadline)
        damaged += zlib.crc32(view[at : at + BLOCK]) != int(wanted)
    return damaged


def _wait(name: str, pulled: list[Any], deadline: float) -> list[np.ndarray]:
    """What JAX brings, once it has."""
    while not all(array.is_ready() for array in pulled):
        if time.monotonic() > deadline:
            raise TransferError(f"{name} did not come in time", "late")
        time.sleep(GLANCE)
    try:
        return jax.device_get(pulled)
    except RuntimeError as error:
        raise TransferError(f"{name} did not come: {error}", "dead") from error


def _check(name: str, damaged: int) -> None:
    if damaged:
        raise TransferError(f"{name} came damaged, in {damaged} blocks of {BLOCK} bytes; ask for it again", "damaged")
