from __future__ import annotations

import functools

import gymnasium
import numpy as np
import pytest
from cartpole_feedback import Feedback, gain, returns
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from trajectories import assert_equal, assert_same_trajectory

from ssm_fast.env_runner import (
    CartPoleTask,
    CartPoleVectorEnv,
    HalfCheetahVelTask,
    get_family,
)

pytestmark = pytest.mark.isa_independent

NAME = "ssm_fast/CartPoleFamily-v0"
FAMILY = get_family(NAME)


def one_by_one(name, tasks, **kwargs):
    return SyncVectorEnv(
        [functools.partial(gymnasium.make, name, task=task, **kwargs) for task in tasks],
        autoreset_mode=AutoresetMode.SAME_STEP,
    )


@pytest.mark.parametrize("limit", [None, 13])
def test_rows_equal_single_environments_of_their_tasks(limit):
    tasks = [*FAMILY.test_tasks[:6], *FAMILY.out_of_range_tasks[:3], CartPoleTask()]
    kwargs = {} if limit is None else {"max_episode_steps": limit}
    env = CartPoleVectorEnv(NAME, 10, tasks=tasks, **kwargs)
    assert assert_same_trajectory(env, one_by_one(NAME, tasks, **kwargs), 400) > 40


def test_default_task_is_gymnasiums_cartpole():
    own = SyncVectorEnv(
        [lambda: gymnasium.make("CartPole-v1")] * 4, autoreset_mode=AutoresetMode.SAME_STEP
    )
    assert assert_same_trajectory(CartPoleVectorEnv(NAME, 4), own, 300) > 20


@pytest.mark.parametrize("name", [NAME, "ssm_fast/CartPoleUnsignedFamily-v0"])
def test_the_policy_of_the_mean_task_fails_where_that_of_the_task_does_not(name):
    family = get_family(name)
    share = {NAME: 0.5, "ssm_fast/CartPoleUnsignedFamily-v0": 0.2}[name]
    for tasks in (family.train_tasks, family.test_tasks, family.out_of_range_tasks):
        own = returns(name, tasks, Feedback(np.array([gain(task) for task in tasks])))
        assert (own >= 475).mean() >= 0.95
        if tasks != family.out_of_range_tasks:
            gains = np.tile(gain(CartPoleTask()), (len(tasks), 1))
            mean = returns(name, tasks, Feedback(gains))
            assert (mean < 475).mean() >= share
            assert mean.mean() < 420


def test_ranges():
    for name in (NAME, "ssm_fast/CartPoleUnsignedFamily-v0"):
        family = get_family(name)
        tasks = family.sample(3000, 0)
        for field, (low, high) in {
            "length": (0.15, 2.5),
            "masscart": (0.3, 3.0),
            "masspole": (0.05, 1.0),
            "force_mag": (4.0, 20.0),
            "gravity": (4.0, 20.0),
        }.items():
            values = np.abs([getattr(task, field) for task in tasks])
            assert low <= values.min() < 1.02 * low
            assert 0.98 * high < values.max() <= high * (1 + 1e-12)
            np.testing.assert_allclose(np.log(values).mean(), np.log(low * high) / 2, atol=0.05)
        for drawn in (tasks, family.train_tasks, family.test_tasks, family.out_of_range_tasks):
            reversed_motors = np.mean([task.force_mag < 0 for task in drawn])
            np.testing.assert_allclose(
                reversed_motors, 0.5 if name == NAME else 0.0, atol=0.03 if drawn == tasks else 0
            )
        for task in family.out_of_range_tasks:
            x = [task.length, task.masscart, task.masspole, abs(task.force_mag), task.gravity]
            low = np.array([0.15, 0.3, 0.05, 4.0, 4.0])
            high = np.array([2.5, 3.0, 1.0, 20.0, 20.0])
            assert ((x < low) | (x > high)).sum() == 1
            assert ((x > low / 1.5) & (x < high * 1.5)).all()


