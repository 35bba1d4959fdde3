"""Measure contenders side by side: rounds of shuffled order in one process, medians, ratios."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssm_fast.bench import timing

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
    found = timing.take_turns(
        contenders, rounds=ROUNDS, seconds=MAX_SECONDS, least_rounds=3, calls=calls
    )
    medians = found.milliseconds
    benchmark.extra_info |= {
        "ours": ours,
        "floor": floor,
        "median_ms": medians,
        "over_ours": {name: ms / medians[ours] for name, ms in medians.items()},
        "rounds": found.rounds,
    }
    benchmark.pedantic(contenders[ours], rounds=5, iterations=1)
    return medians


def machine() -> dict[str, Any]:
    """What the numbers were measured on, and which commit they are of."""
    return {**timing.machine(), "commit": commit()}


def commit() -> str | None:
    """The commit of the source tree that these benchmarks lie in, if it is a git checkout."""
    git = shutil.which("git")
    if git is None:
        return None
    command = [git, "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or None
