from __future__ import annotations

import copy
import pickle
import threading
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

pytest.importorskip("mujoco.batch", reason="vector physics needs mujoco 3.17 or later")

from trajectories import assert_equal, assert_same_trajectory

from ssm_fast.env_runner import Environment, vector_physics
from ssm_fast.env_runner.cartpole_family import CartPoleVectorEnv
from ssm_fast.env_runner.vector_physics import MujocoVectorEnv, unsupported

pytestmark = pytest.mark.isa_independent

B = 3
TASKS = ["HalfCheetah-v5", "Hopper-v5", "Walker2d-v5", "Swimmer-v5", "Ant-v5", "Humanoid-v5"]
TASKS += [f"ssm_fast/{name}Positions-v0" for name in ("HalfCheetah", "Hopper", "Walker2d")]


def gymnasiums_own(name, **kwargs):
    return SyncVectorEnv(
        [lambda: gymnasium.make(name, **kwargs)] * B, autoreset_mode=AutoresetMode.SAME_STEP
    )


@pytest.mark.parametrize("name", TASKS)
def test_trajectories_equal_gymnasium(name):
    # 77 steps: falls and time limits, in the same and in different steps
    env = MujocoVectorEnv(name, B, num_threads=2, max_episode_steps=77)
    ends = assert_same_trajectory(env, gymnasiums_own(name, max_episode_steps=77), 200)
    assert ends >= 2 * B


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        (
            "HalfCheetah-v5",
            {"forward_reward_weight": 2.0, "ctrl_cost_weight": 0.3, "frame_skip": 2},
        ),
        ("HalfCheetah-v5", {"exclude_current_positions_from_observation": False}),
        ("Swimmer-v5", {"exclude_current_positions_from_observation": False}),
        ("Hopper-v5", {"healthy_angle_range": (-0.05, 0.1), "reset_noise_scale": 0.02}),
        ("Hopper-v5", {"healthy_state_range": (-2.0, 3.0)}),
        ("Walker2d-v5", {"terminate_when_unhealthy": False, "healthy_reward": 0.5}),
        ("Walker2d-v5", {"healthy_z_range": (1.2, 1.3)}),
        ("Ant-v5", {"include_cfrc_ext_in_observation": False, "contact_force_range": (-0.1, 0.2)}),
        ("Ant-v5", {"contact_force_range": (0.05, 0.2)}),
        ("Ant-v5", {"main_body": "front_left_leg", "healthy_z_range": (0.5, 0.8)}),
        ("Humanoid-v5", {"contact_cost_weight": 1e-2, "contact_cost_range": (0.1, 0.5)}),
        (
            "Humanoid-v5",
            {"include_cvel_in_observation": False, "include_cfrc_ext_in_observation": False},
        ),
    ],
)
def test_arguments_of_the_task_mean_what_they_mean_to_gymnasium(name, kwargs):
    env = MujocoVectorEnv(name, B, max_episode_steps=40, **kwargs)
    assert_same_trajectory(env, gymnasiums_own(name, max_episode_steps=40, **kwargs), 60)


def test_large_actions_act_as_in_gymnasium():
    """The simulation clamps them; the control cost does not."""
    env = MujocoVectorEnv("HalfCheetah-v5", B)
    assert_same_trajectory(env, gymnasiums_own("HalfCheetah-v5"), 30, scale=3.0)


@pytest.mark.parametrize("name", ["HalfCheetah-v5", "Swimmer-v5"])
def test_the_registered_time_limit_truncates(name):
    env = MujocoVectorEnv(name, B)
    assert assert_same_trajectory(env, gymnasiums_own(name), 1001, scale=0.3) == B


@pytest.mark.parametrize("name", ["HalfCheetah-v5", "Ant-v5"])
def test_the_number_of_threads_does_not_change_a_bit(name):
    def run(num_threads):
        env = MujocoVectorEnv(name, 5, num_threads=num_threads, max_episode_steps=20)
        rng = np.random.default_rng(3)
        steps = [(env.reset(seed=1)[0],)]
        for _ in range(50):
            steps.append(env.step(rng.uniform(-1, 1, env.action_space.shape))[:4])
        env.close()
        return [array for step in steps for array in step]

    want = run(1)
    for num_threads in (2, 4):
        for got, expected in zip(run(num_threads), want, strict=True):
            np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("name", TASKS)
def test_rows_with_models_of_their_own(name):
    def change(model, i):
        model.body_mass[:] *= 1 + 0.3 * i
        model.geom_friction[:] *= 1 + 0.5 * i
        model.actuator_gear[:] *= 1 - 0.2 * i
        model.opt.timestep *= 1 + 0.1 * i

    env = MujocoVectorEnv(name, B, max_episode_steps=30)
    same = env.reset(seed=7)[0], env.step(np.zeros(env.action_space.shape))[0]
    models = [copy.copy(env.model) for _ in range(B)]
    reference = gymnasiums_own(name, max_episode_steps=30)
    for i in range(B):
        change(models[i], i)
        change(reference.envs[i].unwrapped.model, i)
    env.set_models(models)
    with pytest.raises(RuntimeError, match="reset"):
        env.step(np.zeros(env.action_space.shape))
    other = env.reset(seed=7)[0], env.step(np.zeros(env.action_space.shape))[0]
    np.testing.assert_array_equal(other[1][0], same[1][0])
    assert not np.array_equal(other[1][1], same[1][1])
    env.close()

    env = MujocoVectorEnv(name, B, models=models, max_episode_steps=30)
    assert_same_trajectory(env, reference, 45)


def test_models_that_do_not_fit_are_refused():
    hopper = MujocoVectorEnv("Hopper-v5")
    env = MujocoVectorEnv("HalfCheetah-v5", 2)
    with pytest.raises(ValueError, match="models must have 2 entries, got 1"):
        env.set_models([env.model])
    with pytest.raises(ValueError, match="models must have the sizes of `model`"):
        env.set_models([env.model, hopper.model])
    env.close()
    hopper.close()


@pytest.mark.parametrize("name", ["Hopper-v5", "Humanoid-v5"])
def test_resets_draw_from_the_generators_as_gymnasium_does(name):
    env, reference = MujocoVectorEnv(name, B), gymnasiums_own(name)
    mask = np.array([True, False, True])
    for options in (
        {"seed": 3},
        {"seed": [9, 2, 5]},
        {},
        {"seed": [None, 4, None]},
        {"options": {"reset_mask": mask}},
        {"seed": 11, "options": {"reset_mask": ~mask}},
        {},
    ):
        for e in (env, reference):
            e.step(np.zeros(env.action_space.shape)) if options != {"seed": 3} else None
        # Gymnasium takes the mask out of the dict that it is given
        (obs, info), (want, want_info) = (
            e.reset(**copy.deepcopy(options)) for e in (env, reference)
        )
        assert_equal(obs, want)
        assert_equal(info, want_info)
    env.close()
    reference.close()


def test_rows_without_a_seed_differ():
    env = MujocoVectorEnv("HalfCheetah-v5", 4)
    obs = np.concatenate([env.reset()[0], env.reset()[0]])
    assert len(np.unique(obs, axis=0)) == 8
    env.close()


def test_attributes_are_those_of_gymnasiums_vector_environments():
    env, reference = MujocoVectorEnv("Ant-v5", B), gymnasiums_own("Ant-v5")
    assert env.num_envs == reference.num_envs
    assert env.spec.id == reference.envs[0].spec.id
    assert env.spec.max_episode_steps == 1000
    assert env.metadata == reference.metadata
    for name in ("single_observation_space", "single_action_space"):
        assert getattr(env, name) == getattr(reference, name)
    for name in ("observation_space", "action_space"):
        assert getattr(env, name) == getattr(reference, name)
    assert repr(env) == f"MujocoVectorEnv('Ant-v5', num_envs=3, num_threads={env.num_threads})"
    env.close()
    reference.close()


def test_threads_follow_torch_and_never_outnumber_the_rows():
    def threads(num_envs, **kwargs):
        env = MujocoVectorEnv("Hopper-v5", num_envs, **kwargs)
        env.close()
        return env.num_threads

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert [threads(1), threads(2), threads(8)] == [1, 2, 2]
        torch.set_num_threads(1)
        assert [threads(8), threads(8, num_threads=3), threads(2, num_threads=3)] == [1, 3, 2]
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc")
def test_close_ends_the_threads():
    def threads():
        return len(list(Path("/proc/self/task").iterdir()))

    before = threads()
    env = MujocoVectorEnv("HalfCheetah-v5", 8, num_threads=4)
    env.reset(seed=0)
    step = env.step(np.zeros((8, 6)))
    assert threads() == before + 3, threading.enumerate()
    env.close()
    env.close()
    assert threads() == before
    assert np.isfinite(step[0]).all()
    with pytest.raises(RuntimeError, match="is closed"):
        env.reset()
    with pytest.raises(RuntimeError, match="is closed"):
        env.step(np.zeros((8, 6)))


def test_results_are_not_overwritten_by_the_next_step():
    env = MujocoVectorEnv("Humanoid-v5", 2)
    env.reset(seed=0)
    actions = np.full(env.action_space.shape, 0.1, dtype=np.float32)
    kept = env.step(actions)
    expected = copy.deepcopy(kept)
    for _ in range(3):
        env.step(-actions)
    for got, want in zip(kept, expected, strict=True):
        assert_equal(got, want)
    env.close()


