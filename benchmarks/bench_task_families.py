"""A step of 40 rows with a task each, beside the environments without tasks and Gymnasium's way."""

from __future__ import annotations

import functools

import gymnasium
import pytest
from contest import contest
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from ssm_fast.env_runner import Environment, MujocoVectorEnv, get_family

B = 40
CALLS = 20  # steps in a round


def stepping(env):
    """Returns a function that steps the environment by random actions, on and on."""
    env.action_space.seed(0)
    actions = [env.action_space.sample() for _ in range(CALLS)]
    env.reset(seed=0)
    t = 0

    def step():
        nonlocal t
        env.step(actions[t % CALLS])
        t += 1

    return step


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("ssm_fast/CartPoleFamily-v0", "CartPole-v1"),
        ("ssm_fast/HalfCheetahVel-v0", "HalfCheetah-v5"),
        ("ssm_fast/HalfCheetahBody-v0", "HalfCheetah-v5"),
        ("ssm_fast/AntDir-v0", "Ant-v5"),
    ],
)
def test_family_step(benchmark, name, plain):
    tasks = get_family(name).sample(B, 0)
    makers = [functools.partial(gymnasium.make, name, task=task) for task in tasks]
    envs = {
        "Environment": Environment(name, B, tasks=tasks),
        f"Environment of {plain}": Environment(plain, B),
        "SyncVectorEnv": SyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP),
    }
    if plain != "CartPole-v1":
        envs[f"MujocoVectorEnv of {plain}"] = MujocoVectorEnv(plain, B)
    contenders = {label: stepping(env) for label, env in envs.items()}
    medians = contest(benchmark, "Environment", contenders, calls=CALLS)
    rates = {label: B / ms * 1e3 for label, ms in medians.items()}
    benchmark.extra_info["steps_per_second"] = rates
    for env in envs.values():
        env.close()
