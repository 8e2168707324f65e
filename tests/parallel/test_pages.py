import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxserve.parallel.devices import Devices
from jaxserve.parallel.errors import ShardingError
from jaxserve.parallel.pages import PageCopier
from tests.parallel.caches import KINDS, PAGES, host_cache, mesh_of, on_devices


@pytest.mark.parametrize("ranks", [None, 1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_pages_go_out_of_a_cache_and_into_another_and_no_other_page_changes(kind, ranks):
    devices = Devices(ranks and mesh_of(ranks))
    copier, rank = PageCopier(devices, 4), devices.count - 1
    source, target = host_cache(kind, devices.count, seed=1), host_cache(kind, devices.count, seed=2)
    taken = copier.gather(on_devices(source, devices), {rank: [5, 0, 2]})[rank]
    given = {rank: jax.tree.map(lambda pages: np.asarray(pages)[:3], taken)}
    found = copier.scatter(on_devices(target, devices), {rank: [1, 3, 4]}, given)
    for before, after, theirs in zip(*map(jax.tree.leaves, (target, found, source)), strict=True):
        wanted = before.copy()
        wanted[rank * PAGES + np.array([1, 3, 4])] = theirs[rank * PAGES + np.array([5, 0, 2])]
        np.testing.assert_array_equal(np.asarray(after), wanted)


def test_what_has_no_number_is_zeros_and_is_written_nowhere():
    devices = Devices(mesh_of(2))
    copier, cache = PageCopier(devices, 3), host_cache("float32", 2, seed=0)
    taken = copier.gather(on_devices(cache, devices), {0: [1], 1: []})
    assert not any(np.asarray(pages)[1:].any() for pages in jax.tree.leaves(taken[0]))
    assert not any(np.asarray(pages).any() for pages in jax.tree.leaves(taken[1]))
    jax.tree.map(np.testing.assert_array_equal, copier.scatter(on_devices(cache, devices), {}, {}), cache)


def test_pages_of_a_rank_are_on_its_device_and_the_cache_is_given_away():
    devices = Devices(mesh_of(4))
    copier, cache = PageCopier(devices, 2), on_devices(host_cache("float32", 4, seed=0), devices)
    taken = copier.gather(cache, {2: [0, 1]})
    assert isinstance(devices.mesh, Mesh)
    assert {each.device for each in jax.tree.leaves(taken)} == {devices.mesh.devices.flat[2]}
    copier.scatter(cache, {}, {})
    assert all(each.is_deleted() for each in jax.tree.leaves(cache))


def test_any_number_of_pages_is_one_program():
    copier, cache = PageCopier(Devices(mesh_of(2)), 4), on_devices(host_cache("int8", 2, seed=0), Devices(mesh_of(2)))
    for ids in ({}, {0: [1]}, {0: [1, 2, 3, 4], 1: [0]}):
        copier.gather(cache, ids)
        cache = copier.scatter(cache, {}, {})
    assert copier._gather._cache_size() == copier._scatter._cache_size() == 1


def test_too_many_pages_and_ranks_of_others_are_refused():
    copier = PageCopier(Devices(), 2)
    with pytest.raises(ShardingError, match="3 pages of rank 0 at once; this copies 2"):
        copier.gather(jnp.zeros((4, 1)), {0: [1, 2, 3]})
    with pytest.raises(ShardingError, match="rank 1 is not of this process"):
        copier.gather(jnp.zeros((4, 1)), {1: [1]})
