"""Arrays in files named by what is in them, which processes share by mapping them; manifests say which make a model.

folder/blocks/SHA-256     the bytes of an array
folder/manifests/KEY      a model in one version and form, as JSON; when it was written is when it was last used
folder/checked/KEY        since which boot of the machine the blocks of a manifest are known to be whole
folder/locks/             of those who write
"""

import errno
import hashlib
import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import msgspec
import numpy as np
from filelock import FileLock, Timeout

LIMIT = 2**38
"""Bytes of all blocks; the model that wasn't used for longest goes first."""
SMALL = 2**16
"""Bytes up to which an array is read: a mapping keeps a file open, and of these there is little to share."""
SPARE_FILES = 1024
"""That a process can open besides those that it maps."""
BOOT = Path("/proc/sys/kernel/random/boot_id")
MANIFESTS = "manifests"
"""The folder in it that is made first, by which others know it."""
_SWEEP = "sweep.lock"
_UNFINISHED = "unfinished-"


class Array(msgspec.Struct, frozen=True):
    """Which block has the values of an array."""

    dtype: str
    shape: tuple[int, ...]
    block: str

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * _dtype(self.dtype).itemsize


class Manifest(msgspec.Struct, frozen=True):
    """A model's arrays, by their places in its tree."""

    model: str
    version: str  # a digest of what they were made from
    form: str  # what they were made to
    arrays: dict[str, Array]

    @property
    def key(self) -> str:
        return key_of(self.model, self.version, self.form)

    @property
    def blocks(self) -> dict[str, int]:
        """Their bytes."""
        return {array.block: array.nbytes for array in self.arrays.values()}


class Kept(NamedTuple):
    """A manifest that is there, and when it was last used, in seconds since 1970."""

    manifest: Manifest
    used: float


def key_of(model: str, version: str, form: str) -> str:
    return hashlib.sha256(repr((model, version, form)).encode()).hexdigest()


