import pytest

from jaxserve.parallel.errors import RequestError
from jaxserve.tiers.limits import Limits
from jaxserve.tiers.store import StoreConfig


def test_a_namespace_has_its_own_capacity_the_default_or_all():
    limits = Limits(100, 50, {"large": 80, "none": 0, "beyond": 200})
    assert [limits.of(name) for name in ("large", "none", "beyond", "unnamed")] == [80, 0, 100, 50]
    assert Limits(100).of("unnamed") == 100


@pytest.mark.parametrize(
    ("make", "culprit"),
    [
        (lambda: Limits(-1), "total = -1"),
        (lambda: Limits(True), "total = True"),
        (lambda: Limits(1, 0.5), "namespace = 0.5"),
        (lambda: Limits(1, None, {"a": -3}), r"named\['a'\] = -3"),
        (lambda: StoreConfig(queue_bytes=-2), "queue_bytes = -2"),
    ],
)
def test_what_is_no_number_of_bytes_is_refused_by_name(make, culprit):
    with pytest.raises(RequestError, match=f"{culprit}: it must be a whole number of bytes, 0 or more"):
        make()
