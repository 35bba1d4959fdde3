from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ssm_fast.ops.dispatch import native

# What is compiled once per instruction set.
KERNEL_SOURCES = sorted((Path(__file__).parent.parent / "csrc" / "kernels").iterdir())

pytestmark = pytest.mark.isa_independent


def run_python(code, tmp_path, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("isa", native.available_isas())
def test_ssm_fast_isa_chooses_the_level(isa, tmp_path):
    code = "from ssm_fast.ops.dispatch import native; print(native.isa())"
    assert run_python(code, tmp_path, SSM_FAST_ISA=isa).stdout.strip() == isa


def test_widest_level_is_the_default(tmp_path):
    code = "from ssm_fast.ops.dispatch import native; print(native.isa())"
    result = run_python(code, tmp_path, SSM_FAST_ISA="")
    assert result.stdout.strip() == native.available_isas()[-1]


@pytest.mark.parametrize("isa", ["avx1024", "AVX2 "])
def test_unknown_level_is_an_import_error(isa, tmp_path):
    result = run_python("import ssm_fast", tmp_path, SSM_FAST_ISA=isa)
    assert result.returncode == 1
    assert "SSM_FAST_ISA must be one of baseline" in result.stderr
    assert f"got '{isa}'" in result.stderr


def test_torch_sets_the_number_of_threads():
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert native.num_threads() == count
    finally:
        torch.set_num_threads(threads)


def test_torch_sets_the_number_of_threads_in_every_thread():
    program = """
import threading
import torch
from ssm_fast.ops import dense_scan
from ssm_fast.ops.dispatch import native
torch.set_num_threads(2)
found = []
def run():
    dense_scan(torch.randn(32, 64, 64), torch.eye(64))
    found.append(native.num_threads())
for _ in range(2):
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
assert found == [2, 2], found
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "5"}
    subprocess.run([sys.executable, "-I", "-c", program], check=True, env=environment)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_openmp_runtime_is_loaded():
    maps = Path("/proc/self/maps").read_text().splitlines()
    runtimes = {line.split()[-1] for line in maps if "libgomp" in line or "libiomp" in line}
    assert len(runtimes) == 1


@pytest.mark.parametrize("path", KERNEL_SOURCES, ids=lambda path: path.name)
def test_kernel_sources_use_no_templates_of_the_library(path):
    includes = set(re.findall(r"#include [<\"](.+?)[>\"]", path.read_text()))
    allowed = {
        "cstddef",
        "cstdint",
        "cstring",
        "immintrin.h",
        "arm_neon.h",
        "ops.h",
        "outer_products.h",
        "recurrence.h",
        "elementary.h",
        "simd.h",
        "sums.h",
    }
    assert includes <= allowed
    assert "std::" not in re.sub(
        r"std::(memcpy|memset|size_t|uintptr_t|u?int\d+_t)", "", path.read_text()
    )


def test_import_leaves_optional_packages_alone(tmp_path):
    code = (
        "import sys, ssm_fast; optional = {'gymnasium', 'gradio', 'triton', 'tyro', 'rich', "
        "'tensorboard', 'stable_baselines3', 'torchrl'}; print(*optional & set(sys.modules))"
    )
    result = run_python(code, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == ""


def test_the_stubs_name_what_the_module_has():
    stubs = ast.parse((Path(__file__).parent.parent / "ssm_fast" / "_native.pyi").read_text())
    named = {node.name for node in stubs.body if hasattr(node, "name")}
    named |= {node.target.id for node in stubs.body if isinstance(node, ast.AnnAssign)}
    public = {name for name in dir(native) if not name.startswith("_")}
    assert {name for name in named if not name.startswith("_")} == public
