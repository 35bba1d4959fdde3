from __future__ import annotations

import numpy as np
import pytest
from intervals import estimate, interval

pytest.importorskip("rliable")


@pytest.mark.isa_independent
def test_an_interval_is_the_same_in_every_run() -> None:
    scores = np.random.default_rng(0).normal(5.0, 1.0, (4, 6))
    first = estimate(scores, np.mean, task_bootstrap=True)
    assert estimate(scores, np.mean, task_bootstrap=True) == first
    assert first[0] == pytest.approx(scores.mean())
    assert first[1] < first[0] < first[2]
    assert interval(scores)["mean"] == pytest.approx(scores.mean())
