"""What the contests came to: table, plot, and what has become slower since another run."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssm_fast.checkpoint import write_atomic

_VERSION = 1
_LIMIT = 1 << 24  # bytes of a saved run


@dataclass(frozen=True)
class Result:
    """A contest.

    Attributes:
        name: That of its `Case`.
        ours: Name of our contender.
        milliseconds: Median of each contender.
        rounds: Of the contest.
    """

    name: str
    ours: str
    milliseconds: dict[str, float]
    rounds: int

    @property
    def peers(self) -> dict[str, float]:
        """The others' medians."""
        return {name: ms for name, ms in self.milliseconds.items() if name != self.ours}


@dataclass(frozen=True)
class Change:
    """How a contest went beside that of another run.

    Attributes:
        name: Of the contest.
        before: Milliseconds of ours, in the other run.
        now: In this one.
        drift: How many times as long its peers take now, which did not change: the machine.
    """

    name: str
    before: float
    now: float
    drift: float

    @property
    def factor(self) -> float:
        """How many times as long ours takes, the machine left out."""
        return self.now / self.before / self.drift


def save(path: Path, machine: dict[str, Any], results: list[Result]) -> None:
    """Writes a run as JSON."""
    contests = [vars(result) for result in results]
    text = json.dumps({"version": _VERSION, "machine": machine, "contests": contests}, indent=2)
    write_atomic(path, lambda unfinished: unfinished.write_text(text + "\n"))


def load(path: Path) -> tuple[dict[str, Any], list[Result]]:
    """Reads what `save` wrote: the machine and the contests.

    Raises:
        ValueError: It is something else.
        OSError: It cannot be read.
    """
    try:
        if path.stat().st_size > _LIMIT:
            raise ValueError(f"larger than {_LIMIT} bytes")
        content = json.loads(path.read_text("utf-8"))
        if content["version"] != _VERSION:
            raise ValueError(f"version {content['version']!r}, not {_VERSION}")
        results = [
            Result(
                str(entry["name"]),
                str(entry["ours"]),
                {str(name): _positive(ms) for name, ms in entry["milliseconds"].items()},
                int(entry["rounds"]),
            )
            for entry in content["contests"]
        ]
        if any(result.ours not in result.milliseconds for result in results):
            raise ValueError("a contest without its own contender")
        return dict(content["machine"]), results
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no saved run of `ssm-fast bench`: {error!r}") from error


def _positive(x: Any) -> float:
    if not isinstance(x, (int, float)) or not 0.0 < x < float("inf"):
        raise ValueError(f"{x!r} are no milliseconds")
    return float(x)


def compare(before: list[Result], now: list[Result]) -> list[Change]:
    """The contests that both runs have, with a peer in common: it tells how the machine does."""
    old = {result.name: result for result in before}
    changes = []
    for result in now:
        other = old.get(result.name)
        if other is None:
            continue
        common = result.peers.keys() & other.peers.keys()
        if not common:
            continue
        drift = statistics.median(result.peers[name] / other.peers[name] for name in common)
        changes.append(
            Change(
                result.name, other.milliseconds[other.ours], result.milliseconds[result.ours], drift
            )
        )
    return changes


def table(results: list[Result]) -> list[str]:
    """The contests in Markdown."""
    lines = ["| contest | ours, ms | others, ms (times ours) |", "|---|---|---|"]
    for result in results:
        ours = result.milliseconds[result.ours]
        others = ", ".join(
            f"{name} {ms:.3g} ({ms / ours:.1f}x)" for name, ms in result.peers.items()
        )
        lines.append(f"| {result.name} | {ours:.3g} | {others} |")
    return lines


def plot(path: Path, title: str, results: list[Result]) -> None:
    """Draws how many times as long the others take."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 1.2 + 0.28 * len(results)), layout="constrained")
    axes = figure.subplots()
    names = sorted({name for result in results for name in result.peers})
    rows = range(len(results))
    for i, name in enumerate(names):
        points = [
            (ms / result.milliseconds[result.ours], row)
            for row, result in zip(rows, results, strict=True)
            for found, ms in result.peers.items()
            if found == name
        ]
        axes.plot(*zip(*points, strict=True), "os^vDP*X"[i % 8], color=f"C{i % 10}", label=name)
    axes.axvline(1.0, color="black", linewidth=1.0)
    axes.set_yticks(rows, [result.name for result in results])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("time of the others, times ours (right of the line ours is faster)")
    axes.set_title(title, fontsize="small")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    write_atomic(path, lambda unfinished: figure.savefig(unfinished, format="png", dpi=110))
