from __future__ import annotations

import functools

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from trajectories import assert_equal, assert_same_trajectory

pytest.importorskip("mujoco.batch", reason="vector physics needs mujoco 3.17 or later")

from ssm_fast.env_runner import (
    AntDirTask,
    CartPoleTask,
    HalfCheetahDirTask,
    HalfCheetahVelTask,
    MujocoVectorEnv,
    get_family,
)

pytestmark = pytest.mark.isa_independent

B = 3
NAMES = [
    "ssm_fast/HalfCheetahDir-v0",
    "ssm_fast/HalfCheetahVel-v0",
    "ssm_fast/HalfCheetahVel3-v0",
    "ssm_fast/AntDir-v0",
    "ssm_fast/HalfCheetahBody-v0",
    "ssm_fast/Walker2dBody-v0",
]
BODIES = {
    "ssm_fast/HalfCheetahBody-v0": "HalfCheetah-v5",
    "ssm_fast/Walker2dBody-v0": "Walker2d-v5",
}


def tasks_of(name):
    """Three tasks that differ as much as those of the family can."""
    family = get_family(name)
    tasks = [*family.test_tasks[:2], *family.out_of_range_tasks[:1], family.train_tasks[0]]
    return tuple(tasks[:B])


def one_by_one(name, tasks, **kwargs):
    return SyncVectorEnv(
        [functools.partial(gymnasium.make, name, task=task, **kwargs) for task in tasks],
        autoreset_mode=AutoresetMode.SAME_STEP,
    )


@pytest.mark.parametrize("name", NAMES)
def test_rows_equal_single_environments_of_their_tasks(name):
    env = MujocoVectorEnv(name, B, tasks=tasks_of(name), max_episode_steps=67, num_threads=2)
    reference = one_by_one(name, tasks_of(name), max_episode_steps=67)
    assert assert_same_trajectory(env, reference, 160) >= 2 * B


def test_arguments_of_the_robot_act_in_both():
    name = "ssm_fast/HalfCheetahVel-v0"
    kwargs = {"forward_reward_weight": 2.0, "ctrl_cost_weight": 0.3, "frame_skip": 2}
    env = MujocoVectorEnv(name, B, tasks=tasks_of(name), **kwargs)
    assert_same_trajectory(env, one_by_one(name, tasks_of(name), **kwargs), 30)
    task = HalfCheetahVelTask(1.3)
    env = MujocoVectorEnv(name, B, task=task)
    assert env.tasks == (task,) * B
    assert_same_trajectory(env, one_by_one(name, [task] * B), 30)


@pytest.mark.parametrize("vector", [False, True])
@pytest.mark.parametrize("name", NAMES[:4])
def test_rewards_follow_from_the_positions(name, vector):
    tasks = {
        "ssm_fast/HalfCheetahDir-v0": (HalfCheetahDirTask(1.0), HalfCheetahDirTask(-1.0)),
        "ssm_fast/AntDir-v0": (AntDirTask(180.0), AntDirTask(60.0)),
    }.get(name, (HalfCheetahVelTask(0.4), HalfCheetahVelTask(1.9)))
    env = MujocoVectorEnv(name, 2, tasks=tasks) if vector else one_by_one(name, tasks)
    env.reset(seed=0)
    x, y = positions(env, vector)
    rng = np.random.default_rng(0)
    for _ in range(199):
        actions = rng.uniform(-1, 1, env.action_space.shape).astype(np.float32)
        obs, rewards, terminated, truncated, _ = env.step(actions)
        assert not truncated.any()
        (x_before, y_before), (x, y) = (x, y), positions(env, vector)
        vx, vy = (x - x_before) / 0.05, (y - y_before) / 0.05
        square = (actions.astype(np.float64) ** 2).sum(axis=1)
        if name == "ssm_fast/HalfCheetahDir-v0":
            want = np.array([1.0, -1.0]) * vx - 0.05 * square
        elif name == "ssm_fast/AntDir-v0":
            forces = obs[:, 27:]  # bounded; those of the world are zero
            want = np.cos(np.pi * np.array([1, 1 / 3])) * vx + np.sin(np.pi / 3) * vy * [0, 1]
            want += 0.05 - 0.005 * square - 0.0005 * (forces**2).sum(axis=1)
        else:
            want = -np.abs(vx - [0.4, 1.9]) - 0.05 * square
        running = ~terminated
        np.testing.assert_allclose(rewards[running], want[running], rtol=0, atol=1e-6)
    _, _, terminated, truncated, _ = env.step(actions)
    if not terminated.any() and "HalfCheetah" in name:
        assert truncated.all()  # at step 200
    env.close()


def positions(env, vector):
    """Returns x and y `[2]` of the robots: the torso's, which trails `qpos` by a substep, of Ant."""
    if "Ant" in str(env.spec or env.envs[0].spec):
        if vector:
            xpos = env._batch.bind("xpos")[:, 1]
        else:
            xpos = np.array([e.unwrapped.data.xpos[1] for e in env.envs])
        return xpos[:, 0].copy(), xpos[:, 1].copy()
    if vector:
        qpos = env._batch.bind("qpos")
    else:
        qpos = np.array([e.unwrapped.data.qpos for e in env.envs])
    return qpos[:, 0].copy(), qpos[:, 1].copy()


@pytest.mark.parametrize("name", BODIES)
def test_default_body_is_gymnasiums(name):
    make = functools.partial(gymnasium.make, BODIES[name], max_episode_steps=200)
    env = SyncVectorEnv([make] * B, autoreset_mode=AutoresetMode.SAME_STEP)
    assert_same_trajectory(MujocoVectorEnv(name, B), env, 210)


@pytest.mark.parametrize("name", BODIES)
def test_bodies_get_their_factors(name):
    family = get_family(name)
    nominal = gymnasium.make(BODIES[name]).unwrapped.model
    env = gymnasium.make(name)
    for task in family.test_tasks[:3]:  # one after the other: factors do not pile up
        env.unwrapped.set_task(task)
        env.reset(seed=0)
        model, mass = env.unwrapped.model, np.array(task.mass)
        np.testing.assert_allclose(model.body_mass[1:], nominal.body_mass[1:] * mass)
        np.testing.assert_allclose(model.body_inertia[1:], nominal.body_inertia[1:] * mass[:, None])
        np.testing.assert_allclose(
            model.geom_friction[:, 0], nominal.geom_friction[:, 0] * task.friction
        )
        np.testing.assert_allclose(model.dof_damping[3:], nominal.dof_damping[3:] * task.damping)
        np.testing.assert_allclose(model.body_subtreemass[0], model.body_mass.sum())  # derived
        assert not model.dof_damping[:3].any()
    np.testing.assert_array_equal(
        nominal.body_mass, gymnasium.make(BODIES[name]).unwrapped.model.body_mass
    )


@pytest.mark.parametrize("name", BODIES)
def test_all_held_out_bodies_stay_finite(name):
    family = get_family(name)
    tasks = family.test_tasks + family.out_of_range_tasks
    env = MujocoVectorEnv(name, len(tasks), tasks=tasks)
    env.reset(seed=0)
    rng = np.random.default_rng(0)
    for _ in range(200):
        obs, rewards = env.step(rng.uniform(-1, 1, env.action_space.shape))[:2]
        assert np.isfinite(obs).all()
        assert np.abs(rewards).max() < 100
    env.close()


@pytest.mark.parametrize("name", NAMES)
def test_tasks_begin_at_the_next_reset_of_all_rows(name):
    family = get_family(name)
    first = (family.default_task,) * B
    second = tuple(next(t for t in family.sample(20, i) if t != first[0]) for i in range(B))
    kwargs = {"max_episode_steps": 9}
    env, reference = MujocoVectorEnv(name, B, **kwargs), one_by_one(name, first, **kwargs)
    assert env.family is family
    assert env.tasks == first
    for e in (env, reference):
        e.reset(seed=0)
    env.set_tasks(second)
    rng = np.random.default_rng(0)
    for _ in range(20):  # through two restarts
        actions = rng.uniform(-1, 1, env.action_space.shape).astype(np.float32)
        for got, want in zip(env.step(actions), reference.step(actions), strict=True):
            assert_equal(got, want)
    assert env.tasks == first
    with pytest.raises(RuntimeError, match="of all rows"):
        env.reset(options={"reset_mask": np.array([True, False, False])})
    assert_same_trajectory(env, one_by_one(name, second, **kwargs), 20)
    assert env.tasks == second
    reference.close()


def test_wrong_tasks():
    plain = MujocoVectorEnv("HalfCheetah-v5", 2)
    assert plain.family is None
    assert plain.tasks == ()
    with pytest.raises(ValueError, match="'HalfCheetah-v5' is no task family; expected one of"):
        plain.set_tasks([HalfCheetahDirTask(1.0)] * 2)
    with pytest.raises(ValueError, match=r"HalfCheetah-v5' has no vector physics.*take task"):
        MujocoVectorEnv("HalfCheetah-v5", task=HalfCheetahDirTask(1.0))
    env = MujocoVectorEnv("ssm_fast/HalfCheetahVel-v0", 2)
    with pytest.raises(ValueError, match="tasks must have 2 entries, got 3"):
        env.set_tasks([HalfCheetahVelTask(1.0)] * 3)
    with pytest.raises(TypeError, match="must be HalfCheetahVelTask, got CartPoleTask"):
        env.set_tasks([HalfCheetahVelTask(1.0), CartPoleTask()])
    body = MujocoVectorEnv("ssm_fast/Walker2dBody-v0", 2)
    with pytest.raises(ValueError, match="models of ssm_fast/Walker2dBody-v0 follow from its"):
        body.set_models([body.model] * 2)
    for e in (plain, env, body):
        e.close()
