"""The single MuJoCo environments without velocities; `MujocoVectorEnv` gives the same numbers."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from gymnasium.envs.mujoco.half_cheetah_v5 import HalfCheetahEnv
from gymnasium.envs.mujoco.hopper_v5 import HopperEnv
from gymnasium.envs.mujoco.walker2d_v5 import Walker2dEnv
from gymnasium.spaces import Box
from numpy.typing import NDArray


class _Positions:
    """Leaves the velocities out. A mixin, before the environment's own class."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        env = cast(Any, self)
        size = env.observation_structure["qpos"]
        env.observation_space = Box(-np.inf, np.inf, (size,), np.float64)
        env.observation_structure = {**env.observation_structure, "qvel": 0}

    def _get_obs(self) -> NDArray[np.float64]:
        env = cast(Any, super())
        whole: NDArray[np.float64] = env._get_obs()
        return whole[: cast(Any, self).observation_structure["qpos"]]


class HalfCheetahPositionsEnv(_Positions, HalfCheetahEnv):
    """HalfCheetah-v5 without velocities."""


class HopperPositionsEnv(_Positions, HopperEnv):
    """Hopper-v5 without velocities."""


class Walker2dPositionsEnv(_Positions, Walker2dEnv):
    """Walker2d-v5 without velocities."""
