"""`jaxserve models`, as people use it."""

from pathlib import Path

import httpx2
import pytest

from tests.jaxserve.server.test_process import SMALL
from tests.jaxserve.test_cli import run
from tests.processes import process
from tests.waiting import SOON


@pytest.fixture
def home(tmp_path) -> dict[str, str]:
    return {"XDG_CACHE_HOME": str(tmp_path)}


def models(*arguments: str, **environment: str):
    return run("models", *arguments, **environment)


def test_what_is_prefetched_is_listed_checked_and_evicted(tiny_folder, home, tmp_path):
    name = str(tiny_folder.resolve())
    kept = models("prefetch", name, "--quantization", "int8", **home)
    assert kept.returncode == 0 and kept.stdout.startswith(f"{name} (float32, int8), version "), kept.stderr
    listed = models("list", **home).stdout
    assert "of 1 models" in listed and "float32, int8" in listed and "stale" not in listed
    whole = models("check", name, **home)
    assert (whole.returncode, whole.stdout) == (0, f"{name} (float32, int8): whole\n")
    assert models("check", "embedded", **home).returncode == 1
    block = next(Path(tmp_path, "jaxserve", "models", "blocks").iterdir())
    block.unlink()
    damaged = models("check", **home)
    assert damaged.returncode == 1 and "1 of " in damaged.stdout and "gone or damaged" in damaged.stdout
    removed = models("evict", name, **home)
    assert removed.stdout.startswith(f"removed {name} (float32, int8)")
    assert list(block.parent.iterdir()) == []
    empty = models("list", **home)
    assert (empty.returncode, empty.stdout) == (0, "") and "no model is kept in" in empty.stderr
    assert "nothing to evict" in models("evict", **home).stderr
    assert models("evict", name, **home).returncode == 2


def test_a_running_server_switches_to_what_is_kept_and_to_nothing_else(tiny_folder, home):
    name = str(tiny_folder.resolve())
    assert models("prefetch", name, **home).returncode == 0
    with process("serve", "--port", "0", *SMALL, **home) as server:
        url = server.url()
        switched = models("load", name, "--url", url)
        assert switched.returncode == 0 and f"{name} is served at {url}" in switched.stdout, switched.stderr
        refused = models("load", "/etc", "--url", url)
        assert refused.returncode == 2 and "neither in the model cache" in refused.stderr
        with httpx2.Client(base_url=url, timeout=SOON) as http:
            assert [model["id"] for model in http.get("/v1/models").json()["data"]] == [name]
