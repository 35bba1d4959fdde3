"""The progress of a training: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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


@contextmanager
def show_progress(total: int, unit: str) -> Iterator[Callable[[float, dict[str, float]], None]]:
    """Yields a function that shows progress: a bar on a terminal, a line now and then elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        last = time.monotonic()

        def write_line(done: float, metrics: dict[str, float]) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last < SECONDS_BETWEEN_LINES and done < total:
                return
            last = now
            note(f"{done:,.0f} of {total:,} {unit}, {_figures(metrics)}")

        yield write_line
        return

    with Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
        console=console,
        refresh_per_second=4,
    ) as bar:
        task = bar.add_task(unit, total=total, figures="")

        def move_bar(done: float, metrics: dict[str, float]) -> None:
            bar.update(task, completed=min(done, total), figures=_figures(metrics))

        yield move_bar


def _figures(metrics: dict[str, float]) -> str:
    mean = metrics["episode_return"]
    figure = "no episode yet" if math.isnan(mean) else f"return {mean:.1f}"
    return f"{figure}, {metrics['steps_per_second']:,.0f} steps/s"
