import re

import pytest

from jaxserve.parallel import errors
from jaxserve.parallel.errors import JaxserveError

CLASSES = {name: cls for name, cls in vars(errors).items() if isinstance(cls, type)}


def test_the_tree_in_the_docstring_is_the_tree_of_classes():
    drawn = re.findall(r"[├└]── (\w+) ", errors.__doc__ or "")
    assert sorted([*drawn, "JaxserveError"]) == sorted(CLASSES)


@pytest.mark.parametrize("cls", CLASSES.values())
def test_every_error_is_a_value_error_of_the_one_root(cls):
    assert issubclass(cls, JaxserveError) and issubclass(cls, ValueError)
    assert cls.__doc__
