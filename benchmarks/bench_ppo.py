"""End-to-end PPO steps per second on HalfCheetah-v5 beside SB3 PPO and sb3-contrib RecurrentPPO.

The settings of all: 8 environments x 256 steps, 10 epochs. Minibatches hold 256 steps, as users of
RecurrentPPO choose them (64 for the feed-forward PPO, its default). The policy has the size of the peers', one
layer of 64; the library's default of two layers of 128 stands beside it. One iteration before the clock starts leaves
what happens once (first statistics, allocations) out for all.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time

import pytest
import torch

from ssm_fast.core.improved_ssm import ImprovedSSM
from ssm_fast.env_runner.environment import Environment
from ssm_fast.meta_rl.ppo_trainer import PPOTrainer

ENV = "HalfCheetah-v5"
ENVS, STEPS, EPOCHS = 8, 256, 10
ITERATION = ENVS * STEPS
ITERATIONS, ROUNDS = 4, 3

pytestmark = pytest.mark.filterwarnings("ignore")  # the peers warn of their own dependencies


OURS, OURS_LARGE = "ssm_fast (SSM 64)", "ssm_fast (2 layers of SSM 128)"
SIZES = {
    OURS: {"hidden_dim": 64, "num_layers": 1},
    OURS_LARGE: {"hidden_dim": 128, "num_layers": 2},
}


def ssm_fast_seconds(name: str, iterations: int) -> float:
    torch.manual_seed(0)
    with Environment(ENV, batch_size=ENVS, seed=0) as env:
        model = ImprovedSSM(
            env.input_dim, env.action_dim, normalize_observations=True, **SIZES[name]
        )
        trainer = PPOTrainer(model, num_steps=STEPS, mini_batch_size=256, ppo_epochs=EPOCHS, seed=0)
        trainer.train(env, total_timesteps=ITERATION)
        began = time.perf_counter()
        trainer.train(env, total_timesteps=iterations * ITERATION)
        return time.perf_counter() - began


def stable_baselines3_seconds(recurrent: bool, iterations: int) -> float:
    if recurrent:
        from sb3_contrib import RecurrentPPO as Algorithm
    else:
        from stable_baselines3 import PPO as Algorithm
    from stable_baselines3.common.env_util import make_vec_env

    env = make_vec_env(ENV, n_envs=ENVS, seed=0)
    policy, options = "MlpPolicy", {"batch_size": 64}
    if recurrent:
        policy = "MlpLstmPolicy"
        options = {"batch_size": 256, "policy_kwargs": {"lstm_hidden_size": 64}}
    model = Algorithm(policy, env, n_steps=STEPS, n_epochs=EPOCHS, seed=0, device="cpu", **options)
    model.learn(ITERATION)
    began = time.perf_counter()
    model.learn(iterations * ITERATION, reset_num_timesteps=False)
    seconds = time.perf_counter() - began
    env.close()
    return seconds


RUNS = {
    OURS: (ssm_fast_seconds, OURS),
    OURS_LARGE: (ssm_fast_seconds, OURS_LARGE),
    "SB3 PPO (MLP 64)": (stable_baselines3_seconds, False),
    "sb3-contrib RecurrentPPO (LSTM 64)": (stable_baselines3_seconds, True),
}


def seconds_in_a_fresh_process(name: str) -> float:
    """What a run takes where no other has left threads behind."""
    function, argument = RUNS[name]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, (argument, ITERATIONS))


def test_ppo_steps_per_second(benchmark):
    pytest.importorskip("sb3_contrib", reason="peer: sb3-contrib")
    seconds: dict[str, list[float]] = {name: [] for name in RUNS}
    for _ in range(ROUNDS):  # alternating: what the machine does beside this falls on all of them
        for name, found in seconds.items():
            found.append(seconds_in_a_fresh_process(name))
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
