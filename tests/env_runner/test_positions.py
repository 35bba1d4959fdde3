from __future__ import annotations

import pickle
import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import ssm_fast.env_runner  # noqa: F401 - registers the environments
from ssm_fast.env_runner import Environment

pytestmark = pytest.mark.isa_independent

TASKS = {  # the task with velocities, and which entries of its observations are positions
    "CartPole": ("CartPole-v1", slice(None, None, 2)),
    "HalfCheetah": ("HalfCheetah-v5", slice(8)),
    "Hopper": ("Hopper-v5", slice(5)),
    "Walker2d": ("Walker2d-v5", slice(8)),
}


@pytest.mark.parametrize("name", TASKS)
def test_equals_the_task_but_for_the_velocities(name):
    whole_name, shown = TASKS[name]
    env, whole = gymnasium.make(f"ssm_fast/{name}Positions-v0"), gymnasium.make(whole_name)
    assert env.spec.max_episode_steps == whole.spec.max_episode_steps
    assert env.observation_space.shape == whole.observation_space.sample()[shown].shape
    obs, info = env.reset(seed=3)
    whole_obs, whole_info = whole.reset(seed=3)
    np.testing.assert_array_equal(obs, whole_obs[shown])
    assert info == whole_info
    whole.action_space.seed(0)
    for _ in range(50):
        action = whole.action_space.sample()
        obs, *rest = env.step(action)
        whole_obs, *whole_rest = whole.step(action)
        np.testing.assert_array_equal(obs, whole_obs[shown])
        assert rest == whole_rest
        if rest[1]:
            break


@pytest.mark.parametrize("name", TASKS)
def test_check_env(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of unbounded spaces, as for the tasks themselves
        check_env(gymnasium.make(f"ssm_fast/{name}Positions-v0").unwrapped, skip_render_check=True)


def test_pickles():
    env = gymnasium.make("ssm_fast/HalfCheetahPositions-v0", ctrl_cost_weight=0.5).unwrapped
    again = pickle.loads(pickle.dumps(env))
    assert again.observation_space == env.observation_space
    assert again._ctrl_cost_weight == 0.5


@pytest.mark.parametrize("name", TASKS)
def test_environment(name):
    with Environment(f"ssm_fast/{name}Positions-v0", 2, seed=0) as env:
        env.reset()
        env.step(env.sample_action())
        assert env.physics == ("gymnasium" if name == "CartPole" else "vector")
