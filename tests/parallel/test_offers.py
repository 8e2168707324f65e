import numpy as np
import pytest

from jaxserve.parallel.errors import TransferError
from jaxserve.parallel.offers import Offers


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def arrays(nbytes: int) -> list[np.ndarray]:
    return [np.zeros(nbytes, np.uint8)]


def test_there_is_room_for_so_many_bytes_and_what_was_taken_makes_more():
    offers = Offers(100)
    assert offers.add("a", arrays(60), 9.0) and offers.add("b", arrays(40), 9.0)
    assert not offers.add("c", arrays(1), 9.0)
    assert (len(offers), offers.nbytes) == (2, 100) and "a" in offers and "c" not in offers
    offers.claim("a")
    offers.remove("a")
    assert offers.add("c", arrays(60), 9.0)


def test_what_is_too_old_is_thrown_away_and_counted_but_not_while_it_is_being_taken():
    offers = Offers(100, clock := Clock())
    for name, seconds in {"a": 1.0, "b": 1.0, "c": 5.0}.items():
        offers.add(name, arrays(10), seconds)
    offers.claim("a")
    clock.now = 2
    offers.expire()
    assert (len(offers), offers.nbytes, offers.expired) == (2, 20, 1)
    offers.put_back("a")
    offers.expire()
    assert (len(offers), offers.expired) == (1, 2)
    with pytest.raises(TransferError, match="a is not offered") as caught:
        offers.claim("a")
    assert caught.value.kind == "gone"


def test_an_offer_is_taken_by_one_at_a_time():
    offers = Offers(100)
    offers.add("a", arrays(10), 9.0)
    offers.claim("a")
    with pytest.raises(TransferError, match="taken by another"):
        offers.claim("a")
    offers.put_back("a")
    offers.claim("a")


def test_what_never_fits_and_a_name_that_is_there_are_refused():
    offers = Offers(100)
    with pytest.raises(TransferError, match="a has 101 bytes, all offers may have 100: raise that"):
        offers.add("a", arrays(101), 9.0)
    offers.add("a", arrays(1), 9.0)
    with pytest.raises(TransferError, match="a is offered already"):
        offers.add("a", arrays(1), 9.0)


def test_after_all_is_cleared_nothing_is_held():
    offers = Offers(100)
    offers.add("a", arrays(10), 9.0)
    offers.clear()
    offers.remove("a")
    offers.put_back("a")
    assert (len(offers), offers.nbytes, offers.expired) == (0, 0, 0)
