from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from contest import machine

RESULTS = "SSM_FAST_BENCH_RESULTS"  # folder for kernels.json and kernels.md, when set


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Print each contest as a row, and write all of them where SSM_FAST_BENCH_RESULTS says."""
    session = getattr(config, "_benchmarksession", None)
    contests = [
        {"name": bench.name, **bench.extra_info}
        for bench in (session.benchmarks if session else [])
        if "median_ms" in bench.extra_info
    ]
    if not contests:
        return
    lines = [*_machine_lines(), "", *_table(contests)]
    terminalreporter.section("contests: median ms (times ours)")
    for line in lines:
        terminalreporter.write_line(line)
    if os.environ.get(RESULTS):
        folder = Path(os.environ[RESULTS])
        folder.mkdir(parents=True, exist_ok=True)
        payload = {"machine": machine(), "contests": contests}
        (folder / "kernels.json").write_text(json.dumps(payload, indent=2) + "\n")
        (folder / "kernels.md").write_text(
            "# Kernel benchmarks\n\n`SSM_FAST_BENCH_RESULTS=benchmarks/results pytest benchmarks` on:\n"
            + "\n".join(lines)
            + "\n"
        )


def _machine_lines() -> list[str]:
    return [", ".join(f"{key} {value}" for key, value in machine().items() if value is not None)]


def _table(contests: list[dict[str, Any]]) -> list[str]:
    rows = [
        "| benchmark | ours, ms | floor, ms (ours / floor) | peers, ms (peer / ours) |",
        "|---|---|---|---|",
    ]
    for entry in contests:
        ours, floor, median = entry["ours"], entry["floor"], entry["median_ms"]
        floor_cell = (
            "" if floor is None else f"{median[floor]:.3f} ({median[ours] / median[floor]:.2f}x)"
        )
        peers = ", ".join(
            f"{name} {ms:.3f} ({ms / median[ours]:.1f}x)"
            for name, ms in median.items()
            if name not in (ours, floor)
        )
        rows.append(
            f"| {entry['name'].removeprefix('test_')} | {median[ours]:.3f} | {floor_cell} | {peers} |"
        )
    return rows
