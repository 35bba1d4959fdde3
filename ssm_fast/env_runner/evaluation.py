"""Unbiased evaluation of a policy: a fixed number of episodes, each counted once."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ssm_fast.checks import check_count
from ssm_fast.env_runner.environment import Environment
from ssm_fast.env_runner.task_families import Task
from ssm_fast.env_runner.trial_environment import TrialEnvironment

LONGEST_EVALUATION = 10_000  # steps of an episode that has no time limit


class PredictsActions(Protocol):
    """Whatever has the `predict` of `ssm_fast.Policy` and of stable-baselines3."""

    def predict(
        self,
        obs: NDArray[np.float32],
        /,
        state: Any = None,
        episode_start: NDArray[np.bool_] | None = None,
        deterministic: bool = False,
    ) -> tuple[NDArray[Any], Any]:
        """Maps observations `[B, input_dim]` and a state to actions and the next state."""


@dataclass(frozen=True)
class Evaluation:
    """Undiscounted returns `[episodes]` and lengths `[episodes]`, in the order of the seeds."""

    returns: NDArray[np.float64]
    lengths: NDArray[np.int64]

    @property
    def mean(self) -> float:
        """Mean return."""
        return float(self.returns.mean())

    @property
    def std(self) -> float:
        """Standard deviation of the returns (over the episodes, not of the mean)."""
        return float(self.returns.std())


def longest_evaluation(env: Environment | TrialEnvironment) -> int | None:
    """Steps after which an evaluation ends an episode; `None` where the time limit does."""
    return LONGEST_EVALUATION if env.max_episode_steps is None else None


def evaluate(
    policy: PredictsActions,
    env_name: str,
    episodes: int = 10,
    seed: int = 1_000_000,
    deterministic: bool = True,
    max_episode_steps: int | None = None,
    batch_size: int | None = None,
    task: Task | None = None,
) -> Evaluation:
    """Plays `episodes` episodes; episode `i` runs in a fresh reset of its own, seeded `seed + i`.

    A batch of environments that is stopped after so many ended episodes counts short episodes more
    often than long ones. Here the first episode of every row counts and no other.

    Args:
        policy: Has stable-baselines3's `predict(obs, state, episode_start, deterministic)`.
        env_name: A registered Gymnasium id.
        episodes: Number of episodes.
        seed: Seed of the first episode.
        deterministic: Handed to `predict`.
        max_episode_steps: Truncate episodes here. `None` keeps the limit of the registration, and
            `longest_evaluation` where there is none, with a warning.
        batch_size: Episodes that are played side by side; `None` is at most 32.
        task: What every episode plays, for the id of a `TaskFamily`; `None` is its default task.
    """
    check_count("episodes", episodes)
    if batch_size is None:
        batch_size = min(episodes, 32)
    returns = np.zeros(episodes)  # [episodes]
    lengths = np.zeros(episodes, dtype=np.int64)  # [episodes]
    start = 0
    while start < episodes:
        count = min(batch_size, episodes - start)
        tasks = None if task is None else [task] * count
        with Environment(env_name, count, max_episode_steps, tasks=tasks) as env:
            limit = longest_evaluation(env)
            if limit is not None and start == 0:
                warnings.warn(
                    f"{env_name} has no time limit: the evaluation ends episodes after {limit:,} "
                    "steps; max_episode_steps sets another number",
                    stacklevel=2,
                )
            obs, _ = env.reset(seed=seed + start)
            state: Any = None
            steps, total = 0, np.zeros(count)  # [B], undiscounted returns so far
            episode_start = np.ones(count, dtype=np.bool_)  # [B]
            unfinished = np.ones(count, dtype=np.bool_)  # [B]
            while unfinished.any():
                actions, state = policy.predict(
                    obs, state=state, episode_start=episode_start, deterministic=deterministic
                )
                obs, rewards, terminated, truncated, _ = env.step(actions)
                steps += 1
                total += rewards
                episode_start = terminated | truncated
                ended = np.ones_like(unfinished) if steps == limit else episode_start
                rows = np.flatnonzero(ended & unfinished)
                returns[start + rows] = total[rows]
                lengths[start + rows] = steps
                unfinished[rows] = False
        start += count
    return Evaluation(returns, lengths)
