"""A sender in a process of its own: `python -m tests.parallel.sending_process KIND IMPLEMENTATION`.

Offers all pages of a cache's one rank under `pages`, and again under `0`, `1`, …; prints where it listens, and waits.
"""

import sys
import time

import jax

from jaxserve.parallel.devices import Devices
from jaxserve.parallel.pages import PageCopier
from jaxserve.parallel.transfer import Sender
from tests.parallel.caches import PAGES, host_cache, on_devices

TOKEN = b"of both processes"


def main(kind: str, implementation: str) -> None:
    jax.config.update("jax_platforms", "cpu")
    devices = Devices()
    cache = on_devices(host_cache(kind, 1, seed=7), devices)
    sender = Sender(TOKEN, 10**8, implementation=None if implementation == "sockets" else "jax")
    taken = PageCopier(devices, PAGES).gather(cache, {0: range(PAGES)})[0]
    for name in ["pages", *map(str, range(3))]:
        assert sender.offer(name, taken)
    print(sender.address[1], flush=True)
    time.sleep(100)


if __name__ == "__main__":
    main(*sys.argv[1:])
