"""Who may import whom: `parallel <- layers <- checkpoints <- jaxserve`."""

import ast
from collections.abc import Iterable, Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("parallel", "layers", "checkpoints", "jaxserve")  # each may import itself and those to its left
HOST = (
    "arrivals",
    "chat",
    "completion",
    "fleet.health",
    "fleet.jobs",
    "fleet.policies",
    "marks",
    "pages",
    "ranked",
    "reasoning",
    "request",
    "runner",
    "scheduler",
    "serving",
    "tiers.store",
    "tokenizer",
    "tools",
)  # plain Python, without JAX
JAX = {"jax", "jaxlib", "flax", "optax", "orbax"}


def module_name(path: Path) -> str:
    """The name under which a file below the root is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(parts if parts[0] == "jaxserve" else ("jaxserve", *parts))


def python_files(*folders: str) -> list[Path]:
    """Every source once: nothing below a link."""
    found = (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))
    return [path for path in found if not any(parent.is_symlink() for parent in path.parents)]


def imports(source: str, package: str) -> Iterator[str]:
    """Absolute names of all that `source` imports, in functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            yield from (f"{base}.{alias.name}" for alias in node.names)


def folder_of(name: str) -> str | None:
    """The top folder that a module or a name in it belongs to; None outside this project."""
    root, _, rest = name.partition(".")
    inner = rest.partition(".")[0]
    return None if root != "jaxserve" else inner if inner in FOLDERS else "jaxserve"


def violations(module: str, imported: Iterable[str]) -> list[str]:
    """What `module` imports though it may not, as sentences."""
    allowed = FOLDERS[: FOLDERS.index(folder_of(module) or "jaxserve") + 1]
    wrong = []
    for name in imported:
        folder = folder_of(name)
        if name.partition(".")[0] in FOLDERS[:-1]:
            wrong.append(f"{module} imports {name}: say jaxserve.{name}")
        elif folder is not None and folder not in allowed:
            wrong.append(f"{module} imports {name}: {allowed[-1]} may import {', '.join(allowed)} only")
    return wrong


def path_to_jax(module: str, graph: dict[str, list[str]], seen: frozenset[str] = frozenset()) -> list[str]:
    """The chain of imports by which `module` reaches JAX; empty if it doesn't.

    The packages on the way are not followed: importing `jaxserve.pages` runs `jaxserve`, which knows the engine.
    """
    for name in graph.get(module, []):
        if name.partition(".")[0] in JAX:
            return [module, name]
        target = name if name in graph else name.rpartition(".")[0]
        if target in graph and target not in seen:
            chain = path_to_jax(target, graph, seen | {module})
            if chain:
                return [module, *chain]
    return []


def import_graph() -> dict[str, list[str]]:
    """Every module of the four folders, with what it imports."""
    graph = {}
    for path in python_files(*FOLDERS):
        name = module_name(path)
        package = name if path.stem == "__init__" else name.rpartition(".")[0]
        graph[name] = sorted(set(imports(path.read_text(), package)))
    return graph


GRAPH = import_graph()


def test_every_folder_is_seen_once_and_under_its_installed_name():
    assert {f"jaxserve.{folder}" for folder in FOLDERS[:-1]} | {"jaxserve"} <= set(GRAPH)
    assert len(GRAPH) == len(python_files(*FOLDERS))


@pytest.mark.parametrize("module", GRAPH)
def test_a_module_imports_only_folders_to_its_left(module):
    assert violations(module, GRAPH[module]) == []


def test_tests_and_benchmarks_use_the_installed_names():
    for path in python_files("tests", "benchmarks"):
        assert violations("jaxserve", imports(path.read_text(), "tests")) == [], path


@pytest.mark.parametrize("module", [f"jaxserve.{name}" for name in HOST])
def test_host_modules_do_not_reach_jax(module):
    if module not in GRAPH:
        pytest.skip("not written yet")
    assert path_to_jax(module, GRAPH) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("jaxserve.parallel.mesh", "import jaxserve.layers.mla"),
        ("jaxserve.parallel.mesh", "from jaxserve.layers import mla"),
        ("jaxserve.parallel.mesh", "from ..layers.mla import Mla"),
        ("jaxserve.parallel.mesh", "from .. import layers"),
        ("jaxserve.layers.mla", "def f():\n    from jaxserve.checkpoints.hf import load"),
        ("jaxserve.layers.mla", "from jaxserve import LLM"),
        ("jaxserve.layers.mla", "from jaxserve import *"),
        ("jaxserve.checkpoints.hf", "import jaxserve"),
        ("jaxserve.checkpoints.hf", "if TYPE_CHECKING:\n    from jaxserve.request import Request"),
        ("jaxserve.engine", "import layers.mla"),
        ("jaxserve.engine", "from parallel import mesh"),
        ("jaxserve.engine", "import checkpoints as c"),
    ],
)
def test_the_checker_fires_on_imports_to_the_right_and_on_bare_names(module, source):
    assert len(violations(module, imports(source, module.rpartition(".")[0]))) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("jaxserve.parallel.mesh", "import jax\nfrom . import sharding"),
        ("jaxserve.layers.mla", "from ..parallel import mesh\nfrom jaxserve.parallel.mesh import Topology"),
        ("jaxserve.checkpoints.hf", "from jaxserve import layers, parallel"),
        ("jaxserve.engine", "from . import layers\nfrom .checkpoints import hf\nfrom .request import Request"),
        ("jaxserve.engine", "from starlette import layers\nimport jaxserve_plugin"),
    ],
)
def test_the_checker_is_silent_on_imports_to_the_left(module, source):
    assert violations(module, imports(source, module.rpartition(".")[0])) == []


def test_the_checker_finds_jax_behind_other_modules():
    graph = {"jaxserve.pages": ["jaxserve.a.f"], "jaxserve.a": ["jaxserve.pages", "os", "jax.numpy"]}
    assert path_to_jax("jaxserve.pages", graph) == ["jaxserve.pages", "jaxserve.a", "jax.numpy"]
    assert path_to_jax("jaxserve.pages", graph | {"jaxserve.a": ["jaxserve.pages", "numpy"]}) == []
