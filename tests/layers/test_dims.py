import ast
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from jaxserve.layers import dims
from jaxserve.layers.config import Config
from jaxserve.layers.transformer import cache_params, model_params
from tests.layers.helpers import FAMILIES

SOURCES = sorted(Path(dims.__file__).parent.glob("*.py"))
EINSUM = r"[a-z., ]+->[a-z. ]*|[a-z]+(,[a-z]+)+"


def test_a_dimension_is_one_letter_with_a_meaning():
    assert all(re.fullmatch("[a-z]", letter) for letter in dims.DIMS)
    assert all(dims.DIMS.values()) and len(set(dims.DIMS.values())) == len(dims.DIMS)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_axes_of_all_weights_and_caches_are_in_the_glossary(family):
    cfg = Config.tiny(family)
    leaves = jax.tree.leaves((model_params(cfg), cache_params(cfg, pages=2, page_size=4)))
    assert {axis for param in leaves for axis in param.axes} - {None} <= set(dims.DIMS)


Shape = tuple[ast.AST | None, list[str]]
"""The letters of a shape, and what has it, if that is said."""


def annotated(tree: ast.AST) -> Iterator[Shape]:
    """The shapes of jaxtyping annotations, wherever they stand."""
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "jaxtyping"]
    types = {alias.name for node in froms for alias in node.names}
    owners = {node.annotation: node for node in ast.walk(tree) if isinstance(node, ast.arg | ast.AnnAssign)}
    for node in ast.walk(tree):
        match node:
            case ast.Subscript(ast.Name(name), ast.Tuple([_, ast.Constant(str(shape))])) if name in types:
                yield owners.get(node), [letter.lstrip("*") for letter in shape.split()]


def multiplied(tree: ast.AST) -> Iterator[Shape]:
    """The shapes in einsum strings: of calls of any function, each argument's and the result's."""
    owners = {node.value: node.targets[0] for node in ast.walk(tree) if isinstance(node, ast.Assign)}
    for node in ast.walk(tree):
        match node:
            case ast.Call(_, [ast.Constant(str(spec)), *operands]) if re.fullmatch(EINSUM, spec):
                shapes = re.split(",|->", spec.replace(" ", ""))
                yield from zip([*operands, owners.get(node)], map(list, shapes), strict=False)  # "->" may be missing


def complaints(source: str) -> list[str]:
    """Shapes with a letter that isn't in the glossary, or other letters than their array's name ends with."""
    tree, wrong = ast.parse(source), []
    for owner, letters in [*annotated(tree), *multiplied(tree)]:
        wrong += [f"{letter!r} of {letters} is not in the glossary" for letter in letters if letter not in dims.DIMS]
        suffix = re.search("_([a-z]+)$", name_of(owner))
        if suffix and suffix[1] != "".join(letters):
            wrong.append(f"{name_of(owner)} has the shape {letters}")
    return wrong


def name_of(node: ast.AST | None) -> str:
    match node:
        case ast.arg(name) | ast.Name(name) | ast.AnnAssign(ast.Name(name)):
            return name
    return ""


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_annotations_einsum_strings_and_names_agree_with_the_glossary(path):
    assert complaints(path.read_text()) == []


@pytest.mark.parametrize(
    "line",
    [
        'x: Float[Array, "t o"]',
        'def f(x: Float[Array, "t *o"]): pass',
        'def f(x) -> tuple[int, Int[Array, " tokens"] | None]: pass',
        'x_td: Float[Array, "d t"]',
        'def f(x_td: Float[Array, "t f"]): pass',
        'jnp.einsum("to->t", x)',
        'y = dot("td,od->t", x, w)',
        'einsum("td, dt -> to", x, w)',
        'einsum("td,od", x, w)',
        'f(jnp.einsum("td,fd->tf", x_tf, w))',
        'y_td = einsum("td,fd->tf", x_td, p.w_up)',
    ],
)
def test_the_checker_fires(line):
    assert len(complaints(f"from jaxtyping import Array, Float, Int\n{line}")) == 1


@pytest.mark.parametrize(
    "line",
    [
        'def f(x_td: Float[Array, "t d"], i: Int[Array, ""], *, y: Float[Array, "*t d"]): pass',
        'y_tf = einsum("td,fd->tf", x_td, p.w_up) * jnp.einsum("td,fd->tf", x, up)',
        'odd: dict[str, "to"] = f("to", x_td)',
    ],
)
def test_the_checker_is_silent_on_what_agrees_and_on_other_strings(line):
    assert complaints(f"from jaxtyping import Array, Float, Int\n{line}") == []
