"""The sdist builds a wheel, and the wheel holds what it should."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.isa_independent


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, a wheel built from what it holds, and the folder of its object files."""
    folder = tmp_path_factory.mktemp("dist")
    code = "import sys, scikit_build_core.build as b; print(b.build_sdist(sys.argv[1]))"
    run([sys.executable, "-c", code, str(folder)], ROOT)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "source", filter="data")
    (source,) = (folder / "source").iterdir()
    run(
        [
            *(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"),
            *("--disable-pip-version-check", "--wheel-dir", str(folder)),
            *("--config-settings", f"build-dir={folder / 'build'}", str(source)),
        ],
        folder,
    )
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel, folder / "build"


def run(command, cwd):
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_wheel_holds_the_package_and_no_sources(built):
    names = zipfile.ZipFile(built[1]).namelist()
    assert {Path(name).parts[0] for name in names} == {"ssm_fast", dist_info(names)}
    assert not [name for name in names if name.endswith((".cpp", ".h", ".o", "CMakeLists.txt"))]
    for expected in ("__init__.py", "py.typed", "_native.pyi", "kernels/__init__.py", "ops/gae.py"):
        assert f"ssm_fast/{expected}" in names
    assert len([name for name in names if re.fullmatch(r"ssm_fast/_native\..*so", name)]) == 1
    sources = {
        f"ssm_fast/{p.relative_to(ROOT / 'ssm_fast')}" for p in (ROOT / "ssm_fast").rglob("*.py")
    }
    assert sources <= set(names)


def dist_info(names):
    return next(Path(name).parts[0] for name in names if ".dist-info/" in name)


def test_wheel_is_small(built):
    assert built[1].stat().st_size < 10e6


def test_sdist_holds_what_a_build_needs(built):
    with tarfile.open(built[0]) as archive:
        names = {"/".join(Path(name).parts[1:]) for name in archive.getnames()}
    assert {"CMakeLists.txt", "csrc/module.cpp", "kernels/__init__.py", "LICENSE"} <= names
    assert not [name for name in names if name.startswith((".venv", "build", "runs", ".ci"))]


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm of binutils is not installed")
def test_weak_symbols_of_an_instruction_set_stay_in_its_namespace(built):
    """The linker may take a weak function that two levels share from the one of wider vectors."""
    objects = [path for path in built[2].rglob("*.o") if "ops_" in str(path)]
    assert objects
    for path in objects:
        isa = re.search(r"ops_(\w+)\.dir", str(path)).group(1)
        symbols = subprocess.run(
            ["nm", str(path)], capture_output=True, text=True, check=True
        ).stdout
        defined = [line.split(maxsplit=2) for line in symbols.splitlines() if line[0] != " "]
        namespace = f"8ssm_fast{len(isa)}{isa}"  # as it is mangled: not every name demangles
        leaks = [name for _, kind, name in defined if kind in "WVuT" and namespace not in name]
        assert leaks == []
