"""What `make docs` does not see: links as the repository has them, and whether the API is complete."""

from __future__ import annotations

import importlib
import pkgutil
import re
from pathlib import Path
from types import ModuleType

import pytest

import ssm_fast

pytestmark = pytest.mark.isa_independent

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("[!.]*/**/*.md")])
LINK = re.compile(r"\]\((?!https?:)([^)\s#]+)(?:#[^)\s]*)?\)")
CODE = re.compile(r"^```.*?^```$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
IMPORT = re.compile(r"^from (ssm_fast[\w.]*) import ([\w, ]+)$", re.MULTILINE)
NOT_AN_INTERFACE = {"ssm_fast.app", "ssm_fast.cli", "ssm_fast.kernels"}


def linked(path: Path) -> list[str]:
    return LINK.findall(CODE.sub("", path.read_text()))


@pytest.mark.parametrize(
    "page", [path for path in PAGES if linked(path)], ids=lambda path: str(path.relative_to(ROOT))
)
def test_links_lead_somewhere(page: Path) -> None:
    for link in linked(page):
        target = page.parent / link
        assert target.exists(), link
        assert target.is_file() or (target / "README.md").exists(), f"{link} has no README.md"


def find(path: str) -> object:
    """What a dotted path stands for: a module, or else an attribute."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        owner, _, name = path.rpartition(".")
        return getattr(find(owner), name)


@pytest.fixture(scope="module")
def documented() -> list[object]:
    """All that the API reference shows."""
    names = [
        name
        for page in (ROOT / "docs/api").glob("*.md")
        for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)
    ]
    assert len(names) == len(set(names))
    return [find(name) for name in names]


def packages() -> list[ModuleType]:
    below = (
        f"ssm_fast.{found.name}" for found in pkgutil.iter_modules(ssm_fast.__path__) if found.ispkg
    )
    modules = [importlib.import_module(name) for name in below if name not in NOT_AN_INTERFACE]
    return [ssm_fast, *(module for module in modules if hasattr(module, "__all__"))]


@pytest.mark.parametrize("package", packages(), ids=lambda package: package.__name__)
def test_the_api_has_every_public_name(package: ModuleType, documented: list[object]) -> None:
    for name in package.__all__:
        value = getattr(package, name)
        if not isinstance(value, (ModuleType, str)):
            assert any(value is shown for shown in documented), name


def test_the_api_has_what_the_documents_import(documented: list[object]) -> None:
    imports = {found for page in PAGES for found in IMPORT.findall(page.read_text())}
    assert len(imports) > 20
    for module, names in imports:
        for name in names.split(", "):
            value = getattr(importlib.import_module(module), name)
            assert any(value is shown for shown in documented), f"{module}.{name}"
