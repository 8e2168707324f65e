import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxserve.context import store_at, weights_version
from jaxserve.llm import LLM
from jaxserve.parallel.errors import RequestError
from jaxserve.request import SamplingParams
from jaxserve.tiers.limits import Limits
from jaxserve.tiers.store import StoreConfig
from tests.jaxserve.conftest import loaded

SIZES = 1.0, 2.0, 3.0
GB = 1 << 30
SMALL = {"max_model_len": 128, "max_num_batched_tokens": 32, "max_num_seqs": 1, "page_size": 16, "warmup": False}
GREEDY = SamplingParams(temperature=0, max_tokens=4)


@pytest.mark.parametrize(
    ("places", "folder", "url"),
    [
        ("memory", None, None),
        ("disk", "cache/jaxserve/pages", None),
        ("memory,./here", "here", None),
        ("redis://host:1", None, "redis://host:1"),
        ("rediss://a:b@host,/there", "/there", "rediss://a:b@host"),
    ],
)
def test_places_are_told_apart(places, folder, url, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    wanted = StoreConfig(
        memory=Limits(GB), folder=folder and Path(folder), disk=Limits(2 * GB), url=url, shared=Limits(3 * GB)
    )
    assert store_at(places, *SIZES) == wanted


@pytest.mark.parametrize("places", ["", "dsk", "disk,./here", "redis://a,redis://b", "memory,"])
def test_what_is_no_place_is_refused(places):
    with pytest.raises(RequestError, match="is none of memory, disk|is the second of its kind"):
        store_at(places, *SIZES)


def test_a_version_is_that_of_the_weights_and_of_all_of_them():
    model = loaded("qwen3")[1]
    version = weights_version(model)
    assert weights_version(jax.tree.map(jnp.copy, model)) == version
    leaves, tree = jax.tree.flatten(model)
    for number, leaf in enumerate(leaves):
        last = (*(size - 1 for size in leaf.shape),)
        other = tree.unflatten([*leaves[:number], leaf.at[last].add(leaf[last] * 1e-5 + 1e-6), *leaves[number + 1 :]])
        assert weights_version(other) != version
    assert weights_version(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model)) != version


def test_another_model_in_the_same_folder_finds_nothing(tiny_folder, tmp_path):
    prompt, config = list(range(2, 60)), StoreConfig(folder=tmp_path / "pages")
    found = []
    for dtype in ("float32", "bfloat16", "float32", "bfloat16"):
        with LLM(tiny_folder, dtype=dtype, context_cache=config, **SMALL) as llm:
            found.append(llm.generate([prompt], GREEDY)[0])
    assert [each.num_cached_tokens for each in found] == [0, 0, 48, 48]
    for before, after in zip(found, found[2:], strict=False):
        assert before.outputs[0].token_ids == after.outputs[0].token_ids


def test_the_same_weights_with_another_config_find_nothing(tiny_folder, tmp_path):
    other = shutil.copytree(tiny_folder, tmp_path / "other")
    raw = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(raw | {"rope_theta": 2 * raw["rope_theta"]}))
    prompt, config = list(range(2, 60)), StoreConfig(folder=tmp_path / "pages")
    found = []
    for folder in (tiny_folder, other, tiny_folder):
        with LLM(folder, context_cache=config, **SMALL) as llm:
            found.append(llm.generate([prompt], GREEDY)[0].num_cached_tokens)
    assert found == [0, 0, 48]


def test_a_context_cache_needs_keys_of_pages(tiny_folder):
    with pytest.raises(RequestError, match="context_cache: it needs enable_prefix_caching"):
        LLM(tiny_folder, context_cache=True, enable_prefix_caching=False, **SMALL)
