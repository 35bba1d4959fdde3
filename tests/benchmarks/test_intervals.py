from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from intervals import estimate

pytestmark = pytest.mark.isa_independent


def test_an_interval_is_the_same_in_every_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def draws(
        scores: dict[str, Any], statistic: Callable[[Any], Any], reps: int, **options: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As rliable, from the global generator; the ends are the lowest and the highest draw."""
        values = [statistic(vars(np.random)["choice"](scores["all"][0], 6)) for _ in range(9)]
        return {"all": statistic(scores["all"])}, {"all": [min(values), max(values)]}

    rliable = ModuleType("rliable")
    rliable.__dict__["library"] = ModuleType("rliable.library")
    rliable.__dict__["library"].__dict__["get_interval_estimates"] = draws
    monkeypatch.setitem(sys.modules, "rliable", rliable)
    scores = np.random.default_rng(0).normal(5.0, 1.0, (1, 6))
    mean, low, high = estimate(scores, np.mean)
    assert estimate(scores, np.mean) == (mean, low, high)
    assert mean == pytest.approx(scores.mean())
    assert low < mean < high
