"""A task that a policy can adapt to within a few hundred steps: act like a goal it is not told."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces


class Aim(gymnasium.Env[Any, Any]):
    """Reward `-(a - goal)²`, or 1 for the right one of three actions; episodes of `horizon` steps.

    It terminates at `ends_after` steps, and returns NaN as the reward of step `nan_at`.
    """

    def __init__(
        self,
        goal: float = 1.0,
        discrete: bool = False,
        horizon: int = 20,
        ends_after: int | None = None,
        nan_at: int | None = None,
    ) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float32)
        self.action_space = (
            spaces.Discrete(3) if discrete else spaces.Box(-3.0, 3.0, (2,), np.float32)
        )
        self.goal, self.discrete, self.horizon = goal, discrete, horizon
        self.ends_after, self.nan_at = ends_after, nan_at
        self.steps = 0  # over all episodes

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.t = 0
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.t += 1
        self.steps += 1
        if self.discrete:
            reward = float(action == int(self.goal))
        else:
            reward = -float(np.square(action - self.goal).sum())
        if self.steps == self.nan_at:
            reward = float("nan")
        terminated = self.ends_after is not None and self.t >= self.ends_after
        return self._observe(), reward, terminated, not terminated and self.t >= self.horizon, {}

    def _observe(self) -> Any:
        noise = self.np_random.normal(size=2)
        return np.array([self.t / self.horizon, *noise], dtype=np.float32)


def aims(rows: int, **kwargs: Any) -> gymnasium.vector.SyncVectorEnv:
    return gymnasium.vector.SyncVectorEnv([lambda: Aim(**kwargs)] * rows)
