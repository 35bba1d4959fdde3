"""RecurrentPPO of sb3-contrib with an SSM in place of its LSTM, on CartPole without velocities.

pip install ".[rl]" sb3-contrib
python examples/sb3_cartpole.py
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import gymnasium
import numpy as np
import tyro
from gymnasium.wrappers import TransformObservation
from sb3_contrib import RecurrentPPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from ssm_fast.integrations.sb3 import MlpSSMPolicy


def make_env() -> gymnasium.Env:
    """CartPole that shows where the cart and the pole are, not how fast they move."""
    env = gymnasium.make("CartPole-v1")
    box = env.observation_space
    shown = gymnasium.spaces.Box(box.low[::2], box.high[::2], dtype=np.float32)
    return TransformObservation(env, lambda observation: observation[::2], shown)


def evaluate(model: RecurrentPPO, env: VecEnv, episodes: int) -> float:
    """Mean return of the most likely actions."""
    return float(evaluate_policy(model, env, episodes, warn=False)[0])


def main(steps: int = 30_000, lstm: bool = False, episodes: int = 20, seed: int = 0) -> float:
    """Train, save, load and evaluate; `lstm` trains sb3-contrib's own policy for comparison."""
    env = VecNormalize(make_vec_env(make_env, n_envs=8, seed=seed), gamma=0.98)
    model = RecurrentPPO(
        "MlpLstmPolicy" if lstm else MlpSSMPolicy,
        env,
        learning_rate=1e-3,
        n_steps=256,
        batch_size=512,
        gamma=0.98,
        gae_lambda=0.9,
        seed=seed,
        policy_kwargs={"lstm_hidden_size": 64},
    )
    test_env = VecNormalize(make_vec_env(make_env, n_envs=8, seed=seed + 1), training=False)
    test_env.norm_reward, test_env.obs_rms = False, env.obs_rms  # the statistics of training
    print(f"before training: return {evaluate(model, test_env, episodes):.1f}")
    begin = time.perf_counter()
    model.learn(steps)
    print(f"{model.num_timesteps} steps in {time.perf_counter() - begin:.1f} s")

    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder) / "model")
        model = RecurrentPPO.load(Path(folder) / "model")
    returned = evaluate(model, test_env, episodes)
    print(f"after training, saved and loaded: return {returned:.1f}")
    return returned


if __name__ == "__main__":
    tyro.cli(main)
