"""What the kernels must show on an H200, beside what was measured; alone, a table of what was not."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

WIDTH = "forward and backward, B{} T256 N64"
Rows = dict[str, Any]


class Bar(NamedTuple):
    """A figure and its bound.

    Attributes:
        what: The figure, in words.
        bound: Largest value that will do, or the smallest one where ``least``.
        figure: Reads it from the rows of a measurement.
        least: Whether more is better.
        unit: Behind the number.
    """

    what: str
    bound: float
    figure: Callable[[Rows], float]
    least: bool = False
    unit: str = ""


def per_step(row: str, contender: str) -> Callable[[Rows], float]:
    """Microseconds a step of one contender."""
    return lambda rows: rows[row]["us_per_step"][contender]


def ratio(row: str, ours: str, *peers: str) -> Callable[[Rows], float]:
    """How many times as long as ours the fastest of the peers takes."""

    def figure(rows: Rows) -> float:
        ms = rows[row]["ms"]
        return min(ms[peer] for peer in peers) / ms[ours]

    return figure


def worst(order: str) -> Callable[[Rows], float]:
    """The larger relative RMS error of the two scans."""
    return lambda rows: max(
        rows[f"{op}, relative RMS error"][order] for op in ("dense_scan", "norm_scan")
    )


CUDNN = ("cuDNN GRU", "cuDNN LSTM")
LONG, LONE = "dense_scan B16 T1024 N64, forward", "dense_scan B1 T4096 N64, forward"
NORM = "norm_scan B16 T1024 N64"
BARS = [
    Bar("dense_scan persistent, B16 T1024 N64, forward", 1.0, per_step(LONG, "persistent"), unit="us a step"),
    Bar("dense_scan chunked, the same", 0.15, per_step(LONG, "chosen"), unit="us a step"),
    Bar("dense_scan chunked, B1 T4096 N64", 0.15, per_step(LONE, "chosen"), unit="us a step"),
    Bar("the same against persistent", 5.0, ratio(LONE, "chosen", "persistent"), True, "x"),
    Bar("norm_scan B16 T1024 N64, forward", 1.3, per_step(NORM, "forward"), unit="us a step"),
    Bar("the same, forward and backward", 3.5, per_step(NORM, "forward and backward"), unit="us a step"),
    *(
        Bar(f"{op} against cuDNN's GRU and LSTM, forward and backward, B{B}", 3.0,
            ratio(WIDTH.format(B), op, *CUDNN), True, "x")
        for B in (16, 256, 4096) for op in ("norm_scan", "dense_scan")
    ),
    Bar("linear_scan, 1 GB, forward, of the bandwidth of a copy", 0.85,
        lambda rows: rows["linear_scan B64 T1024 C1280, forward"]["share_of_copy_bandwidth"], True),
    Bar("second order of norm_scan against the eager loop, T256", 50.0,
        ratio("second order of norm_scan, B16 T256 N64", "norm_scan", "eager loop"), True, "x"),
    Bar("64 tasks in one launch against 64 launches", 10.0,
        ratio("64 tasks, norm_scan B8 T256 N64, forward", "one launch", "a launch each"), True, "x"),
    Bar("relative RMS error, float32, outputs", 1e-5, worst("output")),
    Bar("the same, first order", 1e-5, worst("first")),
    Bar("the same, second order", 1e-4, worst("second")),
]  # fmt: skip


def table(rows: Rows) -> list[str]:
    """The bars as markdown, each beside what was measured, if it was."""
    lines = ["| | bar | measured |", "|---|---|---|"]
    for bar in BARS:
        try:
            value = bar.figure(rows)
        except KeyError:
            measured = "not measured"
        else:
            met = value >= bar.bound if bar.least else value <= bar.bound
            measured = f"{value:.3g} {bar.unit}".strip() + ("" if met else ", missed")
        bound = f"{'>=' if bar.least else '<='} {bar.bound:g} {bar.unit}".strip()
        lines.append(f"| {bar.what} | {bound} | {measured} |")
    return lines


def main() -> None:
    """Print the table without a measurement, and write it to the folder given, if it holds none."""
    text = (
        "\n".join(["# GPU benchmarks", "", "Not run: no GPU was at hand.", "", *table({})]) + "\n"
    )
    for folder in map(Path, sys.argv[1:]):
        if not (folder / "gpu.json").exists():
            (folder / "gpu.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
