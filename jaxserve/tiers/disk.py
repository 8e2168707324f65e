"""Pages in a folder: they outlive the process, and other processes find them."""

import os
import sqlite3
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

from filelock import FileLock

from jaxserve.folders import make_own
from jaxserve.parallel.errors import RequestError
from jaxserve.tiers.counters import Tally
from jaxserve.tiers.index import PATIENCE, Entry, Index
from jaxserve.tiers.keys import Key, digest_of
from jaxserve.tiers.limits import Limits
from jaxserve.tiers.records import HEADER, header, unpack
from jaxserve.tiers.tier import Value

INDEX = "index.sqlite"
UNFINISHED = "unfinished"
ABANDONED = 3600.0
"""Seconds after which nobody writes on at a file that isn't finished."""


class DiskTier:
    """A file for each value, with a checksum; any number of processes may use the folder at once.

    A file is complete before it has its name: a process that is killed leaves behind what is removed an hour later.
    Nothing is forced to the device, which would take longer than computing some pages: what a loss of power leaves
    incomplete has not its checksum. The folder should be on a disk of this machine, as SQLite needs it.
    """

    name = "disk"

    def __init__(self, folder: Path, limits: Limits):
        """Makes the folder if there is none; a RequestError if it can't, or if others can write to it."""
        try:
            make_own(folder)
        except OSError as error:
            raise RequestError(f"pages can't be kept in {folder}: {error}") from None
        self.tally = Tally()
        self._folder, self._limits = folder, limits
        self._index = self._open()

    def get(self, namespace: str, key: Key) -> Value | None:
        value = None
        with self.tally.seconds("read_seconds"), self._failures():
            value = self._read(namespace, key)
        self.tally.found(None if value is None else len(value))
        return value

    def put(self, namespace: str, key: Key, value: Value) -> None:
        entry = Entry(_place(namespace), key, HEADER.size + len(value))
        if entry.size > self._limits.of(namespace):
            self.tally.add(dropped=1)
            return
        with self.tally.seconds("write_seconds"), self._failures():
            if entry[:2] in self._index and self._path(entry.place, key).exists():
                self._index.use(entry.place, key)
                return
            self._write(namespace, entry, (header(namespace, key, value), value))
            self.tally.add(written_bytes=len(value))

    def drop(self, namespace: str) -> bool:
        place = _place(namespace)
        with self._failures(), self._index.change():
            self._index.remove_all(place)
            for path in _files(self._folder / place):
                path.unlink(missing_ok=True)
            with suppress(FileNotFoundError):
                (self._folder / place).rmdir()
            return True
        return False

    def close(self) -> None:
        self._index.close()

    def _read(self, namespace: str, key: Key) -> Value | None:
        place = _place(namespace)
        if (place, key) not in self._index:
            return None
        try:
            value = unpack(namespace, key, self._path(place, key).read_bytes())
        except FileNotFoundError:  # somebody removed it by hand
            self._index.remove(place, key)
            return None
        if value is None:
            self.tally.add(damaged=1)
            self._remove(place, key)
            return None
        with suppress(sqlite3.Error):  # it can be read from a disk that is full
            self._index.use(place, key)
        return value

    def _write(self, namespace: str, entry: Entry, parts: Iterable[bytes | Value]) -> None:
        """All of it or nothing."""
        path = self._path(entry.place, entry.key)
        unfinished = self._write_aside(parts)
        try:
            with self._index.change():
                self._index.add(entry)
                removed = self._index.excess(entry.place, self._limits.of(namespace), self._limits.total)
                for old in removed:
                    self._unlink(old.place, old.key)
                path.parent.mkdir(mode=0o700, exist_ok=True)  # in the change: so nobody removes it meanwhile
                unfinished.replace(path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            raise
        self.tally.add(evicted=len(removed))

    def _write_aside(self, parts: Iterable[bytes | Value]) -> Path:
        number, name = tempfile.mkstemp(dir=self._folder / UNFINISHED)
        try:
            with os.fdopen(number, "wb") as out:
                out.writelines(parts)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        return Path(name)

    def _remove(self, place: str, key: Key) -> None:
        with self._index.change():
            self._index.remove(place, key)
            self._unlink(place, key)

    def _unlink(self, place: str, key: Key) -> None:
        """In a change of the index. The folder of a tenant that has nothing more goes too: clients name tenants."""
        path = self._path(place, key)
        path.unlink(missing_ok=True)
        with suppress(OSError):  # it isn't empty
            path.parent.rmdir()

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """Counts what the disk refuses: a value that can't be kept or read is computed again."""
        try:
            yield
        except (OSError, sqlite3.Error):
            self.tally.add(failed=1)

    def _open(self) -> Index:
        """The folder's index; one process opens it at a time."""
        try:
            with FileLock(self._folder / "opening.lock", timeout=PATIENCE, mode=0o600):
                self._clean()
                return self._open_index()
        except (OSError, sqlite3.Error) as error:
            raise RequestError(f"{self._folder}: pages can't be kept in this folder: {error}") from error

    def _open_index(self) -> Index:
        """Made from the files if it is damaged."""
        try:
            return self._reconciled()
        except sqlite3.OperationalError:  # not damaged: locked, or the disk is full
            raise
        except sqlite3.DatabaseError:
            for path in self._folder.glob(f"{INDEX}*"):
                path.unlink(missing_ok=True)
            return self._reconciled()

    def _clean(self) -> None:
        """Removes what a killed process had not finished."""
        (self._folder / UNFINISHED).mkdir(mode=0o700, exist_ok=True)
        for path in _files(self._folder / UNFINISHED):
            with suppress(FileNotFoundError):  # another process finishes it, or cleans too
                if path.stat().st_mtime < time.time() - ABANDONED:
                    path.unlink()

    def _reconciled(self) -> Index:
        """With an entry for each file, and no others: a process may have been killed between the two."""
        with ExitStack() as failed:
            index = failed.enter_context(closing(Index(self._folder / INDEX)))
            self._reconcile(index)
            failed.pop_all()
            return index

    def _reconcile(self, index: Index) -> None:
        with index.change():
            found, known = dict.fromkeys(self._found()), dict.fromkeys(index.entries())
            for entry in known.keys() - found.keys():
                index.remove(entry.place, entry.key)
            for entry in found:  # in their order
                if entry not in known:
                    index.add(entry)

    def _found(self) -> list[Entry]:
        """What there are files of, the oldest first."""
        found = []
        for folder in self._folder.iterdir():
            for path in _files(folder) if folder.name != UNFINISHED and folder.is_dir() else ():
                with suppress(ValueError, OSError):
                    stat = path.stat()
                    found.append((stat.st_mtime_ns, Entry(folder.name, bytes.fromhex(path.name), stat.st_size)))
        return [entry for _, entry in sorted(found)]

    def _path(self, place: str, key: Key) -> Path:
        return self._folder / place / key.hex()


def _place(namespace: str) -> str:
    """The name of its folder, whatever characters it has."""
    return digest_of(namespace.encode())[:16].hex()


def _files(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []
