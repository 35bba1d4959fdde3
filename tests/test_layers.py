"""Dependencies between the packages point down."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "ssm_fast"
# What each may import beside itself.
ALLOWED = {
    "ops": {"_native", "_torch", "kernels", "checks"},
    "nn": {"_torch", "ops", "checks"},
    "native": {"_torch", "nn", "ops", "checks"},
    "core": {"_torch", "native", "nn", "ops", "checks", "checkpoint"},
}


def _imports(path: Path) -> Iterator[str]:
    """Names below ``ssm_fast`` that a module imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            if name.startswith("ssm_fast."):
                yield name.split(".")[1]


@pytest.mark.parametrize("package", ALLOWED)
def test_dependencies_point_down(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        found = set(_imports(path)) - ALLOWED[package] - {package}
        packages = {
            name for name in found if (ROOT / name).is_dir() or (ROOT / f"{name}.py").exists()
        }
        assert not packages, f"{path.relative_to(ROOT)} imports {sorted(packages)}"


def test_the_walk_finds_imports() -> None:
    assert {"native", "nn", "ops"} <= set(_imports(ROOT / "core" / "improved_ssm.py"))
