import errno
import os
import random
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxserve.parallel.errors import RequestError
from jaxserve.tiers import disk as subject
from jaxserve.tiers.disk import DiskTier
from jaxserve.tiers.limits import Limits
from jaxserve.tiers.tier import Value
from tests.jaxserve.tiers.conftest import value_of
from tests.waiting import SOON

ROOM = Limits(1 << 30)
KEYS = [bytes([n]) * 32 for n in range(8)]


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "cache" / "pages"


OPEN: list[DiskTier] = []


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    """Whatever a test has opened."""
    yield
    while OPEN:
        OPEN.pop().close()


def opened(folder: Path, limits: Limits = ROOM, *held: bytes) -> DiskTier:
    tier = DiskTier(folder, limits)
    OPEN.append(tier)
    for key in held:
        tier.put("a", key, value_of("a", key))
    return tier


def found(tier: DiskTier, namespace: str = "a") -> list[bytes]:
    """Keys whose values come back as they were put; any other value is an error."""
    values = {key: tier.get(namespace, key) for key in KEYS}
    assert all(value in (None, value_of(namespace, key)) for key, value in values.items())
    return [key for key, value in values.items() if value is not None]


def files(folder: Path) -> list[Path]:
    """Those of values, the smallest key first."""
    return sorted(path for path in folder.glob("*/*") if path.parent.name != subject.UNFINISHED)


def test_what_one_process_has_put_the_next_one_finds(folder):
    opened(folder, ROOM, *KEYS[:3]).close()
    assert found(opened(folder)) == KEYS[:3]


def test_of_tenants_that_have_nothing_any_more_nothing_is_left(folder):
    tier = opened(folder, Limits(1000))
    for number in range(50):
        tier.put(f"tenant {number}", KEYS[0], value_of("a", KEYS[0], 300))
    held = [path for path in folder.iterdir() if path.is_dir() and path.name != "unfinished"]
    assert 1 <= len(held) <= 3 and all(any(path.iterdir()) for path in held)
    assert all(tier.drop(f"tenant {number}") for number in range(50))
    assert [path.name for path in folder.iterdir() if path.is_dir()] == ["unfinished"]
    assert tier.tally.read().failed == 0


def test_all_is_the_user_s_alone(folder):
    opened(folder, ROOM, KEYS[0])
    paths = [folder, *folder.rglob("*")]
    assert {path.stat().st_mode & 0o077 for path in paths} == {0} and len(paths) > 4


@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_a_folder_that_others_can_write_to_is_refused(folder, mode):
    opened(folder).close()
    folder.chmod(mode)
    with pytest.raises(RequestError, match=f"in {folder}: others can write to it; .*chmod 700 {folder}"):
        opened(folder)


def test_a_folder_that_can_not_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match="can't be kept in .*Not a directory"):
        opened(tmp_path / "file" / "pages")


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "longer", "another"])
def test_a_damaged_file_is_noticed_counted_and_removed(folder, damage):
    tier = opened(folder, ROOM, *KEYS[:2])
    file, other = files(folder)
    whole = file.read_bytes()
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    file.write_bytes(
        {"cut": whole[:-1], "flip": flipped, "empty": b"", "longer": whole + b"x", "another": other.read_bytes()}[
            damage
        ]
    )
    assert found(tier) == [KEYS[1]] and files(folder) == [other]
    assert (tier.tally.read().damaged, tier.tally.read().failed) == (1, 0)
    tier.put("a", KEYS[0], value_of("a", KEYS[0]))
    assert found(tier) == KEYS[:2]


def test_a_file_that_somebody_has_removed_is_not_found_and_can_be_put_again(folder):
    tier = opened(folder, ROOM, *KEYS[:2])
    files(folder)[0].unlink()
    assert found(tier) == [KEYS[1]]
    files(folder)[0].unlink()
    tier.put("a", KEYS[1], value_of("a", KEYS[1]))
    assert found(tier) == [KEYS[1]] and tier.tally.read().failed == 0


@pytest.mark.parametrize("damage", [b"no database", b""])
def test_an_index_that_is_damaged_is_made_from_the_files(folder, damage):
    opened(folder, ROOM, *KEYS[:3]).close()
    for path in folder.glob(f"{subject.INDEX}*"):
        path.write_bytes(damage)
    tier = opened(folder, ROOM, KEYS[3])
    assert found(tier) == KEYS[:4]
    assert tier.drop("a") and files(folder) == []


def test_files_without_an_entry_are_entered_and_entries_without_a_file_go(folder):
    opened(folder, ROOM, *KEYS[:3]).close()
    database = sqlite3.connect(folder / subject.INDEX, isolation_level=None)
    database.execute("DELETE FROM entries WHERE key = ?", (KEYS[0],))
    database.close()
    files(folder)[2].unlink()
    tier = opened(folder)
    assert found(tier) == KEYS[:2]
    assert [entry.key for entry in tier._index.entries()] == KEYS[:2]


def test_what_was_not_finished_is_removed_when_nobody_can_be_writing_it(folder):
    opened(folder).close()
    old, new = folder / subject.UNFINISHED / "old", folder / subject.UNFINISHED / "new"
    old.touch()
    new.touch()
    os.utime(old, (0, 0))
    opened(folder)
    assert (old.exists(), new.exists()) == (False, True)


