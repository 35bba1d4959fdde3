"""Means of scores with their stratified-bootstrap intervals, by rliable (Agarwal et al. 2021, arXiv 2108.13264)."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

REPETITIONS = 20_000


def check_rliable() -> None:
    """Ends the program where rliable is missing: hours of training should not come before that."""
    if find_spec("rliable") is None:
        raise SystemExit("rliable is missing: pip install '.[bench]'")


def interval(scores: NDArray[np.float64], task_bootstrap: bool = False) -> dict[str, float]:
    """Of `[seeds, tasks]`: the mean, and the interquartile mean with its 95 % interval.

    `task_bootstrap` draws the tasks anew, too: they stand for others of their family.
    """
    from rliable import metrics

    iqm, low, high = estimate(scores, metrics.aggregate_iqm, task_bootstrap)
    return {"mean": float(scores.mean()), "iqm": iqm, "low": low, "high": high}


def estimate(
    scores: NDArray[np.float64],
    statistic: Callable[[NDArray[np.float64]], Any],
    task_bootstrap: bool = False,
) -> tuple[float, float, float]:
    """A statistic of `[seeds, tasks]`, and the lower and the upper end of its 95 % interval."""
    from rliable import library

    # rliable draws from NumPy's global generator, whatever `random_state` it is given.
    with patch.object(np.random, "choice", np.random.RandomState(0).choice):
        points, limits = library.get_interval_estimates(
            {"all": scores},
            lambda x: np.array([statistic(x)]),
            task_bootstrap=task_bootstrap,
            reps=REPETITIONS,
        )
    (low,), (high,) = limits["all"]
    return float(points["all"][0]), float(low), float(high)