def test_the_observation_stays_in_its_space():
    """A short pole on a light cart is far beyond Gymnasium's bounds when its fall is noticed."""
    tasks = [CartPoleTask(0.15, 0.3, 0.05, force, 4.0) for force in (20.0, -20.0)]
    env = CartPoleVectorEnv(NAME, 2, tasks=tasks)
    env.reset(seed=0)
    furthest = 0.0
    rng = np.random.default_rng(0)
    for _ in range(300):
        info = env.step(rng.integers(0, 2, 2))[-1]
        for obs in info.get("final_obs", ()):
            if obs is not None:
                assert obs in env.single_observation_space
                furthest = max(furthest, abs(obs[2]))
    assert furthest > 24 / 180 * np.pi


def test_tasks_begin_at_the_next_reset_of_all_rows():
    first, second = FAMILY.train_tasks[:3], FAMILY.train_tasks[3:6]
    env, reference = CartPoleVectorEnv(NAME, 3, tasks=first), one_by_one(NAME, first)
    assert env.tasks == first
    for e in (env, reference):
        e.reset(seed=0)
    env.set_tasks(second)
    assert env.tasks == first
    ends = 0
    rng = np.random.default_rng(0)
    for _ in range(120):
        actions = rng.integers(0, 2, 3)
        got, want = env.step(actions), reference.step(actions)
        for a, b in zip(got, want, strict=True):
            assert_equal(a, b)
        ends += want[2].sum()
    assert ends > 3
    with pytest.raises(RuntimeError, match="of all rows"):
        env.reset(options={"reset_mask": np.array([True, False, False])})
    env.reset(seed=0)
    env.reset(options={"reset_mask": np.array([True, False, False])})
    assert_same_trajectory(env, one_by_one(NAME, second), 100)
    assert env.tasks == second


def test_close_and_names():
    env = CartPoleVectorEnv(NAME, 2)
    assert repr(env) == "CartPoleVectorEnv('ssm_fast/CartPoleFamily-v0', num_envs=2)"
    assert env.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    assert env.action_space.shape == (2,)
    env.close()
    with pytest.raises(RuntimeError, match="is closed"):
        env.reset()


@pytest.mark.parametrize(
    ("name", "kwargs", "reason"),
    [
        (NAME, {"task": CartPoleTask(), "max_episode_steps": 3}, None),
        (NAME, {"render_mode": "rgb_array"}, "does not take render_mode"),
        ("CartPole-v1", {}, "no family of CartPoles"),
        ("NoSuchEnv-v0", {}, "not registered"),
    ],
)
def test_unsupported_says_why(name, kwargs, reason):
    got = CartPoleVectorEnv.unsupported(name, **kwargs)
    assert got is None if reason is None else reason in got
    if name != NAME:
        with pytest.raises(ValueError, match=f"'{name}' has no vector physics: .*{reason}"):
            CartPoleVectorEnv(name)


def test_wrong_arguments_and_calls():
    with pytest.raises(ValueError, match="num_envs must be at least 1, got 0"):
        CartPoleVectorEnv(NAME, 0)
    with pytest.raises(ValueError, match="tasks must have 2 entries, got 1"):
        CartPoleVectorEnv(NAME, 2, tasks=[CartPoleTask()])
    env = CartPoleVectorEnv(NAME, 2)
    with pytest.raises(RuntimeError, match="call reset"):
        env.step(np.zeros(2, dtype=int))
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"actions must have shape \[B\] = \[2\], got \[3\]"):
        env.step(np.zeros(3, dtype=int))
    with pytest.raises(ValueError, match=r"actions must lie in \[0, 2\), got \[0, 2\]"):
        env.step(np.array([0, 2]))
    with pytest.raises(TypeError, match="actions must be integers, got float64"):
        env.step(np.zeros(2))
    with pytest.raises(TypeError, match="must be CartPoleTask, got HalfCheetahVelTask"):
        env.set_tasks([CartPoleTask(), HalfCheetahVelTask(1.0)])
    with pytest.raises(TypeError, match="tasks must be a sequence of tasks"):
        env.set_tasks(CartPoleTask())
