"""Compiled programs as they run, kept for the next process: it need not trace and lower them, which takes longest.

JAX's own cache is asked with a lowered program. Here it is asked with all that a program comes from; where only its
source has changed, the lowered program says whether it is still the same.
"""

import functools
import hashlib
import os
import pickle
import sys
import tempfile
import threading
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental.serialize_executable import deserialize_and_load, serialize

from jaxserve.origins import Options, devices_of, lowered_origin, origin
from jaxserve.spmd import Call

LIMIT = 2**32
"""Bytes of all that is kept; what wasn't used for longest goes first."""


class Executables:
    """What is kept in a folder; in none, or one that others can write to: nothing.

    Any number of processes may use it at once. What is damaged, or can't be loaded, is as if it weren't there. By the
    origin of a program there is a file with that of its lowered form, by which there is a file with the program.
    """

    def __init__(self, folder: Path | None = None, limit: int = LIMIT):
        self._folder, self._limit = folder if folder and _is_own(folder) else None, limit

    def load(self, call: Any, options: Options) -> Any | None:
        """The program as an earlier process has compiled it, if one has."""
        name = origin(call, options) if self._folder else None
        lowered = self._read(name) if name else None
        return self._load(lowered.decode(), call) if lowered else None

    def lower(self, call: Any) -> Any:
        """The program lowered, to be compiled; then it is kept."""
        return call.lower() if self._folder is None else Kept(call, call.lower(), self)

    def compile(self, call: Call, lowered: Any, options: Options) -> Any:
        """Gives a lowered program, and keeps it unless JAX had it in its own cache."""
        name, by_source = lowered_origin(call, lowered, options), origin(call, options)
        compiled = self._load(name, call)
        if compiled is None:
            compiled, fresh = _compile(lowered, options)
            if not fresh or not self._keep(name, compiled):
                return compiled
        if by_source:
            self._write(by_source, name.encode())
        return compiled

    def _load(self, name: str, call: Call) -> Any | None:
        data = self._read(name)
        if data is None:
            return None
        try:
            return deserialize_and_load(*pickle.loads(zlib.decompress(data)), execution_devices=devices_of(call))
        except Exception:  # of whatever kind: this is what another process has written
            self._drop(name)
            return None

    def _keep(self, name: str, compiled: Any) -> bool:
        try:
            data = pickle.dumps(serialize(compiled))
        except Exception:  # of whatever kind: platforms differ in what they can write down
            return False
        self._write(name, zlib.compress(data, level=1))
        return True

    def _read(self, name: str) -> bytes | None:
        try:
            whole = self._path(name).read_bytes()
            os.utime(self._path(name))
        except OSError:
            return None
        checksum, data = whole[:32], whole[32:]
        if hashlib.sha256(data).digest() == checksum:
            return data
        self._drop(name)
        return None

    def _write(self, name: str, data: bytes) -> None:
        """All of it or nothing: others may be reading or writing the same."""
        with suppress(OSError):
            file, unfinished = tempfile.mkstemp(dir=self._folder)
            with os.fdopen(file, "wb") as out:
                out.write(hashlib.sha256(data).digest() + data)
            path = Path(unfinished).replace(self._path(name))
            self._make_room(path.parent)

    def _make_room(self, folder: Path) -> None:
        files = []
        for path in folder.iterdir():
            with suppress(OSError):  # others make room too
                found = path.stat()
                files.append((found.st_mtime, found.st_size, path.name))
        excess = sum(size for _, size, _ in files) - self._limit
        for _, size, name in sorted(files):
            if excess <= 0:
                return
            self._drop(name)
            excess -= size

    def _drop(self, name: str) -> None:
        with suppress(OSError):
            self._path(name).unlink()

    def _path(self, name: str) -> Path:
        assert self._folder is not None
        return self._folder / name


class Kept(NamedTuple):
    """A lowered program that is kept when it is compiled."""

    call: Call
    lowered: Any
    executables: Executables

    def compile(self, options: Options = None) -> Any:
        return self.executables.compile(self.call, self.lowered, options)


def _is_own(folder: Path) -> bool:
    """Whether nobody else can write to the folder, which is made if there is none: what is loaded from it is run."""
    if sys.platform == "win32":  # where rights aren't told by bits
        return False
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError:
        return False
    return found.st_uid == os.getuid() and not found.st_mode & 0o022


def _compile(lowered: Any, options: Options) -> tuple[Any, bool]:
    """The program, and whether XLA has made it now.

    What JAX has loaded from its cache can't be kept: written down again, it lacks some of its functions.
    """
    seen = _events().__dict__
    seen.clear()
    compiled = lowered.compile(options)
    return compiled, "compile_requests_use_cache" in seen and "cache_hits" not in seen


@functools.cache
def _events() -> threading.local:
    """What JAX has told of its cache, by thread."""
    events = threading.local()

    def note(event: str, **_: Any) -> None:
        if event.startswith("/jax/compilation_cache/"):
            setattr(events, event.rsplit("/", 1)[-1], True)

    jax.monitoring.register_event_listener(note)
    return events
