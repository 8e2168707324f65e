"""What a folder of pages holds, and in which order it was used: in SQLite, for any number of processes."""

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from jaxserve.tiers.keys import Key

PATIENCE = 5.0
"""Seconds to wait for the changes of other processes."""

SCHEMA = """
PRAGMA journal_mode = WAL;
PRAGMA synchronous = NORMAL;
CREATE TABLE IF NOT EXISTS entries (
    place TEXT, key BLOB, size INTEGER NOT NULL, used INTEGER NOT NULL, PRIMARY KEY (place, key)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_use ON entries (used);
CREATE INDEX IF NOT EXISTS by_place ON entries (place, used);
CREATE TABLE IF NOT EXISTS totals (place TEXT PRIMARY KEY, size INTEGER NOT NULL);
CREATE TRIGGER IF NOT EXISTS added AFTER INSERT ON entries BEGIN
    INSERT INTO totals VALUES (new.place, new.size) ON CONFLICT DO UPDATE SET size = size + new.size;
END;
CREATE TRIGGER IF NOT EXISTS removed AFTER DELETE ON entries BEGIN
    UPDATE totals SET size = size - old.size WHERE place = old.place;
    DELETE FROM totals WHERE place = old.place AND size = 0;
END;
"""
NEXT = "(SELECT coalesce(max(used), 0) + 1 FROM entries)"


class Entry(NamedTuple):
    place: str  # a folder, for each namespace
    key: Key
    size: int  # bytes of its file


class Index:
    """Entries by place and key. Raises sqlite3.Error if the file can't be read or written.

    It is exact as long as files come and go within `change`. If the process is killed there, an entry can be without
    its file, or a file without its entry; neither makes a wrong value of anything.
    """

    def __init__(self, path: Path):
        self._lock = threading.RLock()
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))  # SQLite's other files get the same rights
        self._database = sqlite3.connect(path, timeout=PATIENCE, isolation_level=None, check_same_thread=False)
        try:
            self._database.executescript(SCHEMA)
        except sqlite3.Error:
            self._database.close()
            raise

    def __contains__(self, entry: tuple[str, Key]) -> bool:
        return bool(self._ask("SELECT 1 FROM entries WHERE place = ? AND key = ?", *entry))

    def entries(self) -> list[Entry]:
        """All, the longest unused first."""
        return [Entry(*row) for row in self._ask("SELECT place, key, size FROM entries ORDER BY used")]

    def use(self, place: str, key: Key) -> None:
        self._ask(f"UPDATE entries SET used = {NEXT} WHERE place = ? AND key = ?", place, key)

    @contextmanager
    def change(self) -> Iterator[None]:
        """Nobody else changes anything meanwhile; if the body raises, the index stays as it was."""
        with self._lock:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._database.execute("COMMIT")
            except BaseException:
                if self._database.in_transaction:  # SQLite itself ends it when the disk is full
                    self._database.execute("ROLLBACK")
                raise

    def add(self, entry: Entry) -> None:
        """The one used last."""
        self.remove(entry.place, entry.key)
        self._ask(f"INSERT INTO entries VALUES (?, ?, ?, {NEXT})", *entry)

    def remove(self, place: str, key: Key) -> None:
        self._ask("DELETE FROM entries WHERE place = ? AND key = ?", place, key)

    def remove_all(self, place: str) -> None:
        self._ask("DELETE FROM entries WHERE place = ?", place)

    def excess(self, place: str, own: int, total: int) -> list[Entry]:
        """Removes what was unused for longest, until a place has its `own` bytes at most, and all have `total`."""
        removed = []
        while self._size("WHERE place = ?", place) > own:
            removed.append(self._pop("WHERE place = ?", place))
        while self._size("") > total:
            removed.append(self._pop(""))
        return removed

    def close(self) -> None:
        with self._lock:
            self._database.close()

    def _size(self, where: str, *values: str) -> int:
        return self._ask(f"SELECT coalesce(sum(size), 0) FROM totals {where}", *values)[0][0]

    def _pop(self, where: str, *values: str) -> Entry:
        entry = Entry(*self._ask(f"SELECT place, key, size FROM entries {where} ORDER BY used LIMIT 1", *values)[0])
        self.remove(entry.place, entry.key)
        return entry

    def _ask(self, statement: str, *values: object) -> list[tuple]:
        with self._lock:
            return self._database.execute(statement, values).fetchall()
