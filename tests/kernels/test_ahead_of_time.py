"""Every kind of launch compiles for GPUs that need not be there, within their resources."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SHARED = 99 * 1024  # bytes a program may have on any GPU since Ampere
PROCESSES = 2
FEW, MANY = 8, 600  # batch rows, below and above where the plan changes
CASES = [  # op, dtype, N, B, T, capability
    *(("dense_scan", "float32", N, FEW, 7, 90) for N in (1, 63, 128, 256)),
    *(("dense_scan", "float32", N, MANY, 7, 80) for N in (64, 128, 256)),
    ("dense_scan", "float32", 64, FEW, 300, 90),
    ("dense_scan", "float64", 128, FEW, 7, 90),
    ("dense_scan", "float64", 256, FEW, 7, 80),
    ("dense_scan", "bfloat16", 64, FEW, 7, 80),
    ("dense_scan", "float16", 128, MANY, 7, 90),
    *(("norm_scan", "float32", N, FEW, 7, 90) for N in (64, 128, 256)),
    *(("norm_scan", "float32", N, MANY, 7, 80) for N in (32, 63, 128)),
    ("norm_scan", "float64", 128, FEW, 7, 80),
    ("norm_scan", "bfloat16", 64, MANY, 7, 90),
    *((f"norm_scan_{sweep}", "float32", 64, FEW, 7, 80) for sweep in ("tangent", "adjoint")),
    *((f"norm_scan_{sweep}", "float32", 64, MANY, 7, 90) for sweep in ("tangent", "adjoint")),
    *((f"norm_scan_{sweep}", "float32", 128, MANY, 7, 90) for sweep in ("tangent", "adjoint")),
    ("norm_scan_adjoint", "bfloat16", 64, MANY, 7, 80),
    ("norm_scan_tangent", "float64", 64, FEW, 7, 80),
    ("norm_scan_adjoint", "float32", 256, FEW, 7, 90),
    ("linear_scan", "float32", 64, FEW, 7, 80),
    ("linear_scan", "bfloat16", 64, MANY, 7, 90),
    ("linear_scan", "complex64", 64, MANY, 7, 90),
    ("linear_scan", "float64", 64, MANY, 7, 90),
    *(("linear_scan", dtype, 64, FEW, 600, 90) for dtype in ("float32", "complex64")),
    ("linear_scan", "bfloat16", 64, FEW, 600, 80),
    ("gae", "float32", 64, MANY, 7, 90),
    ("gae", "float32", 1, FEW, 7, 80),
    ("discounted_returns", "float32", 64, MANY, 7, 80),
    ("output_norm", "float32", 128, MANY, 7, 80),
    ("output_norm", "bfloat16", 8192, FEW, 7, 90),
    ("output_norm_grad", "float32", 128, MANY, 7, 90),
    # Strides that need 64 bits.
    *((op, "float32", 64, MANY, 1 << 26, 90) for op in ("dense_scan", "norm_scan", "linear_scan")),
    ("dense_scan", "bfloat16", 64, FEW, 1 << 26, 80),
    ("linear_scan", "float32", 64, FEW, 1 << 26, 80),
    ("gae", "float32", 64, MANY, 1 << 26, 90),
    # Plans that tests and benchmarks ask for: states, rows, product, warps.
    ("dense_scan", "float32", 64, MANY, 7, 90, 64, 16, "ieee", 4),
    ("dense_scan", "float32", 64, MANY, 7, 80, 64, 16, "tf32x3", 4),
    ("norm_scan", "float64", 33, FEW, 7, 90, 64, 16, "ieee", 4),
    ("norm_scan", "float64", 33, FEW, 7, 80, 64, 2, "stream", 4),
]


@pytest.fixture(scope="module")
def compiled():
    """What each launch needs, by case; in processes of their own, where Triton does not interpret."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    program = Path(__file__).with_name("ahead_of_time.py")
    compilers = [
        subprocess.Popen(
            [sys.executable, str(program), json.dumps(CASES[i::PROCESSES])],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            cwd=program.parent,
        )
        for i in range(PROCESSES)
    ]
    found = {}
    for compiler in compilers:
        output, _ = compiler.communicate()
        assert compiler.returncode == 0, output
        for line in output.splitlines():
            if line.startswith("{"):
                launch = json.loads(line)
                found.setdefault(tuple(launch["case"]), []).append(launch)
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_launches_compile_within_the_resources_of_a_gpu(compiled, case):
    launches = compiled[case]
    in_chunks = {"dense_scan": 3, "linear_scan": 2} if case[4] > 7 and case[3] == FEW else {}
    assert len(launches) == in_chunks.get(case[0], 1)
    for launch in launches:
        assert launch["spilled"] == 0 or len(case) > 6, launch
        assert launch["shared"] <= SHARED, launch
