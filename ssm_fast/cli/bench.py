"""The command `bench`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ssm_fast.bench.cases import OPS, Case, make_cases
from ssm_fast.bench.peers import missing_peers
from ssm_fast.bench.report import Change, Result, compare, load, plot, save, table
from ssm_fast.bench.timing import machine, take_turns
from ssm_fast.checkpoint import write_atomic
from ssm_fast.checks import check_number
from ssm_fast.cli.messages import check_option, say
from ssm_fast.cli.options import MOST_THREADS, Bench
from ssm_fast.cli.settings import device_of
from ssm_fast.meta_rl.distributed import World

_ROUNDS, _LEAST_ROUNDS = 31, 3
_BUSY = 0.5  # of the processors


def run_bench(options: Bench) -> bool:
    """Measures, writes, and compares where it is asked for.

    Returns:
        Whether nothing has become slower.
    """
    check_number("--seconds", options.seconds, above=0.0)
    check_number("--tolerance", options.tolerance, at_least=0.0)
    device = device_of(options.device, World())
    if options.threads is not None:
        check_option("threads", options.threads, 1, MOST_THREADS)
        torch.set_num_threads(options.threads)
    target = options.out / "bench.json"
    if options.compare is not None and options.compare.resolve() == target.resolve():
        raise ValueError(f"--out would overwrite {options.compare}: give another folder")
    before = None if options.compare is None else load(options.compare)
    if before is not None and before[0].get("device") != options.device:
        raise ValueError(f"{options.compare} is of --device {before[0].get('device')}")
    found = machine(options.device)
    say(describe(found))
    load_average, processors = os.getloadavg()[0], os.cpu_count() or 1
    if load_average > _BUSY * processors:
        spared = max(processors - 1, 1)
        hint = (
            f"; --threads {spared} leaves them a core" if spared < torch.get_num_threads() else ""
        )
        warnings.warn(
            f"other programs are at work here (load {load_average:.1f}): what is measured beside "
            f"them is not what the machine can do{hint}",
            stacklevel=2,
        )
    for name in missing_peers():
        say(f"without the peer {name}: pip install {name}")
    results = _measure_all(options, device)
    _write(options.out, found, results)
    if before is None:
        return True
    return _say_changes(options, before, found, results)


def describe(found: dict[str, Any]) -> str:
    """A machine in one line."""
    return ", ".join(f"{name} {value}" for name, value in found.items() if value is not None)


def _measure_all(options: Bench, device: torch.device) -> list[Result]:
    ops = options.ops or OPS
    results: list[Result] = []
    for i, op in enumerate(ops):
        say(f"{op} ({i + 1} of {len(ops)})")
        for case in make_cases(op, device, torch.get_num_threads(), options.quick):
            results.append(_measure(case, options.seconds, device))
    return results


def _measure(case: Case, seconds: float, device: torch.device) -> Result:
    wait: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else _do_nothing
    with torch.set_grad_enabled(case.gradients):
        timing = take_turns(
            case.contenders,
            rounds=_ROUNDS,
            seconds=seconds,
            least_rounds=_LEAST_ROUNDS,
            calls=case.calls,
            wait=wait,
        )
    result = Result(case.name, case.ours, timing.milliseconds, timing.rounds)
    ours = result.milliseconds[result.ours]
    others = ", ".join(f"{name} {ms / ours:.1f}x" for name, ms in result.peers.items())
    say(f"  {case.name}: {ours:.3g} ms; {others}")
    return result


def _do_nothing() -> None:
    """There is nothing to wait for."""


def _write(folder: Path, found: dict[str, Any], results: list[Result]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["# `ssm-fast bench`", "", f"Medians on: {describe(found)}.", "", *table(results), ""]
    save(folder / "bench.json", found, results)
    text = "\n".join(lines)
    write_atomic(folder / "bench.md", lambda path: path.write_text(text, "utf-8"))
    plot(folder / "bench.png", describe(found), results)
    say(f"{folder / 'bench.json'}, bench.md and bench.png are written")


def _say_changes(
    options: Bench,
    before: tuple[dict[str, Any], list[Result]],
    found: dict[str, Any],
    results: list[Result],
) -> bool:
    changes = compare(before[1], results)
    if not changes:
        raise ValueError(f"{options.compare} has no contest of this run with a peer of it")
    differing = [name for name in found if found[name] != before[0].get(name)]
    if differing:
        say(
            f"{options.compare} differs in "
            + ", ".join(f"{name} ({before[0].get(name)}, now {found[name]})" for name in differing)
        )
    here = found["processor"] == before[0].get("processor") and found["gpu"] == before[0].get("gpu")
    slower = [change for change in changes if is_slower(change, options.tolerance, here)]
    say(
        f"{len(changes)} contests of {options.compare}: {len(slower)} slower by more than "
        f"{options.tolerance:.0%}"
    )
    for change in sorted(slower, key=lambda change: -change.factor):
        say(
            f"slower: {change.name}, {change.before:.3g} ms, now {change.now:.3g} ms while its "
            f"peers take {change.drift:.2f} times as long as then"
        )
    return not slower


def is_slower(change: Change, tolerance: float, same_machine: bool) -> bool:
    """Whether a contest is slower beside its peers, and, on the same machine, by the clock."""
    by_clock = change.now / change.before if same_machine else change.factor
    return min(change.factor, by_clock) > 1.0 + tolerance
