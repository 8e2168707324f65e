"""For what other threads and processes do."""

import time
from collections.abc import Callable
from typing import Any

SOON = 60.0
"""Seconds in which what should happen has happened, on a busy machine too."""


def eventually(condition: Callable[[], Any], seconds: float = SOON) -> bool:
    """Whether it comes to hold."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return bool(condition())
