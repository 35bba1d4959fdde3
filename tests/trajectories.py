"""Comparison of vector environments, step by step."""

from __future__ import annotations

import numpy as np
from gymnasium import spaces


def assert_equal(got, want, path=""):
    """Structure, dtypes and masks are the same, numbers to 1e-9."""
    if isinstance(want, dict):
        assert got.keys() == want.keys(), path
        for key in want:
            assert_equal(got[key], want[key], f"{path}/{key}")
    elif want.dtype == object:
        for i in range(len(want)):
            assert (got[i] is None) == (want[i] is None), path
            if want[i] is not None:
                assert_equal(got[i], want[i], f"{path}[{i}]")
    else:
        assert got.dtype == want.dtype, path
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-9, err_msg=path)


def assert_same_trajectory(env, reference, steps, scale=1.0, seed=7):
    """Returns the number of episodes that ended."""
    rng = np.random.default_rng(0)
    assert_equal(*(e.reset(seed=seed)[0] for e in (env, reference)), "reset")
    ends = 0
    for t in range(steps):
        if isinstance(env.action_space, spaces.Box):
            low, high = env.action_space.low, env.action_space.high
            actions = (scale * rng.uniform(low, high)).astype(np.float32)
        else:
            actions = rng.integers(env.action_space.nvec)
        step, want = env.step(actions), reference.step(actions)
        for k, name in enumerate(["obs", "rewards", "terminated", "truncated", "info"]):
            assert_equal(step[k], want[k], f"step {t}: {name}")
        ends += int((want[2] | want[3]).sum())
    env.close()
    reference.close()
    return ends
