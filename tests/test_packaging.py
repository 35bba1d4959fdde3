"""The sdist builds a wheel, and the wheel holds what it should."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
NOT_IN_SDIST = (".github/", "benchmarks/results/", "docs/images/")

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


def run(command, cwd, **environment):
    result = subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope="module")
def unpacked(built):
    """The files of the wheel, as an installation has them."""
    folder = built[1].parent / "installed"
    with zipfile.ZipFile(built[1]) as wheel:
        wheel.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def tracked():
    """The files of the repository."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listing.returncode != 0:
        pytest.skip("git does not know this folder")
    return set(listing.stdout.splitlines())


def test_wheel_holds_the_package_and_no_more(built, tracked):
    names = {name for name in zipfile.ZipFile(built[1]).namelist() if ".dist-info/" not in name}
    (native,) = (name for name in names if re.fullmatch(r"ssm_fast/_native\..*so", name))
    kernels = {f"ssm_fast/{name}" for name in tracked if name.startswith("kernels/")}
    package = {name for name in tracked if name.startswith("ssm_fast/")}
    assert names == {native} | kernels | package


def test_wheel_works_away_from_the_sources(unpacked, tmp_path):
    site_packages = str(Path(torch.__file__).parents[1])
    run(  # -S leaves out an editable install, which would hide the wheel
        [sys.executable, "-S", str(ROOT / ".ci" / "use_wheel.py")],
        tmp_path,
        PYTHONPATH=os.pathsep.join([str(unpacked), site_packages]),
    )


@pytest.mark.skipif(sys.platform != "linux", reason="asks nm for the symbols of an ELF file")
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm of binutils is not installed")
def test_wheel_exports_what_python_looks_for(unpacked):
    (native,) = (unpacked / "ssm_fast").glob("_native.*so")
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", str(native)], capture_output=True, text=True, check=True
    ).stdout
    assert [line.split()[-1] for line in symbols.splitlines()] == ["PyInit__native"]


def test_wheel_is_small(built):
    assert built[1].stat().st_size < 10e6


def test_sdist_holds_the_repository_without_results_and_images(built, tracked):
    with tarfile.open(built[0]) as archive:
        names = {"/".join(Path(name).parts[1:]) for name in archive.getnames()}
    assert names - {"PKG-INFO"} == {name for name in tracked if not name.startswith(NOT_IN_SDIST)}


def test_sdist_is_small(built, tracked):
    policies = sum((ROOT / name).stat().st_size for name in tracked if "/pretrained/" in name)
    assert policies < 4e6
    assert built[0].stat().st_size < 1e6 + policies


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
