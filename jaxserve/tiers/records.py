"""Values as they are written: after their length and a checksum, which tell whether what comes back was put so."""

import hashlib
import struct

from jaxserve.tiers.keys import Key, digest_of
from jaxserve.tiers.tier import Value

HEADER = struct.Struct("<8sQ32s")
MAGIC = b"jaxserve"


def header(namespace: str, key: Key, value: Value) -> bytes:
    """What stands before a value."""
    return HEADER.pack(MAGIC, len(value), _checksum(namespace, key, value))


def unpack(namespace: str, key: Key, record: bytes) -> Value | None:
    """The value of a record, without a copy; None if it is damaged, or that of another key."""
    value = memoryview(record)[HEADER.size :]
    if len(record) < HEADER.size:
        return None
    magic, length, checksum = HEADER.unpack_from(record)
    if magic != MAGIC or length != len(value) or checksum != _checksum(namespace, key, value):
        return None
    return value


def _checksum(namespace: str, key: Key, value: Value) -> bytes:
    """SHA-256, for which processors have instructions; Python lets other threads run meanwhile."""
    whole = hashlib.sha256(digest_of(namespace.encode(), key))
    whole.update(value)
    return whole.digest()
