"""Seconds that PPO takes on HalfCheetah-v5, ours and its peers', each run in a process of its own."""

from __future__ import annotations

import time
import warnings
from typing import Any

import torch
from fresh_process import in_fresh_process

from ssm_fast.core.improved_ssm import ImprovedSSM
from ssm_fast.env_runner.environment import Environment
from ssm_fast.meta_rl.ppo_trainer import PPOTrainer

ENV = "HalfCheetah-v5"
ENVS, STEPS, EPOCHS = 8, 256, 10
ITERATION = ENVS * STEPS


OURS, OURS_LARGE = "ssm_fast (SSM 64)", "ssm_fast (2 layers of SSM 128)"
SIZES: dict[str, dict[str, Any]] = {
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


def seconds_of(name: str, iterations: int) -> float:
    """What a run takes in a fresh process, where no other has left threads behind."""
    seconds: float = in_fresh_process(_seconds_of, name, iterations)
    return seconds


def _seconds_of(name: str, iterations: int) -> float:
    warnings.simplefilter("ignore")  # the peers warn of their own dependencies
    function, argument = RUNS[name]
    return function(argument, iterations)
