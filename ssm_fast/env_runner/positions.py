"""Tasks whose observations lack the velocities: what a policy does not see it has to remember.

`ssm_fast/HalfCheetahPositions-v0`, `HopperPositions`, `Walker2dPositions` and `CartPolePositions`
are Gymnasium's tasks in everything else: physics, rewards, ends and time limits.
"""

from __future__ import annotations

from typing import Any, cast

import gymnasium
import numpy as np
from gymnasium.envs.classic_control.cartpole import CartPoleEnv
from numpy.typing import NDArray


class CartPolePositionsEnv(CartPoleEnv):
    """CartPole-v1 that shows the cart's position and the pole's angle alone."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        space = cast(gymnasium.spaces.Box, self.observation_space)
        self.observation_space = gymnasium.spaces.Box(space.low[::2], space.high[::2])

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Begins an episode as CartPole-v1 does."""
        obs, info = super().reset(seed=seed, options=options)
        return obs[::2], info

    def step(self, action: Any) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Steps as CartPole-v1 does."""
        obs, reward, terminated, truncated, info = cast(Any, super()).step(action)
        return obs[::2], reward, terminated, truncated, info


_CLASSES = {
    "CartPole": ("ssm_fast.env_runner.positions:CartPolePositionsEnv", 500),
    "HalfCheetah": ("ssm_fast.env_runner.positions_envs:HalfCheetahPositionsEnv", 1000),
    "Hopper": ("ssm_fast.env_runner.positions_envs:HopperPositionsEnv", 1000),
    "Walker2d": ("ssm_fast.env_runner.positions_envs:Walker2dPositionsEnv", 1000),
}
for _name, (_entry_point, _limit) in _CLASSES.items():
    if f"ssm_fast/{_name}Positions-v0" not in gymnasium.registry:
        gymnasium.register(f"ssm_fast/{_name}Positions-v0", _entry_point, max_episode_steps=_limit)
