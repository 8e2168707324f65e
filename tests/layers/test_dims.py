import re
from pathlib import Path

import jax
import pytest

from jaxserve.layers import dims
from jaxserve.layers.config import Config
from jaxserve.layers.transformer import cache_params, model_params
from tests.layers.helpers import FAMILIES

SOURCES = sorted(Path(dims.__file__).parent.glob("*.py"))


def test_a_dimension_is_one_letter_with_a_meaning():
    assert all(re.fullmatch("[a-z]", letter) for letter in dims.DIMS)
    assert all(dims.DIMS.values()) and len(set(dims.DIMS.values())) == len(dims.DIMS)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_axes_of_all_weights_and_caches_are_in_the_glossary(family):
    cfg = Config.tiny(family)
    leaves = jax.tree.leaves((model_params(cfg), cache_params(cfg, pages=2, page_size=4)))
    assert {axis for param in leaves for axis in param.axes} - {None} <= set(dims.DIMS)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_the_shapes_of_all_annotations_are_in_the_glossary(path):
    shapes = re.findall(r'\b(?:Float|Int|Bool|Array)\[[^"\]]*, "([^"]*)"\]', path.read_text())
    letters = {letter.lstrip("*") for shape in shapes for letter in shape.split()}
    assert letters <= set(dims.DIMS)