def test_a_lower_capacity_holds_from_the_next_put_on(folder):
    opened(folder, ROOM, *KEYS).close()
    tier = opened(folder, Limits(500))
    tier.put("b", KEYS[0], value_of("b", KEYS[0]))
    assert found(tier) == KEYS[6:] and found(tier, "b") == KEYS[:1]


@pytest.mark.parametrize("place", ["mkstemp", "writelines", "replace"])
def test_a_full_disk_costs_a_put_and_nothing_else(folder, place, monkeypatch):
    tier = opened(folder, ROOM, KEYS[0])
    full = OSError(errno.ENOSPC, "No space left on device")

    class Full:
        def __init__(self, number, mode):
            os.close(number)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def writelines(self, parts):
            raise full

    def fail(*_, **__):
        raise full

    with monkeypatch.context() as patch:
        if place == "mkstemp":
            patch.setattr(subject.tempfile, "mkstemp", fail)
        elif place == "replace":
            patch.setattr(Path, "replace", fail)
        else:
            patch.setattr(subject.os, "fdopen", Full)
        tier.put("a", KEYS[1], value_of("a", KEYS[1]))
    assert tier.tally.read().failed == 1
    assert found(tier) == [KEYS[0]] and len(files(folder)) == 1 and not list((folder / subject.UNFINISHED).iterdir())
    tier.put("a", KEYS[1], value_of("a", KEYS[1]))
    assert found(tier) == KEYS[:2]


CHILD = """
import sys
from pathlib import Path
from jaxserve.tiers.disk import DiskTier
from jaxserve.tiers.limits import Limits
from tests.jaxserve.tiers.conftest import value_of
folder, limit, what = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
tier = DiskTier(folder, Limits(limit))
"""

SMALL_FILES = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
for size in (100, 2 << 20):
    tier.put("a", bytes([size % 251]), value_of("a", b"", size))
print(tier.get("a", bytes([100])) == value_of("a", b"", 100), tier.get("a", bytes([(2 << 20) % 251])))
print(tier.tally.read().failed, tier.tally.read().damaged)
"""

WRITE = """
import random
draw = random.Random(what)
while True:
    key = bytes([draw.randrange(100)]) * 32
    tier.put("a", key, value_of("a", key, 1 << 18))
    print("kept", flush=True)
"""

SHARE = """
import random
draw = random.Random(what)
for _ in range(300):
    namespace, key = draw.choice("ab"), bytes([draw.randrange(12)]) * 32
    if draw.random() < 0.5:
        tier.put(namespace, key, value_of(namespace, key, 1000 * key[0]))
    else:
        assert tier.get(namespace, key) in (None, value_of(namespace, key, 1000 * key[0]))
    if draw.random() < 0.02:
        assert tier.drop(namespace)
counters = tier.tally.read()
print(counters.hits > 0, counters.damaged, counters.failed)
"""


def child(folder: Path, program: str, limit: int = 1 << 30, what: int = 0) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD + program, str(folder), str(limit), str(what)], stdout=subprocess.PIPE, text=True
    )


def test_a_file_that_may_not_be_as_large_costs_a_put_and_nothing_else(folder):
    said, _ = child(folder, SMALL_FILES).communicate(timeout=SOON)
    assert said.split() == ["True", "None", "1", "0"]
    assert len(files(folder)) == 1 and not list((folder / subject.UNFINISHED).iterdir())


def test_a_process_that_is_killed_while_it_writes_leaves_only_whole_values(folder, monkeypatch):
    limit = 20 << 18
    draw = random.Random(0)
    for what in range(4):
        process = child(folder, WRITE, limit, what)
        assert process.stdout and process.stdout.readline() == "kept\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(draw.uniform(0.05, 0.3))
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=SOON)
        monkeypatch.setattr(subject, "ABANDONED", -60.0)
        tier = opened(folder, Limits(limit))
        keys = [bytes([n]) * 32 for n in range(100)]
        values: dict[bytes, Value | None] = {key: tier.get("a", key) for key in keys}
        assert all(value in (None, value_of("a", key, 1 << 18)) for key, value in values.items())
        held = [entry for entry in tier._index.entries()]
        assert len(files(folder)) == len(held) == sum(value is not None for value in values.values()) > 0
        assert not list((folder / subject.UNFINISHED).iterdir())
        assert (tier.tally.read().damaged, tier.tally.read().failed) == (0, 0)
        tier.put("a", keys[0], value_of("a", keys[0], 1 << 18))
        assert sum(path.stat().st_size for path in files(folder)) <= limit
        tier.close()


def test_processes_share_a_folder_and_its_capacity(folder):
    limit = 40_000
    children = [child(folder, SHARE, limit, what) for what in range(3)]
    assert [process.communicate(timeout=SOON)[0] for process in children] == ["True 0 0\n"] * 3
    tier = opened(folder, Limits(limit))
    sizes = {path.stat().st_size for path in files(folder)}
    assert sum(path.stat().st_size for path in files(folder)) <= limit
    assert sizes == {entry.size for entry in tier._index.entries()}
