"""The progress of a training: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ssm_fast.cli.messages import note

SECONDS_BETWEEN_LINES = 10.0  # where there is no terminal to draw a bar on


class Show(NamedTuple):
    """What shows the progress of a training.

    Attributes:
        iteration: Takes what is done, and the metrics of an iteration.
        steps: Takes the environment steps so far, inside an iteration.
    """

    iteration: Callable[[float, dict[str, float]], None]
    steps: Callable[[int], None]


@contextmanager
def show_progress(total: int, unit: str) -> Iterator[Show]:
    """Yields what shows progress: a bar on a terminal, a line now and then elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        last = time.monotonic()

        def write_line(done: float, metrics: dict[str, float]) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last < SECONDS_BETWEEN_LINES and done < total:
                return
            last = now
            note(f"{done:,.0f} of {total:,} {unit}, {_shown(metrics)}")

        def write_steps(steps: int) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= SECONDS_BETWEEN_LINES:
                last = now
                note(f"{steps:,} steps so far")

        yield Show(write_line, write_steps)
        return

    with Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[metrics]}"),
        console=console,
        refresh_per_second=4,
    ) as bar:
        task = bar.add_task(unit, total=total, metrics="")

        def move_bar(done: float, metrics: dict[str, float]) -> None:
            bar.update(task, completed=min(done, total), metrics=_shown(metrics))

        def count_steps(steps: int) -> None:
            if not bar.tasks[task].completed:
                bar.update(task, metrics=f"{steps:,} steps so far")

        yield Show(move_bar, count_steps)


def _shown(metrics: dict[str, float]) -> str:
    mean = metrics["episode_return"]
    figure = "no episode yet" if math.isnan(mean) else f"return {mean:.1f}"
    return f"{figure}, {metrics['steps_per_second']:,.0f} steps/s"