@pytest.mark.parametrize(
    ("name", "kwargs", "reason"),
    [
        *((name, {}, None) for name in TASKS),
        ("HalfCheetah-v5", {"max_episode_steps": 9, "reset_noise_scale": 0.0}, None),
        ("HalfCheetah-v5", {"render_mode": "rgb_array"}, "does not take render_mode"),
        ("HalfCheetah-v5", {"wheels": 4, "camera_id": 1}, "does not take camera_id, wheels"),
        ("HalfCheetah-v4", {}, "only the v5 tasks HalfCheetah, Hopper"),
        ("Reacher-v5", {}, "only the v5 tasks"),
        ("CartPole-v1", {}, "only the v5 tasks"),
        ("Counter-v0", {}, "only the v5 tasks"),
        ("NoSuchEnv-v0", {}, "not registered"),
    ],
)
def test_unsupported_says_why(name, kwargs, reason):
    got = unsupported(name, **kwargs)
    if reason is None:
        assert got is None
        return
    assert reason in got
    with pytest.raises(ValueError, match=f"'{name}' has no vector physics: .*{reason}"):
        MujocoVectorEnv(name, **kwargs)


def test_unsupported_without_mujoco_batch(monkeypatch):
    monkeypatch.setattr(vector_physics, "_has_batch", lambda: False)
    assert "mujoco 3.17" in unsupported("HalfCheetah-v5")


def test_ids_registered_for_the_same_class_are_supported():
    entry_point = gymnasium.spec("Hopper-v5").entry_point
    gymnasium.register(
        "TallHopper-v0", entry_point, kwargs={"healthy_z_range": (1.2, 2.0)}, max_episode_steps=50
    )
    try:
        env = MujocoVectorEnv("TallHopper-v0", B)
        assert assert_same_trajectory(env, gymnasiums_own("TallHopper-v0"), 60) > 2 * B
    finally:
        del gymnasium.registry["TallHopper-v0"]


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"num_envs": 0}, "num_envs must be at least 1, got 0"),
        ({"num_threads": 0}, "num_threads must be at least 1, got 0"),
        ({"num_envs": 2, "models": []}, "models must have 2 entries, got 0"),
    ],
)
def test_wrong_arguments(kwargs, text):
    with pytest.raises(ValueError, match=text):
        MujocoVectorEnv("HalfCheetah-v5", **kwargs)


def test_wrong_calls():
    env = MujocoVectorEnv("HalfCheetah-v5", 2)
    mask = np.array([True, False])
    with pytest.raises(RuntimeError, match="call reset"):
        env.step(np.zeros((2, 6)))
    with pytest.raises(RuntimeError, match="of all rows"):
        env.reset(options={"reset_mask": mask})
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"actions must have shape .* = \[2, 6\], got \[6\]"):
        env.step(np.zeros(6))
    with pytest.raises(ValueError, match="seed must have 2 entries, got 3"):
        env.reset(seed=[1, 2, 3])
    for wrong in (mask[:1], mask.astype(int)):
        with pytest.raises(ValueError, match="reset_mask must be boolean of shape"):
            env.reset(options={"reset_mask": wrong})
    env.close()


def test_pickles_by_its_arguments():
    env = MujocoVectorEnv("Hopper-v5", B, num_threads=2, max_episode_steps=9, reset_noise_scale=0.1)
    models = [copy.copy(env.model) for _ in range(B)]
    models[1].body_mass[:] *= 2.0
    env.set_models(models)
    env.reset(seed=1)
    again = pickle.loads(pickle.dumps(env))
    assert again.num_threads == 2
    assert_same_trajectory(again, env, 15)


def test_a_copy_of_cartpole_plays_on():
    env = CartPoleVectorEnv("ssm_fast/CartPoleFamily-v0", B)
    env.reset(seed=1)
    actions = np.ones(B, dtype=np.int64)
    for _ in range(5):
        env.step(actions)
    again = copy.deepcopy(env)
    for _ in range(30):
        for got, want in zip(again.step(actions)[:4], env.step(actions)[:4], strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", ["HalfCheetahBody", "HalfCheetahDir", "CartPoleFamily"])
def test_pickles_with_its_tasks(name):
    env = Environment(f"ssm_fast/{name}-v0", B)
    tasks = env.family.sample(20, 0)[:B]
    env.set_tasks(tasks)
    again = pickle.loads(pickle.dumps(env))
    for e in (env, again):
        e.reset(seed=3)
        assert e.tasks == tuple(tasks)
    actions = np.zeros(env.action_space.shape, env.action_space.dtype)
    for got, want in zip(again.step(actions)[:2], env.step(actions)[:2], strict=True):
        np.testing.assert_array_equal(got, want)