class Blocks:
    """Blocks and manifests in a folder, which nobody but the user may write to.

    Any number of processes and threads may use it at once. Every file comes to its place when it is written out, blocks
    before the manifest that names them: whoever is killed leaves behind what the next removes. To remove what others
    have mapped takes nothing from them.
    """

    def __init__(self, folder: Path, limit: int = LIMIT):
        """Makes the folder if there is none; raises OSError if it can't."""
        self.folder, self.limit = folder, limit
        for name in (MANIFESTS, "blocks", "checked", "locks"):
            (folder / name).mkdir(mode=0o700, parents=True, exist_ok=True)

    # What is there.

    def kept(self) -> list[Kept]:
        """All manifests, the last used first."""
        found = []
        for path in (self.folder / MANIFESTS).glob("[0-9a-f]*"):  # _UNFINISHED aren't
            with suppress(OSError):  # others remove some
                used = path.stat().st_mtime
                if manifest := self.find(path.name):
                    found.append(Kept(manifest, used))
        return sorted(found, key=lambda each: each.used, reverse=True)

    def find(self, key: str) -> Manifest | None:
        """The manifest with a key; one that is damaged is removed."""
        path = self.folder / MANIFESTS / key
        try:
            manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
            if manifest.key == key and all(array.nbytes for array in manifest.arrays.values()):
                return manifest
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):  # msgspec's errors; a dtype that is none
            pass
        self.remove(key)
        return None

    def size(self) -> int:
        """Bytes of all blocks that manifests name; those that several name count once."""
        return sum({name: size for each in self.kept() for name, size in each.manifest.blocks.items()}.values())

    def load(self, key: str) -> dict[str, np.ndarray] | None:
        """The arrays of a manifest by their names, mapped; None if it is not there, or damaged.

        Sizes are compared every time. Checksums are when it is loaded first since the machine was started: then bytes
        have to be read from the disk anyway.
        """
        manifest = self.find(key)
        if manifest is None or self.damaged(manifest, thorough=not self._known(key)):
            return None
        try:
            _allow_files(sum(size > SMALL for size in manifest.blocks.values()))
            arrays = {name: _read(self._block(array.block), array) for name, array in manifest.arrays.items()}
        except FileNotFoundError:  # another process has removed it
            return None
        with suppress(FileNotFoundError):
            _touch(self.folder / MANIFESTS / key)
        return arrays

    def damaged(self, manifest: Manifest, thorough: bool = True) -> list[str]:
        """Which blocks of a manifest are not there or not whole; these are removed. `thorough` reads them all."""
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            whole = threads.map(self._is_whole, manifest.blocks, manifest.blocks.values(), repeat(thorough))
            wrong = [name for name, is_whole in zip(manifest.blocks, whole, strict=True) if not is_whole]
        for name in wrong:
            self._block(name).unlink(missing_ok=True)
        if thorough and not wrong:
            self._note_checked(manifest.key)
        return wrong

    def _is_whole(self, name: str, size: int, thorough: bool) -> bool:
        with suppress(OSError), self._block(name).open("rb") as file:
            same = os.fstat(file.fileno()).st_size == size
            return same and (not thorough or hashlib.file_digest(file, "sha256").hexdigest() == name)
        return False

    def _known(self, key: str) -> bool:
        """Whether the blocks of a manifest were whole since the machine was started."""
        with suppress(OSError):
            return (self.folder / "checked" / key).read_bytes() == BOOT.read_bytes()
        return False

    def _note_checked(self, key: str) -> None:
        with suppress(OSError):  # where the boot isn't told, every load is thorough
            _write(self.folder / "checked" / key, BOOT.read_bytes())

    # Writing.

    @contextmanager
    def filling(self, key: str) -> Iterator[None]:
        """For whoever writes a manifest and its blocks: others that want the same wait, and nobody sweeps."""
        try:
            with self._lock(f"{key}.lock"):
                with self._lock(_SWEEP):  # whoever sweeps now has not seen this one yet
                    pass
                yield
        finally:
            self.sweep()

    def keep(self, model: str, version: str, form: str, arrays: Iterable[tuple[str, np.ndarray]]) -> Manifest:
        """Writes arrays by their names, and then the manifest; the caller is `filling` it."""
        found = {name: Array(values.dtype.name, values.shape, self._put(values)) for name, values in arrays}
        _sync(self.folder / "blocks")
        manifest = Manifest(model, version, form, found)
        self._note_checked(manifest.key)
        _write(path := self.folder / MANIFESTS / manifest.key, msgspec.json.encode(manifest))
        _touch(path)
        return manifest

    def _put(self, values: np.ndarray) -> str:
        """The name of a block with these values, which is written unless it is there."""
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        name = hashlib.sha256(data).hexdigest()
        if not _holds(self._block(name), data):
            _write(self._block(name), data)
        return name

    # Removing.

    def make_room(self, size: int) -> list[Manifest]:
        """Removes the models that weren't used for longest, until so many bytes more are within the limit.

        Raises OSError if they never are, or the disk has not so many.
        """
        if size > self.limit:
            raise OSError(errno.EFBIG, f"{size} bytes are more than the cache may have, {self.limit}")
        kept, gone = self.kept(), []
        held = lambda: sum({n: s for each in kept for n, s in each.manifest.blocks.items()}.values())  # noqa: E731
        while kept and held() + size > self.limit:
            gone.append(kept.pop().manifest)
            self.remove(gone[-1].key)
        self.sweep()
        if size > shutil.disk_usage(self.folder).free:
            raise OSError(errno.ENOSPC, f"the disk has no room for {size} bytes")
        return gone

    def remove(self, key: str) -> None:
        """Removes a manifest; its blocks go with the next sweep."""
        for kind in (MANIFESTS, "checked"):
            (self.folder / kind / key).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Removes what no manifest names, unless somebody is filling: then whoever ends last does it."""
        with self._lock(_SWEEP):
            if any(self._is_held(path.name) for path in (self.folder / "locks").iterdir() if path.name != _SWEEP):
                return
            manifests = [each.manifest for each in self.kept()]
            wanted = {name for manifest in manifests for name in manifest.blocks} | {each.key for each in manifests}
            for kind in ("blocks", MANIFESTS, "checked"):
                for path in (self.folder / kind).iterdir():
                    if path.name not in wanted:
                        path.unlink(missing_ok=True)

    def _is_held(self, name: str) -> bool:
        try:
            with FileLock(self.folder / "locks" / name, timeout=0):
                return False
        except Timeout:
            return True

    def _lock(self, name: str) -> FileLock:
        return FileLock(self.folder / "locks" / name, mode=0o600)

    def _block(self, name: str) -> Path:
        return self.folder / "blocks" / name


def mapped_by(folder: Path, manifests: Sequence[Manifest]) -> list[int]:
    """How many processes of the user have mapped all that is mapped of each manifest; 0 where Linux doesn't tell."""
    counts, at = [0] * len(manifests), f"{folder.resolve() / 'blocks'}/"
    large = [{name for name, size in manifest.blocks.items() if size > SMALL} for manifest in manifests]
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):  # of others, or gone
            found = {line.rpartition(at)[2] for line in maps.read_text().splitlines() if at in line}
            for number, names in enumerate(large):
                counts[number] += bool(names) and names <= found
    return counts


def _dtype(name: str) -> np.dtype:
    """By its name; also one that NumPy hasn't by itself."""
    return np.dtype(getattr(ml_dtypes, name, name))


def _read(path: Path, array: Array) -> np.ndarray:
    """The values of an array, as a view of its file, which begins at a page; small ones are copied."""
    with path.open("rb") as file:
        if array.nbytes <= SMALL:
            data: Any = file.read()
        else:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            data.madvise(mmap.MADV_WILLNEED)
    return np.frombuffer(data, _dtype(array.dtype)).reshape(array.shape)


def _allow_files(count: int) -> None:
    """Lets this process have so many more files open, as far as it may."""
    import resource  # where there is none, there are no folders that are known to be the user's

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < (wanted := count + SPARE_FILES):
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


def _holds(path: Path, data: np.ndarray) -> bool:
    """Whether a file has this content; it may be damaged, and nobody has seen it yet."""
    with suppress(OSError):
        return path.stat().st_size == data.size and np.array_equal(np.memmap(path, np.uint8, "r"), data)
    return False


def _write(path: Path, data: Any) -> None:
    """A file that is there whole or not at all, also after a loss of power; nobody writes to it again."""
    number, unfinished = tempfile.mkstemp(dir=path.parent, prefix=_UNFINISHED)
    try:
        with os.fdopen(number, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), 0o400)
        os.replace(unfinished, path)
    except BaseException:
        Path(unfinished).unlink(missing_ok=True)
        raise
    if path.parent.name == MANIFESTS:
        _sync(path.parent)


def _touch(path: Path) -> None:
    """Notes that it is used now, more exactly than by the clock of the file system, which ticks."""
    now = time.time_ns()
    os.utime(path, ns=(now, now))


def _sync(folder: Path) -> None:
    """Has the disk know the names of a folder's files."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
