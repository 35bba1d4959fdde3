"""Measure contenders side by side: rounds of shuffled order in one process, medians, ratios."""

from __future__ import annotations

import os
import platform
import random
import re
import shutil
import statistics
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_benchmark.fixture import BenchmarkFixture

MAX_SECONDS = 20.0  # for all contenders of one contest
ROUNDS = 21


def contest(
    benchmark: BenchmarkFixture,
    ours: str,
    contenders: dict[str, Callable[[], Any]],
    *,
    floor: str | None = None,
    calls: int = 1,
) -> dict[str, float]:
    """Time every contender in rounds of shuffled order and record the medians beside the benchmark.

    Args:
        benchmark: pytest-benchmark's fixture; it tracks the contender ``ours``.
        ours: name of our contender.
        contenders: what to time, by name.
        floor: name of the contender that is a physical floor rather than a peer.
        calls: calls in a round, for contenders of microseconds: as in a loop that does nothing else.

    Returns:
        The median of each contender in milliseconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        run()
    start = time.perf_counter()
    order, generator = list(contenders.items()), random.Random(0)
    while len(seconds[ours]) < ROUNDS:
        generator.shuffle(order)  # nobody always finds the caches and threads of the same one
        for name, run in order:
            began = time.perf_counter()
            for _ in range(calls):
                run()
            seconds[name].append((time.perf_counter() - began) / calls)
        if time.perf_counter() - start > MAX_SECONDS and len(seconds[ours]) >= 3:
            break
    medians = {name: statistics.median(times) * 1e3 for name, times in seconds.items()}
    benchmark.extra_info |= {
        "ours": ours,
        "floor": floor,
        "median_ms": medians,
        "over_ours": {name: ms / medians[ours] for name, ms in medians.items()},
        "rounds": len(seconds[ours]),
    }
    benchmark.pedantic(contenders[ours], rounds=5, iterations=1)
    return medians


def machine() -> dict[str, Any]:
    """What the numbers were measured on, and which commit they are of."""
    import ssm_fast
    from ssm_fast.ops.backend import native

    return {
        "ssm_fast": ssm_fast.__version__,
        "commit": _commit(),
        "processor": _processor(),
        "processors": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "isa": native.isa(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        match = re.search(r"model name\s*: (.+)", cpuinfo.read_text())
        if match:
            return match[1]
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the source tree that these benchmarks lie in, if it is a git checkout."""
    git = shutil.which("git")
    if git is None:
        return None
    command = [git, "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or None
