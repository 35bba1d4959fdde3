from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

benchmark: Any = importlib.import_module("adaptation_benchmark")

pytestmark = pytest.mark.isa_independent


def test_resumes_with_other_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    played = []

    def by(name: str) -> Any:
        def adapter(model: Any, env: Any, seed: int) -> tuple[Any, dict[str, Any]]:
            played.append((name, seed))
            return model, {"episode_returns": [[1.0, 3.0]]}

        return adapter

    monkeypatch.setattr(benchmark, "ADAPTERS", {"one": by("one"), "two": by("two")})
    monkeypatch.setattr(benchmark, "HORIZON", 2)
    policy, out = tmp_path / "policy.safetensors", tmp_path / "result.json"
    torch.manual_seed(0)
    benchmark.ImprovedSSM(17, 6, 2, 4, 1).save(policy)

    benchmark.run(policy, [1], [0], 1, ["one"], out)
    first = json.loads(out.read_text())[0]
    benchmark.run(policy, [1], [0], 1, ["one", "two"], out)
    assert played == [("one", 10_000), ("two", 10_000)]
    (result,) = json.loads(out.read_text())
    assert set(result["returns"]) == {"sampled", "deterministic", "one", "two"}
    assert result["returns"]["sampled"] == first["returns"]["sampled"]
    benchmark.run(policy, [1], [0], 2, ["one"], out)
    assert played[2:] == [("one", 10_000)]

    monkeypatch.setattr(benchmark, "_improvement", lambda differences: "0")  # without rliable
    results = json.loads(out.read_text())
    results[1]["task"] = 57  # more tasks than a family has today
    out.write_text(json.dumps(results))
    benchmark.report(out)
    text = capsys.readouterr().out
    assert "1 rows, 2 tasks, 1 seeds" in text
    assert "not of every task yet, and left out: two" in text
    assert "| one | 2 | 3 |" in text
