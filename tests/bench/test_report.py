"""What is said of saved contests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ssm_fast.bench.report import Change, Result, compare, load, plot, save, table
from ssm_fast.cli.bench import is_slower

pytestmark = pytest.mark.isa_independent

MACHINE = {"processor": "any", "gpu": None}


def result(ours: float, name: str = "gae B8", **peers: float) -> Result:
    return Result(name, "gae", {"gae": ours, **peers}, 7)


def test_a_saved_run_is_read_as_it_was(tmp_path: Path) -> None:
    results = [result(1.0, loop=3.0), result(2.0, "gae B64")]
    save(tmp_path / "bench.json", MACHINE, results)
    assert load(tmp_path / "bench.json") == (MACHINE, results)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"machine": None},
        {"contests": None},
        {"contests": [{"name": "x"}]},
        {"contests": [{"name": "x", "ours": "a", "milliseconds": {"b": 1.0}, "rounds": 1}]},
        {"contests": [{"name": "x", "ours": "a", "milliseconds": {"a": 0.0}, "rounds": 1}]},
        {"contests": [{"name": "x", "ours": "a", "milliseconds": {"a": "1"}, "rounds": 1}]},
    ],
)
def test_something_else_is_refused(change: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    save(path, MACHINE, [result(1.0)])
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=r"bench\.json is no saved run of `ssm-fast bench`"):
        load(path)
    path.write_text("not JSON")
    with pytest.raises(ValueError, match="no saved run"):
        load(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="no saved run"):
        load(path)


def test_a_change_is_measured_beside_the_peers() -> None:
    before = [result(1.0, a=10.0, b=20.0, c=30.0), result(1.0, "gae B1")]
    now = [result(3.0, a=20.0, b=40.0, d=1.0), result(1.0, "gae B2")]
    (change,) = compare(before, now)
    assert change == Change("gae B8", 1.0, 3.0, 2.0)
    assert change.factor == 1.5
    assert compare([result(1.0)], [result(3.0, a=1.0)]) == []


@pytest.mark.parametrize(
    ("before", "now", "drift", "same_machine", "slower"),
    [
        (1.0, 1.3, 1.0, True, True),
        (1.0, 1.2, 1.0, True, False),
        (1.0, 3.0, 3.0, True, False),  # the machine is busy
        (1.0, 1.0, 0.5, True, False),  # it was busy
        (1.0, 1.0, 0.5, False, True),  # a faster machine, no use made of it
        (1.0, 3.0, 2.0, True, True),
    ],
)
def test_slower(before: float, now: float, drift: float, same_machine: bool, slower: bool) -> None:
    assert is_slower(Change("gae", before, now, drift), 0.25, same_machine) is slower


def test_table_and_plot(tmp_path: Path) -> None:
    results = [result(1.0, loop=3.0, TorchRL=12.5), result(2.0, "gae B64")]
    assert table(results)[2:] == [
        "| gae B8 | 1 | loop 3 (3.0x), TorchRL 12.5 (12.5x) |",
        "| gae B64 | 2 |  |",
    ]
    plot(tmp_path / "bench.png", "title", results)
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
