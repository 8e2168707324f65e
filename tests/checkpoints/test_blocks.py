import subprocess
import sys
import tempfile
import threading
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.checkpoints.blocks import SMALL, Blocks, Manifest, mapped_by

LARGE = SMALL // 4 + 100


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    """Large and small ones, of every dtype, and two that are equal."""
    rng = np.random.default_rng(seed)
    return {
        "embed": rng.standard_normal((LARGE, 1), np.float32),
        "codes": rng.integers(-127, 128, (5, LARGE), np.int8),
        "half": rng.standard_normal((2, LARGE)).astype(ml_dtypes.bfloat16),
        "norm": np.ones(8, np.float32),
        "other_norm": np.ones(8, np.float32),
    }


def fill(blocks: Blocks, model: str = "m", version: str = "1", seed: int = 0) -> Manifest:
    manifest = Manifest(model, version, "float32", {})
    with blocks.filling(manifest.key):
        return blocks.keep(model, version, "float32", arrays(seed).items())


def same(found, seed: int = 0) -> bool:
    expected = arrays(seed)
    return list(found) == list(expected) and all(
        found[name].dtype == values.dtype and np.array_equal(found[name], values) for name, values in expected.items()
    )


def files(folder: Path) -> dict[str, bytes]:
    """What was kept, without when it was checked, and by whom it is locked."""
    kept = [path for kind in ("blocks", "manifests") for path in (folder / kind).iterdir()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept}


def test_arrays_come_back_bit_by_bit_mapped_where_they_are_large(tmp_path):
    manifest = fill(Blocks(tmp_path))
    found = Blocks(tmp_path).load(manifest.key)
    assert found and same(found)
    assert not any(values.flags.writeable for values in found.values())
    assert all(found[name].ctypes.data % 64 == 0 for name in ("embed", "codes", "half"))
    maps = Path("/proc/self/maps")
    if maps.exists():
        mapped = {name for name, array in manifest.arrays.items() if array.block in maps.read_text()}
        assert mapped == {"embed", "codes", "half"}
        assert mapped_by(tmp_path, [manifest]) == [1]
        del found
        assert mapped_by(tmp_path, [manifest]) == [0]


def test_what_two_models_have_in_common_is_kept_once_and_stays_while_one_has_it(tmp_path):
    blocks = Blocks(tmp_path)
    one, other = fill(blocks), fill(blocks, version="2")
    assert one.blocks == other.blocks and len(list((tmp_path / "blocks").iterdir())) == len(one.blocks) == 4
    assert blocks.size() == sum(one.blocks.values())
    blocks.remove(one.key)
    blocks.sweep()
    found = blocks.load(other.key)
    assert found and same(found)
    blocks.remove(other.key)
    blocks.sweep()
    assert files(tmp_path) == {}


def test_who_has_mapped_what_is_removed_keeps_it(tmp_path):
    blocks = Blocks(tmp_path)
    manifest = fill(blocks)
    found = blocks.load(manifest.key)
    blocks.remove(manifest.key)
    blocks.sweep()
    assert found and same(found) and blocks.load(manifest.key) is None


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "empty"])
def test_a_damaged_block_is_found_on_the_first_load_after_a_boot_and_made_anew(tmp_path, damage):
    blocks = Blocks(tmp_path)
    manifest = fill(blocks)
    path = tmp_path / "blocks" / manifest.arrays["codes"].block
    whole = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes({"cut": whole[:-1], "empty": b"", "flipped": bytes([whole[0] ^ 1]) + whole[1:]}[damage])
    (tmp_path / "checked" / manifest.key).unlink()  # as if the machine had been started since
    assert blocks.load(manifest.key) is None and not path.exists()
    assert fill(blocks) == manifest and path.read_bytes() == whole
    found = blocks.load(manifest.key)
    assert found and same(found)


