"""End-to-end PPO steps per second on HalfCheetah-v5 beside SB3 PPO and sb3-contrib RecurrentPPO.

The settings of all: 8 environments x 256 steps, 10 epochs. Minibatches hold 256 steps, as users of
RecurrentPPO choose them (64 for the feed-forward PPO, its default). The policy has the size of the peers', one
layer of 64; the library's default of two layers of 128 stands beside it. One iteration before the clock starts leaves
what happens once (first statistics, allocations) out for all.
"""

from __future__ import annotations

import statistics

import pytest
from ppo_runs import ITERATION, OURS, RUNS, seconds_of, ssm_fast_seconds

ITERATIONS, ROUNDS = 4, 3

pytestmark = pytest.mark.filterwarnings("ignore")  # of MuJoCo's, in this process


def test_ppo_steps_per_second(benchmark):
    pytest.importorskip("sb3_contrib", reason="peer: sb3-contrib")
    seconds: dict[str, list[float]] = {name: [] for name in RUNS}
    for _ in range(ROUNDS):  # alternating: what the machine does beside this falls on all of them
        for name, found in seconds.items():
            found.append(seconds_of(name, ITERATIONS))
    steps = ITERATIONS * ITERATION
    per_step = {name: statistics.median(s) * 1e3 / steps for name, s in seconds.items()}
    ours = per_step[OURS]
    benchmark.extra_info |= {
        "ours": OURS,
        "floor": None,
        "median_ms": per_step,
        "over_ours": {name: ms / ours for name, ms in per_step.items()},
        "steps_per_second": {name: 1e3 / ms for name, ms in per_step.items()},
        "rounds": ROUNDS,
    }
    benchmark.pedantic(lambda: ssm_fast_seconds(OURS, 1), rounds=1, iterations=1)
