"""What a package exports is what it says it exports."""

import __future__

import ast
import importlib
import inspect
import pkgutil
from types import ModuleType

import pytest

import jaxserve

PACKAGES = ["jaxserve"] + [m.name for m in pkgutil.walk_packages(jaxserve.__path__, "jaxserve.") if m.ispkg]


def public_names(module: ModuleType) -> list[str]:
    """Names without underscore, submodules and `from __future__` aside, sorted."""
    hidden = (ModuleType, __future__._Feature)
    return sorted(n for n, value in vars(module).items() if not n.startswith("_") and not isinstance(value, hidden))


def complaints(module: ModuleType) -> list[str]:
    """How `module.__all__` differs from what it should be, as sentences."""
    said = list(module.__all__)
    wrong = [f"{name} is in __all__ and does not exist" for name in said if not hasattr(module, name)]
    wrong += [f"{name} is public and not in __all__" for name in public_names(module) if name not in said]
    if said != sorted(set(said)):
        wrong.append(f"__all__ should be {sorted(set(said))}")
    return wrong


def has_only_a_docstring(source: str) -> bool:
    body = ast.parse(source).body
    return len(body) == 1 and ast.get_docstring(ast.parse(source)) is not None


def test_the_packages_are_the_front_door_and_the_folders():
    """All others are imported module by module, and export nothing themselves."""
    assert {"jaxserve", "jaxserve.checkpoints", "jaxserve.layers", "jaxserve.parallel"} <= set(PACKAGES)
    assert [name for name in PACKAGES if hasattr(importlib.import_module(name), "__all__")] == ["jaxserve"]


def test_all_is_sorted_and_equals_the_public_names():
    assert complaints(jaxserve) == []


@pytest.mark.parametrize("name", PACKAGES[1:])
def test_a_package_without_a_list_of_names_has_a_docstring_and_nothing_else(name):
    assert has_only_a_docstring(inspect.getsource(importlib.import_module(name)))


@pytest.mark.parametrize("source", ["", "# nothing", "x = 1", '"""Models."""\nfrom jaxserve.layers import mla', "1"])
def test_the_checker_of_docstrings_fires(source):
    assert not has_only_a_docstring(source)


@pytest.mark.parametrize(
    ("names", "exported"),
    [
        ({"LLM": 1, "extra": 2}, ["LLM"]),
        ({"LLM": 1}, ["LLM", "missing"]),
        ({"LLM": 1, "Abc": 2}, ["LLM", "Abc"]),
        ({"LLM": 1}, ["LLM", "LLM"]),
    ],
    ids=["forgotten", "missing", "unsorted", "twice"],
)
def test_the_checker_fires(names, exported):
    module = ModuleType("planted")
    vars(module).update(names, __all__=exported)
    assert len(complaints(module)) == 1


def test_the_checker_is_silent_on_private_names_and_submodules():
    module = ModuleType("planted")
    vars(module).update(LLM=1, _private=2, engine=ModuleType("engine"), __version__="1", __all__=["LLM", "__version__"])
    assert complaints(module) == []