def test_sizes_are_compared_every_time_and_checksums_when_it_is_asked(tmp_path):
    blocks = Blocks(tmp_path)
    manifest = fill(blocks)
    path = tmp_path / "blocks" / (name := manifest.arrays["codes"].block)
    path.chmod(0o600)
    path.write_bytes(bytes(path.stat().st_size))
    if Path("/proc/sys/kernel/random/boot_id").exists():
        assert blocks.load(manifest.key) is not None
    assert blocks.damaged(manifest) == [name]
    path.write_bytes(b"short")
    assert blocks.load(manifest.key) is None


def test_what_was_damaged_unseen_is_not_taken_for_another_model_s_block(tmp_path):
    blocks = Blocks(tmp_path)
    path = tmp_path / "blocks" / fill(blocks).arrays["codes"].block
    path.chmod(0o600)
    path.write_bytes(bytes(path.stat().st_size))
    found = blocks.load(fill(blocks, version="2").key)
    assert found and same(found)


@pytest.mark.parametrize("content", [b"", b"{", b'{"model": 1}', None])
def test_a_damaged_manifest_is_as_if_it_were_not_there(tmp_path, content):
    blocks = Blocks(tmp_path)
    manifest, other = fill(blocks), fill(blocks, version="2")
    path = tmp_path / "manifests" / manifest.key
    path.chmod(0o600)
    path.write_bytes((tmp_path / "manifests" / other.key).read_bytes() if content is None else content)
    assert blocks.load(manifest.key) is None and not path.exists()
    assert [each.manifest for each in blocks.kept()] == [other]


KILLED = """
import os, sys
from pathlib import Path
from jaxserve.checkpoints.blocks import Blocks
from tests.checkpoints.test_blocks import fill
replace = os.replace
def run(folder, after):
    left = [after]
    def count(*paths):
        left[0] -= 1
        if left[0] < 0:
            os._exit(9)
        replace(*paths)
    os.replace = count
    fill(Blocks(Path(folder)))
    os._exit(0)
for after in map(int, sys.argv[2:]):
    child = os.fork()
    if not child:
        run(f"{sys.argv[1]}/{after}", after)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_whoever_is_killed_at_any_write_leaves_nothing_damaged(tmp_path):
    """Every file comes to its place by `os.replace`, so that is where a kill can make a difference."""
    manifest = fill(Blocks(tmp_path / "whole"))
    given = [sys.executable, "-c", KILLED, str(tmp_path), *map(str, range(8))]
    ended = subprocess.run(given, capture_output=True, text=True, check=True)
    statuses = [int(line) for line in ended.stdout.split()]
    assert statuses == [9] * 6 + [0] * 2  # four blocks, when they were checked, the manifest
    for after, status in enumerate(statuses):
        blocks = Blocks(tmp_path / str(after))
        found = blocks.load(manifest.key)
        assert (found is None) == (status != 0)
        fill(blocks)
        assert files(blocks.folder) == files(tmp_path / "whole")


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    blocks = Blocks(tmp_path)
    for kind in ("blocks", "manifests", "checked"):
        (tmp_path / kind / "unfinished-abc").write_bytes(b"half")
    (tmp_path / "blocks" / ("0" * 64)).write_bytes(b"of a manifest that was never written")
    assert [each.manifest for each in blocks.kept()] == []
    fill(blocks)
    fill(Blocks(tmp_path / "other"))
    assert files(tmp_path / "other").keys() == {name for name in files(tmp_path) if not name.startswith("other")}


def test_nothing_is_swept_while_somebody_fills(tmp_path):
    blocks, begun, go = Blocks(tmp_path), threading.Event(), threading.Event()

    def slowly():
        for name, values in arrays(1).items():
            yield name, values
            begun.set()
            assert go.wait(60)

    def write() -> None:
        with blocks.filling(Manifest("slow", "1", "float32", {}).key):
            blocks.keep("slow", "1", "float32", slowly())

    thread = threading.Thread(target=write)
    thread.start()
    assert begun.wait(60)
    fast = fill(Blocks(tmp_path), "fast")
    blocks.remove(fast.key)
    blocks.sweep()
    go.set()
    thread.join()
    ((slow, _),) = blocks.kept()
    found = blocks.load(slow.key)
    assert found and same(found, 1)
    assert len(list((tmp_path / "blocks").iterdir())) == len(slow.blocks)  # what was removed meanwhile is gone now


FILLER = """
import sys
from pathlib import Path
from jaxserve.checkpoints.blocks import Blocks
from tests.checkpoints.test_blocks import fill
print("ready", flush=True)
sys.stdin.readline()
for _ in range(5):
    fill(Blocks(Path(sys.argv[1])))
    fill(Blocks(Path(sys.argv[1])), sys.argv[2], seed=int(sys.argv[2]))
