"""Time the forward scans over state sizes and batch sizes beside the GEMM of the same operations.

`python benchmarks/sweep_sizes.py sizes.json`; `plot_kernels.py` draws the result.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from contest import machine

from ssm_fast.ops import dense_scan, norm_scan

if TYPE_CHECKING:
    from collections.abc import Callable

NS = (1, 2, 4, 8, 12, 16, 17, 24, 32, 33, 48, 63, 64, 65, 80, 96, 127, 128, 129)
NS += (160, 192, 255, 256, 257, 320, 384, 511, 512)  # fmt: skip
BS = (1, 4, 16, 64, 256)
T = 128
ROUNDS = 9
MAX_SECONDS = 1.0  # for one size


def fastest(contenders: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Milliseconds of the fastest of alternating rounds, so that a busy machine is heard least."""
    best = dict.fromkeys(contenders, float("inf"))
    start = time.perf_counter()
    for i in range(ROUNDS):
        for name, run in contenders.items():
            began = time.perf_counter()
            run()
            best[name] = min(best[name], 1e3 * (time.perf_counter() - began))
        if i >= 2 and time.perf_counter() - start > MAX_SECONDS:
            break
    return best


def main(path: Path) -> None:
    """Write the times of every size as JSON."""
    rows = []
    for N in NS:
        A = torch.nn.init.orthogonal_(torch.empty(N, N), 0.9)
        weight, bias = torch.ones(N), torch.zeros(N)
        for B in BS:
            u = torch.randn(B, T, N)
            x = u.reshape(-1, N)
            contenders = {
                "mm": lambda x=x, A=A: torch.mm(x, A),
                "dense_scan": lambda u=u, A=A: dense_scan(u, A),
                "norm_scan": lambda u=u, A=A, w=weight, b=bias: norm_scan(u, A, w, b),
            }
            rows.append({"B": B, "T": T, "N": N, "ms": fastest(contenders)})
    path.write_text(json.dumps({"machine": machine(), "sizes": rows}, indent=1) + "\n")


if __name__ == "__main__":
    with torch.no_grad():
        main(Path(sys.argv[1]))
