"""The interquartile mean of scores, with its stratified-bootstrap interval, by rliable."""

from __future__ import annotations

import warnings
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

REPETITIONS = 20_000


def check_rliable() -> None:
    """Ends the program where rliable is missing: hours of training should not come before that."""
    if find_spec("rliable") is None:
        raise SystemExit("rliable is missing: pip install '.[bench]'")


def interval(scores: NDArray[np.float64], task_bootstrap: bool = False) -> dict[str, float]:
    """Of `[seeds, tasks]`: the mean, and the interquartile mean with its 95 % interval.

    (Agarwal et al. 2021, arXiv 2108.13264.) `task_bootstrap` draws the tasks anew, too: they stand for
    others of their family.
    """
    from rliable import library, metrics

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of arch, about rliable's argument
        points, limits = library.get_interval_estimates(
            {"all": scores},
            lambda x: np.array([metrics.aggregate_iqm(x)]),
            task_bootstrap=task_bootstrap,
            reps=REPETITIONS,
            random_state=np.random.RandomState(0),
        )
    (low,), (high,) = limits["all"]
    return {
        "mean": float(scores.mean()),
        "iqm": float(points["all"][0]),
        "low": float(low),
        "high": float(high),
    }
