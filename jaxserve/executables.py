"""Compiled programs as they run, kept for the next process: it need not trace and lower them, which takes longest.

JAX's own cache is asked with a lowered program. Here it is asked with all that a program comes from; where only its
source has changed, the lowered program says whether it is still the same.
"""

import hashlib
import os
import pickle
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from filelock import FileLock
from jax.experimental.serialize_executable import deserialize_and_load, serialize

from jaxserve.folders import make_own
from jaxserve.origins import Options, devices_of, lowered_origin, origin

WAIT = 300.0
"""Seconds that a process waits for another that compiles what it wants."""
LIMIT = 2**32
"""Bytes of all that is kept; what wasn't used for longest goes first."""


class Executables:
    """What is kept in a folder; in none, or one that others can write to: nothing.

    Any number of processes may use it at once. What is damaged, or can't be loaded, is as if it weren't there. By the
    origin of a program there is a file with that of its lowered form, by which there is a file with the program.
    """

    def __init__(self, folder: Path | None = None, limit: int = LIMIT):
        self._folder, self._limit = None, limit
        with suppress(OSError):
            if folder:
                make_own(folder)
                self._locks = folder.with_name(f"{folder.name}-locks")
                self._locks.mkdir(mode=0o700, exist_ok=True)
                self._folder = folder

    def program(self, call: Any, options: Options) -> "Program":
        """One that is to be loaded or compiled. What it comes from is told here: settings of this thread count."""
        if self._folder is None:
            return Program(call, options)
        return Program(call, options, self, origin(call, options))

    def find(self, call: Any, source: str) -> Any | None:
        """The program of a source."""
        lowered = self._read(source)
        return self._load(lowered.decode(), call) if lowered else None

    def compile(self, call: Any, lowered: Any, options: Options, name: str, source: str | None) -> Any:
        """Gives a lowered program, and keeps it unless JAX had it in its own cache.

        Of several processes that want the same at once, one compiles it, and the others wait.
        """
        with self._alone(name):
            compiled = self._load(name, call)
            if compiled is None:
                compiled, fresh = _compile(lowered, options)
                if not fresh or not self._keep(name, compiled):
                    return compiled
        if source:
            self._write(source, name.encode())
        return compiled

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """While nobody else does, but nobody waits for ever."""
        with ExitStack() as held:
            with suppress(OSError, NotImplementedError):  # the time is over, or the file system has no locks
                held.enter_context(FileLock(self._locks / name[:2], timeout=WAIT, mode=0o600))
            yield

    def _load(self, name: str, call: Any) -> Any | None:
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
            try:
                with os.fdopen(file, "wb") as out:
                    out.write(hashlib.sha256(data).digest() + data)
                path = Path(unfinished).replace(self._path(name))
            except OSError:
                Path(unfinished).unlink()
                raise
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


class Program(NamedTuple):
    """A program to be loaded or compiled, in any thread, and to be lowered, in the one that wants it."""

    call: Any  # is lowered; if it is to be kept, traced first, as a `spmd.Call`
    options: Options
    executables: Executables | None = None  # where it is kept, if it is
    source: str | None = None  # what it comes from, if that can be told

    def load(self) -> Any | None:
        """The program as an earlier process has compiled it, if one has."""
        return self.executables.find(self.call, self.source) if self.executables and self.source else None

    def lower(self) -> Callable[[], Any]:
        """Lowers it, and gives what compiles it."""
        if self.executables is None:
            return partial(self.call.lower().compile, self.options)
        traced = self.call.trace()
        lowered, call, options = traced.lower(), self.call, self.options
        name = lowered_origin(call, traced, lowered, options)
        return partial(self.executables.compile, call, lowered, options, name, self.source)


def _compile(lowered: Any, options: Options) -> tuple[Any, bool]:
    """The program, and whether XLA has made it now.

    What JAX has loaded from its cache can't be kept: written down again, it lacks some of its functions.
    """
    seen = _events().__dict__
    seen.clear()
    compiled = lowered.compile(options)
    return compiled, "compile_requests_use_cache" in seen and "cache_hits" not in seen


@cache
def _events() -> threading.local:
    """What JAX has told of its cache, by thread."""
    events = threading.local()

    def note(event: str, **_: Any) -> None:
        if event.startswith("/jax/compilation_cache/"):
            setattr(events, event.rsplit("/", 1)[-1], True)

    jax.monitoring.register_event_listener(note)
    return events
