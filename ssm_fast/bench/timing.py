"""Contenders that take turns, and the machine that they were timed on."""

from __future__ import annotations

import os
import platform
import random
import re
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import ssm_fast
from ssm_fast import _native


@dataclass(frozen=True)
class Timing:
    """What a contest came to.

    Attributes:
        milliseconds: The median of each contender's calls.
        rounds: How many rounds there were.
    """

    milliseconds: dict[str, float]
    rounds: int


def take_turns(
    contenders: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    seconds: float,
    least_rounds: int = 1,
    calls: int = 1,
    wait: Callable[[], None] = lambda: None,
) -> Timing:
    """Times contenders in rounds of shuffled order, each after a call that is not timed.

    Args:
        contenders: What to call, by name.
        rounds: How many rounds, at most.
        seconds: No round begins after so many.
        least_rounds: But for these.
        calls: Calls in a round, for contenders of microseconds: as in a loop of nothing else.
        wait: Called before a clock is read, until a device is done.
    """
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        run()
    wait()
    order, generator = list(contenders.items()), random.Random(0)
    start, done = time.perf_counter(), 0
    while done < rounds and (done < least_rounds or time.perf_counter() - start < seconds):
        generator.shuffle(order)  # nobody always finds the caches and threads of the same one
        for name, run in order:
            began = time.perf_counter()
            for _ in range(calls):
                run()
            wait()
            taken[name].append((time.perf_counter() - began) / calls)
        done += 1
    return Timing({name: statistics.median(times) * 1e3 for name, times in taken.items()}, done)


def machine(device: str = "cpu") -> dict[str, Any]:
    """What numbers of a device are measured on."""
    return {
        "ssm_fast": ssm_fast.__version__,
        "processor": _processor(),
        "processors": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "isa": _native.isa(),
        "device": device,
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        match = re.search(r"model name\s*: (.+)", cpuinfo.read_text())
        if match:
            return match[1]
    return platform.processor() or platform.machine()
