"""Room for pages that others may take, which is reserved, used, and given back whatever happens."""

from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest

from jaxserve.exports import Exports
from jaxserve.parallel.errors import TransferError
from jaxserve.peers import Peers

PAGES = np.zeros(40, np.uint8)


@pytest.fixture
def exports() -> Iterator[Exports]:
    with closing(Exports(Peers(b"of the test", "it", limit=100))) as found:
        yield found


def test_there_is_room_for_what_is_reserved_and_what_is_on_offer_together(exports):
    for name in "abc":
        exports.expect(name)
    assert [exports.reserve(name, 40) for name in "abc"] == [True, True, False]
    where = exports.offer("a", PAGES, 5)
    assert (where.host, where.port, where.tokens) == (*exports.sender.address, 5)
    assert exports.count == 3 and not exports.reserve("c", 40)
    exports.sender.withdraw(where.name)
    assert exports.reserve("c", 40) and exports.count == 2


def test_what_never_fits_is_refused(exports):
    exports.expect("a")
    with pytest.raises(TransferError, match="pages have 101 bytes; 100 may be on offer") as caught:
        exports.reserve("a", 101)
    assert caught.value.kind == "refused"


@pytest.mark.parametrize("when", ["before there is room", "before it is on offer", "later"])
def test_who_is_forgotten_gives_its_room_back_and_offers_nothing(exports, when):
    exports.expect("a")
    if when != "before there is room":
        assert exports.reserve("a", 100)
    if when == "later":
        exports.offer("a", PAGES, 5)
    exports.forget("a")
    assert exports.reserve("a", 100)  # nobody wants it, so nothing is in its way
    assert when == "later" or exports.offer("a", PAGES, 5).name not in exports.sender.offers
    exports.expect("b")
    assert exports.reserve("b", 100) and exports.count == 1


def test_what_could_not_be_offered_is_released_and_what_is_on_offer_stays(exports):
    for name in "ab":
        exports.expect(name)
        assert exports.reserve(name, 40)
    where = exports.offer("a", PAGES, 5)
    for name in "ab":
        exports.release(name)
    assert where.name in exports.sender.offers and exports.count == 1
    exports.withdraw()
    assert exports.count == 0
