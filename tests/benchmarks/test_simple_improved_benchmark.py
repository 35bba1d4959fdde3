from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

benchmark: Any = importlib.import_module("simple_improved_benchmark")

pytestmark = pytest.mark.isa_independent


def test_runs_compares_and_films(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {"mean": 1.0, "iqm": 2.0, "low": 0.5, "high": 3.0}
    monkeypatch.setattr(benchmark, "interval", lambda scores: found)  # without rliable
    monkeypatch.setattr(benchmark, "check_rliable", lambda: None)
    options = benchmark.Options(
        env="CartPole-v1",
        steps=2048,
        seeds=2,
        policies=("ssm", "mlp"),
        out=tmp_path / "results",
        models=tmp_path / "models",
        videos=True,
    )
    benchmark.main(options)
    runs = sorted(path.name for path in options.out.glob("*.json"))
    assert runs == [f"CartPole-v1-2048-{p}-seed{s}.json" for p in ("mlp", "ssm") for s in (0, 1)]
    run = json.loads((options.out / runs[-1]).read_text())
    assert len(run["returns"]) == benchmark.EVALUATION_EPISODES
    assert run["seed"] == 1
    table = (options.out / "CartPole-v1-2048.md").read_text()
    assert "| SSM | 2 | 0 to 3 | 1 |" in table
    assert "| MLP | 2 |" in table
    films = sorted(path.name for path in options.models.glob("*.mp4"))
    assert films == ["CartPole-v1-2048-ssm-seed0.mp4", "CartPole-v1-2048-ssm-seed1.mp4"]
    strip = benchmark.plt.imread(options.out / "CartPole-v1-2048-strip.png")
    height, width, _ = strip.shape
    assert width >= 2 * height

    capsys.readouterr()
    benchmark.main(options)  # nothing runs again
    assert "seed0.json:" not in capsys.readouterr().out


def test_without_rliable_it_ends_before_it_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("intervals.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="rliable is missing"):
        benchmark.main(benchmark.Options(out=tmp_path / "results"))
    assert not (tmp_path / "results").exists()
