"""The single environments of the MuJoCo families; `MujocoVectorEnv` gives the same numbers."""

from __future__ import annotations

import copy
from abc import abstractmethod
from typing import Any, cast

import numpy as np
from gymnasium.envs.mujoco.ant_v5 import AntEnv
from gymnasium.envs.mujoco.half_cheetah_v5 import HalfCheetahEnv
from gymnasium.envs.mujoco.walker2d_v5 import Walker2dEnv
from numpy.typing import NDArray

from ssm_fast.env_runner import mujoco_families
from ssm_fast.env_runner.mujoco_families import BodyTask
from ssm_fast.env_runner.task_families import PlaysTask, Task


class _MujocoTask(PlaysTask):
    """Pickles as MuJoCo environments of Gymnasium do: by its arguments, the task among them."""

    def _start(self, task: Task | None, arguments: dict[str, Any]) -> None:
        self._ezpickle_args: tuple[Any, ...] = ()
        self._ezpickle_kwargs = arguments
        self.start_with(task)
        arguments["task"] = self._next_task

    def set_task(self, task: Task) -> None:
        """Plays this task from the next reset on."""
        super().set_task(task)
        self._ezpickle_kwargs["task"] = task


class _RewardTask(_MujocoTask):
    """Puts the task's velocity reward in the place of the robot's own."""

    _forward_reward_weight: float

    @abstractmethod
    def progress(self, info: dict[str, Any]) -> Any:
        """What the forward reward weighs."""

    def step(
        self, action: NDArray[np.float32]
    ) -> tuple[NDArray[np.float64], np.float64, bool, bool, dict[str, Any]]:
        """Steps as the robot's own class does, with the reward of the task."""
        robot = cast(Any, super())
        obs, _, terminated, truncated, info = robot.step(action)
        info["reward_forward"] = self._forward_reward_weight * self.progress(info)
        reward = np.float64(sum(info[key] for key in info if key.startswith("reward_")))
        return obs, reward, terminated, truncated, info


class _HalfCheetahTask(_RewardTask, HalfCheetahEnv):
    """HalfCheetah-v5 with half its control cost, as MAML's."""

    def __init__(
        self, task: Task | None = None, ctrl_cost_weight: float = 0.05, **kwargs: Any
    ) -> None:
        arguments = {"ctrl_cost_weight": ctrl_cost_weight, **kwargs}
        HalfCheetahEnv.__init__(self, **arguments)
        self._start(task, arguments)


class HalfCheetahDirEnv(_HalfCheetahTask):
    """HalfCheetah-v5 that runs forward or backward."""

    family = mujoco_families.HALF_CHEETAH_DIR

    def progress(self, info: dict[str, Any]) -> Any:
        """Velocity in the direction of the task."""
        return self.task.direction * info["x_velocity"]


class HalfCheetahVelEnv(_HalfCheetahTask):
    """HalfCheetah-v5 that runs at a velocity in [0, 2]."""

    family = mujoco_families.HALF_CHEETAH_VEL

    def progress(self, info: dict[str, Any]) -> Any:
        """Minus the distance to the goal velocity."""
        return -abs(info["x_velocity"] - self.task.velocity)


class HalfCheetahVel3Env(HalfCheetahVelEnv):
    """HalfCheetah-v5 that runs at a velocity in [0, 3]."""

    family = mujoco_families.HALF_CHEETAH_VEL3


class AntDirEnv(_RewardTask, AntEnv):
    """Ant-v5 that walks in a direction, with the costs and the survival reward of MAML's."""

    family = mujoco_families.ANT_DIR

    def __init__(
        self,
        task: Task | None = None,
        ctrl_cost_weight: float = 0.005,
        healthy_reward: float = 0.05,
        **kwargs: Any,
    ) -> None:
        arguments = {
            "ctrl_cost_weight": ctrl_cost_weight,
            "healthy_reward": healthy_reward,
            **kwargs,
        }
        AntEnv.__init__(self, **arguments)
        self._start(task, arguments)

    def progress(self, info: dict[str, Any]) -> Any:
        """Velocity in the direction of the task."""
        x, y = self.task.direction
        return info["x_velocity"] * x + info["y_velocity"] * y


class _Body(_MujocoTask):
    model: Any

    def begin_task(self, task: BodyTask) -> None:
        if not hasattr(self, "_nominal"):
            self._nominal = copy.copy(self.model)
        family = cast("mujoco_families.BodyFamily[Any]", self.family)
        family.apply([task], self._nominal, [self.model])


class HalfCheetahBodyEnv(_Body, HalfCheetahEnv):
    """HalfCheetah-v5 with the body of the task."""

    family = mujoco_families.HALF_CHEETAH_BODY

    def __init__(self, task: Task | None = None, **kwargs: Any) -> None:
        HalfCheetahEnv.__init__(self, **kwargs)
        self._start(task, kwargs)


class Walker2dBodyEnv(_Body, Walker2dEnv):
    """Walker2d-v5 with the body of the task."""

    family = mujoco_families.WALKER2D_BODY

    def __init__(self, task: Task | None = None, **kwargs: Any) -> None:
        Walker2dEnv.__init__(self, **kwargs)
        self._start(task, kwargs)
