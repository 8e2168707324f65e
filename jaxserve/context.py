"""From options to the connector of an engine: the context cache behind it, and other engines beside it."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxserve import __version__
from jaxserve import options as sizes
from jaxserve.compilation import cache_folder
from jaxserve.connector import Connector
from jaxserve.identity import identify
from jaxserve.layers.config import Config
from jaxserve.layers.transformer import Model
from jaxserve.layout import PageLayout
from jaxserve.options import EngineConfig
from jaxserve.parallel.errors import RequestError
from jaxserve.peers import Peers
from jaxserve.tiers.limits import Limits
from jaxserve.tiers.store import StoreConfig, open_store


def default_store() -> StoreConfig:
    """Memory over a folder in the user's cache."""
    return StoreConfig(folder=cache_folder() / "pages")


def store_at(places: str, memory_gb: float, disk_gb: float, shared_gb: float) -> StoreConfig:
    """A store by what is said on a command line: `memory`, `disk`, a folder, a server's URL, or several with commas.

    Raises RequestError if there are two of a kind, or what is said is nothing of these.
    """
    folder, url = None, None
    for place in places.split(","):
        if "://" in place and url is None:
            url = place
        elif place == "disk" and folder is None:
            folder = cache_folder() / "pages"
        elif "/" in place and "://" not in place and folder is None:
            folder = Path(place).expanduser()
        elif place != "memory":
            second = place == "disk" or "/" in place
            none = f"is none of memory, disk, a folder (./{place}) and a server (redis://HOST:PORT)"
            reason = "is the second of its kind" if second else none
            raise RequestError(f"--context-cache {places}: {place!r} {reason}")
    memory, disk, shared = (Limits(int(gb * 2**30)) for gb in (memory_gb, disk_gb, shared_gb))
    return StoreConfig(memory=memory, folder=folder, disk=disk, url=url, shared=shared)


def make_connector(
    model: Model, cfg: Config, options: EngineConfig, store: StoreConfig | bool | None, peers: Peers | None = None,
    exports: bool = False,
) -> Connector | None:  # fmt: skip
    """What brings and takes the pages of an engine; None if none come or go.

    `model` are the weights before they are spread over a mesh: on any number of devices the pages are the same.
    Raises RequestError if a tier can't be as configured, OSError if there is no port to listen at.
    """
    config = (default_store() if store else None) if isinstance(store, bool) else store
    if config is None and peers is None:
        return None
    if config is not None and not options.enable_prefix_caching:
        raise RequestError("context_cache: it needs enable_prefix_caching, by which pages are found; leave that on")
    dtype = model.embed.dtype
    layout = PageLayout(sizes.cache_of(cfg, options, 1, dtype))
    kind = identify(cfg, weights_version(model), dtype, options).page_kind
    longest = -(-sizes.model_len(cfg, options) // options.page_size) * layout.page_bytes
    peers = peers and peers._replace(limit=max(peers.limit, longest))
    opened = config and open_store(config)
    return Connector(layout, options.page_size, store=opened, kind=kind, peers=peers, exports=exports)


def weights_version(model: Model) -> str:
    """A digest of all weights, and of the release that computes with them.

    All bytes are read, on all cores.
    """
    paths, leaves = zip(*jax.tree.leaves_with_path(model), strict=True)
    with ThreadPoolExecutor() as threads:  # hashing lets other threads run
        digests = threads.map(_digest, leaves)
        told = [(jax.tree_util.keystr(path), digest) for path, digest in zip(paths, digests, strict=True)]
    return hashlib.sha256(repr((__version__, told)).encode()).hexdigest()


def _digest(array: Any) -> str:
    values = np.ascontiguousarray(array)
    told = hashlib.sha256(f"{values.dtype} {values.shape}".encode())
    told.update(values.reshape(-1).view(np.uint8).data)
    return told.hexdigest()
