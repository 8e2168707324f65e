import pytest

from jaxserve.layers.keys import Keys
from jaxserve.parallel.errors import ConfigError

KEYS = Keys({"one": 1, "half": 0.5, "yes": True, "list": [1, 2], "null": None, "object": {"one": 1}}, "the test")


def test_a_value_within_its_rule_is_read_as_its_type():
    assert KEYS.whole("one") == 1 and KEYS.number("half") == 0.5 and KEYS.flag("yes") is True
    assert isinstance(KEYS.number("one"), float)
    assert KEYS.wholes("list") == (1, 2) and KEYS.wholes("one", or_one=True) == (1,)
    assert KEYS.inner("object", "the object").whole("one") == 1


@pytest.mark.parametrize("key", ["null", "absent"])
def test_a_default_stands_for_what_is_null_or_absent(key):
    assert KEYS.whole(key, default=3) == 3 and KEYS.number(key, default=0.5) == 0.5
    assert KEYS.flag(key, default=False) is False
    assert KEYS.wholes(key) == () and KEYS.inner(key, "the object").raw == {}
    assert key not in KEYS and KEYS.get(key, "default") == "default"
    KEYS.only(key, "supported")


def test_what_lacks_a_key_is_told_who_needs_it():
    with pytest.raises(ConfigError, match="^config.json lacks 'absent', which the test needs$"):
        KEYS.whole("absent")
    with pytest.raises(ConfigError, match="^config.json, object lacks 'absent', which the object needs$"):
        KEYS.inner("object", "the object").number("absent")


def test_the_ends_of_a_range_are_as_they_read():
    keys = Keys({"x": 2}, "the test")
    assert keys.whole("x", at_least=2, at_most=2) == keys.number("x", at_least=2.0) == 2
    for read, rule in (
        (lambda: keys.whole("x", at_least=3), "it must be a whole number, 3 or more"),
        (lambda: keys.whole("x", at_most=1), "it must be at most 1"),
        (lambda: keys.number("x", above=2.0), "it must be a number, above 2"),
        (lambda: keys.number("x", at_least=2.5), "it must be a number, 2.5 or more"),
        (lambda: keys.only("x", 1, 3), "it is not supported; supported: 1, 3"),
    ):
        with pytest.raises(ConfigError, match=f"^config.json: x = 2: {rule}$"):
            read()


def test_true_is_no_number_and_one_is_not_true():
    for read in (KEYS.whole, KEYS.number):
        with pytest.raises(ConfigError, match="yes = True"):
            read("yes")
    with pytest.raises(ConfigError, match="one = 1: it must be true or false"):
        KEYS.flag("one")
