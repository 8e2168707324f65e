import pytest

from jaxserve.tiers.records import header, unpack
from tests.jaxserve.tiers.conftest import value_of


def record(size: int = 100) -> bytes:
    value = value_of("a", b"key", size)
    return header("a", b"key", value) + bytes(value)


@pytest.mark.parametrize("size", [0, 1, 100])
def test_a_record_has_its_value(size):
    assert unpack("a", b"key", record(size)) == value_of("a", b"key", size)


def test_every_bit_that_differs_is_noticed():
    whole = record(5)
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        assert unpack("a", b"key", bytes(damaged)) is None


def test_a_record_that_is_cut_off_or_goes_on_is_damaged():
    whole = record(5)
    assert all(unpack("a", b"key", whole[:end]) is None for end in range(len(whole)))
    assert unpack("a", b"key", whole + b"\0") is None


def test_a_record_of_another_key_or_namespace_is_damaged():
    assert unpack("a", b"yek", record()) is None
    assert unpack("b", b"key", record()) is None
    assert unpack("ak", b"ey", record()) is None
