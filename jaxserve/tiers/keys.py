"""Keys of pages: by them one process finds what another has computed."""

import hashlib
from typing import NamedTuple

Key = bytes


class PageKind(NamedTuple):
    """All that the bytes of a page depend on besides its tokens and those before them."""

    model: str  # what is computed with the weights: a digest of its config, for example
    version: str  # of the weights as they are computed with: rounded when they are loaded, they are others
    dtype: str  # of the cache
    page_size: int  # tokens

    def key(self, digest: bytes) -> Key:
        """That of the page whose tokens, chained with those of all before it, have this digest (`PagePool.keys`)."""
        return digest_of(*(str(field).encode() for field in self), digest)


def digest_of(*parts: bytes) -> bytes:
    """32 bytes; of other parts, others: each part is told from the next by its length."""
    whole = hashlib.blake2b(digest_size=32)
    for part in parts:
        whole.update(len(part).to_bytes(8, "little"))
        whole.update(part)
    return whole.digest()
