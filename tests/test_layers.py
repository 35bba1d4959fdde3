"""Dependencies point down, and no two modules need each other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "ssm_fast"

# From the bottom up: what lies on a line may import what lies on the lines before it.
LAYERS = [
    {"_native", "_torch", "checks", "kernels"},
    {"ops"},
    {"nn"},
    {"native", "checkpoint", "losses", "integrations"},
    {"core", "env_runner", "experience"},
    {"meta_rl", "policy"},
    {"adaptation", "bench"},
    {"cli", "app"},
]
HEIGHT = {name: height for height, names in enumerate(LAYERS) for name in names}
MODULES = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
    if not (ROOT / "kernels").is_symlink() or ROOT / "kernels" not in path.parents
}


def _only_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def _nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All that run, also inside of functions."""
    for child in ast.iter_child_nodes(node):
        if not _only_for_types(child):
            yield child
            yield from _nodes(child)


def _imports(path: Path) -> Iterator[str]:
    """The package's modules that a module imports, anywhere in it."""
    for node in _nodes(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                yield inside if inside in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


GRAPH = {name: set(_imports(path)) & MODULES.keys() for name, path in MODULES.items()}


def _height(module: str) -> int:
    return HEIGHT[module.split(".")[1]]


@pytest.mark.parametrize("package", sorted(HEIGHT.keys() - {"_native"}))
def test_dependencies_point_down(package: str) -> None:
    of_package = [name for name in MODULES if name.split(".")[1:2] == [package]]
    up = {
        f"{name} imports {imported}"
        for name in of_package
        for imported in GRAPH[name]
        if imported.count(".") and imported.split(".")[1] != package
        if _height(imported) >= _height(name) and HEIGHT[package] < len(LAYERS) - 1
    }
    assert not up


def test_every_package_has_a_layer() -> None:
    below = {name.split(".")[1] for name in MODULES if "." in name}
    assert below - {"__main__"} <= HEIGHT.keys()


def test_no_modules_need_each_other() -> None:
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_the_walk_finds_imports() -> None:
    found = GRAPH["ssm_fast.core.improved_ssm"]
    assert {"ssm_fast.nn.stages", "ssm_fast.native.step", "ssm_fast.checkpoint"} <= found
    inside_of_a_function = "ssm_fast.cli.evaluate"
    assert inside_of_a_function in GRAPH["ssm_fast.cli"] | GRAPH["ssm_fast.cli.commands"]
