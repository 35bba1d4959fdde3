from __future__ import annotations

import functools

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from trajectories import assert_same_trajectory

from ssm_fast.env_runner import (
    AcrobotTask,
    AcrobotVectorEnv,
    CartPoleTask,
    Environment,
    get_family,
)

pytestmark = pytest.mark.isa_independent

NAME = "ssm_fast/AcrobotFamily-v0"
FAMILY = get_family(NAME)


def one_by_one(tasks, **kwargs):
    return SyncVectorEnv(
        [functools.partial(gymnasium.make, NAME, task=task, **kwargs) for task in tasks],
        autoreset_mode=AutoresetMode.SAME_STEP,
    )


@pytest.mark.parametrize("limit", [None, 13])
def test_rows_equal_single_environments_of_their_tasks(limit):
    tasks = [*FAMILY.test_tasks[:6], *FAMILY.out_of_range_tasks[:3], AcrobotTask()]
    kwargs = {} if limit is None else {"max_episode_steps": limit}
    env = AcrobotVectorEnv(NAME, 10, tasks=tasks, **kwargs)
    assert assert_same_trajectory(env, one_by_one(tasks, **kwargs), 400) >= 3


def test_default_task_is_gymnasiums_acrobot():
    own = SyncVectorEnv(
        [lambda: gymnasium.make("Acrobot-v1")] * 4, autoreset_mode=AutoresetMode.SAME_STEP
    )
    assert assert_same_trajectory(AcrobotVectorEnv(NAME, 4), own, 520) >= 4


def test_fast_links_are_wrapped_and_bounded_as_gymnasiums():
    tasks = FAMILY.test_tasks[:4]
    env, reference = AcrobotVectorEnv(NAME, 4, tasks=tasks), one_by_one(tasks)
    for e in (env, reference):
        e.reset(seed=0)
    fast = np.array([[3.1, -3.1, 12.5, 28.2], [-3.1, 3.1, -12.5, -28.2]] * 2)  # [4, 4]
    env._state = fast.T.copy()
    for single, state in zip(reference.envs, fast, strict=True):
        single.unwrapped.state = state.copy()
    bounded = 0
    for _ in range(20):
        got, want = (e.step(np.array([2, 0, 2, 0])) for e in (env, reference))
        np.testing.assert_allclose(got[0], want[0], atol=1e-5)
        bounded += int((np.abs(got[0][:, 4:]) >= [4 * np.pi - 1e-5, 9 * np.pi - 1e-5]).any())
    assert bounded > 0


def returns(tasks):
    """Of an episode each, with the torque against the upper link's velocity."""
    env = Environment(NAME, len(tasks), tasks=tasks)
    assert env.physics == "vector"
    obs, _ = env.reset(seed=0)
    total, alive = np.zeros(len(tasks)), np.ones(len(tasks), dtype=bool)
    for _ in range(500):
        obs, rewards, terminated, truncated, _ = env.step(np.where(obs[:, 4] < 0, 2, 0))
        total += rewards * alive
        alive &= ~(terminated | truncated)
    return total


def test_pumping_solves_nearly_all_tasks():
    for tasks in (FAMILY.train_tasks, FAMILY.test_tasks, FAMILY.out_of_range_tasks):
        found = returns(tasks)
        assert (found == -500).mean() <= 0.01
        assert -120 < found.mean() < -80
        assert found.std() > 50, "tasks differ"


def test_ranges():
    tasks = FAMILY.sample(3000, 0)
    for field, (low, high) in FAMILY.ranges.items():
        values = np.array([getattr(task, field) for task in tasks])
        assert low <= values.min() < 1.02 * low
        assert 0.98 * high < values.max() <= high * (1 + 1e-12)
        np.testing.assert_allclose(np.log(values).mean(), np.log(low * high) / 2, atol=0.05)
    low, high = np.array(list(FAMILY.ranges.values())).T
    for task in FAMILY.out_of_range_tasks:
        x = np.array([getattr(task, field) for field in FAMILY.ranges])
        assert ((x < low) | (x > high)).sum() == 1
        assert ((x > low / 1.3) & (x < high * 1.3)).all()


@pytest.mark.parametrize(
    ("name", "kwargs", "reason"),
    [
        (NAME, {"task": AcrobotTask(), "max_episode_steps": 3}, None),
        (NAME, {"render_mode": "rgb_array"}, "does not take render_mode"),
        ("Acrobot-v1", {}, "no family of Acrobots"),
        ("NoSuchEnv-v0", {}, "not registered"),
    ],
)
def test_unsupported_says_why(name, kwargs, reason):
    why = AcrobotVectorEnv.unsupported(name, **kwargs)
    assert why is None if reason is None else reason in why


def test_mistakes():
    env = AcrobotVectorEnv(NAME, 2)
    assert repr(env) == "AcrobotVectorEnv('ssm_fast/AcrobotFamily-v0', num_envs=2)"
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"actions must lie in \[0, 3\), got \[0, 3\]"):
        env.step(np.array([0, 3]))
    with pytest.raises(ValueError, match=r"actions must have shape \[B\] = \[2\], got \[3\]"):
        env.step(np.array([0, 1, 1]))
    with pytest.raises(TypeError, match="actions must be integers, got float64"):
        env.step(np.array([0.0, 1.0]))
    for bad in (0.0, 1e20, float("nan")):
        with pytest.raises(ValueError, match="torque must be finite"):
            AcrobotTask(torque=bad)
    with pytest.raises(TypeError, match="must be AcrobotTask, got CartPoleTask"):
        env.set_tasks([CartPoleTask()] * 2)
    with pytest.raises(ValueError, match="'CartPole-v1' has no vector physics: it is no family"):
        AcrobotVectorEnv("CartPole-v1")
    with Environment(NAME, render_mode="rgb_array") as drawn:
        drawn.reset(seed=0)
        assert drawn.physics == "gymnasium"
        assert drawn.render()[0].shape == (500, 500, 3)