"""


def test_two_processes_that_fill_at_the_same_time_do_not_harm_each_other(tmp_path):
    fillers = [
        subprocess.Popen(
            [sys.executable, "-c", FILLER, str(tmp_path), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("1", "2")
    ]
    for filler in fillers:
        assert filler.stdout and filler.stdout.readline() == "ready\n"
    for filler in fillers:
        filler.communicate("go\n", timeout=60)
    assert [filler.returncode for filler in fillers] == [0, 0]
    blocks = Blocks(tmp_path)
    kept = {each.manifest.model: each.manifest for each in blocks.kept()}
    assert kept.keys() == {"m", "1", "2"}
    assert not any(blocks.damaged(manifest) for manifest in kept.values())
    for model, manifest in kept.items():
        found = blocks.load(manifest.key)
        assert found and same(found, 0 if model == "m" else int(model))
    assert {path.name for path in (tmp_path / "blocks").iterdir()} == {b for m in kept.values() for b in m.blocks}


def test_there_is_no_room_for_what_is_larger_than_the_limit_or_the_disk(tmp_path, monkeypatch):
    with pytest.raises(OSError, match="more than the cache may have, 10"):
        Blocks(tmp_path, 10).make_room(11)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=10))
    with pytest.raises(OSError, match="no room for 11 bytes"):
        Blocks(tmp_path).make_room(11)


SIZE = sum(values.nbytes for name, values in arrays().items() if name != "other_norm")
NORM = arrays()["norm"].nbytes
MODELS = st.integers(0, 5)
ACTIONS = st.one_of(
    st.tuples(st.just("fill"), MODELS), st.tuples(st.just("load"), MODELS), st.tuples(st.just("evict"), MODELS)
)


@settings(deadline=None, max_examples=40)
@given(st.lists(ACTIONS, max_size=20), st.integers(1, 3))
def test_what_was_not_used_for_longest_goes_first_as_in_a_reference_model(actions, capacity):
    limit = capacity * (SIZE - NORM) + NORM  # of the models' arrays one is the same in all
    order: OrderedDict[int, None] = OrderedDict()
    with tempfile.TemporaryDirectory() as folder:
        blocks, keys = Blocks(Path(folder), limit), {}
        for action, number in actions:
            if action == "fill":
                blocks.make_room(SIZE - NORM if order else SIZE)
                while len(order) + 1 > capacity:
                    order.popitem(last=False)
                keys[number] = fill(blocks, str(number), seed=number).key
                order[number] = None
                order.move_to_end(number)
            elif action == "load":
                found = blocks.load(keys.get(number, "0" * 64))
                assert (found is not None) == (number in order)
                if found:
                    assert same(found, number)
                    order.move_to_end(number)
            elif number in order:
                blocks.remove(keys[number])
                blocks.sweep()
                del order[number]
            assert [each.manifest.model for each in blocks.kept()] == [str(number) for number in reversed(order)]
            assert blocks.size() == (len(order) * (SIZE - NORM) + NORM if order else 0) <= limit
