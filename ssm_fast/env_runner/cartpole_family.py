"""CartPole with another pole, cart, motor and gravity in every task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium.envs.classic_control.cartpole import CartPoleEnv
from numpy.typing import NDArray

from ssm_fast.env_runner.classic_families import ClassicVectorEnv, LogUniformFamily, parameters
from ssm_fast.env_runner.same_step import Outcome
from ssm_fast.env_runner.task_families import PlaysTask, Task, register_family

HORIZON = 500


@dataclass(frozen=True)
class CartPoleTask(Task):
    """Parameters under the names of Gymnasium's CartPole, whose values are the defaults."""

    positive: ClassVar[frozenset[str]] = frozenset({"length", "masscart", "masspole", "gravity"})

    length: float = 0.5  # m, half of the pole
    masscart: float = 1.0  # kg
    masspole: float = 0.1  # kg
    force_mag: float = 10.0  # N; below zero, action 1 pushes to the left
    gravity: float = 9.8  # m/s²

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.force_mag == 0:
            raise ValueError("force_mag must not be 0")


class CartPoleFamily(LogUniformFamily[CartPoleTask]):
    """Poles, carts, motors and gravities around those of CartPole-v1.

    Where the motor is never reversed, one linear feedback balances nearly all tasks, and there is
    little to adapt.
    """

    task_type = CartPoleTask
    default_task = CartPoleTask()
    ranges: ClassVar[dict[str, tuple[float, float]]] = {
        "length": (0.15, 2.5),
        "masscart": (0.3, 3.0),
        "masspole": (0.05, 1.0),
        "force_mag": (4.0, 20.0),
        "gravity": (4.0, 20.0),
    }
    beyond = 1.5


CARTPOLE = CartPoleFamily("ssm_fast/CartPoleFamily-v0", sided="force_mag")
CARTPOLE_UNSIGNED = CartPoleFamily("ssm_fast/CartPoleUnsignedFamily-v0")


class CartPoleFamilyEnv(PlaysTask, CartPoleEnv):
    """CartPole-v1 with the parameters of a task, which the observation does not tell."""

    family = CARTPOLE

    def __init__(self, task: Task | None = None, **kwargs: Any) -> None:
        CartPoleEnv.__init__(self, **kwargs)
        # a short pole on a light cart falls past the bounds of CartPole-v1 within a step
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (4,), np.float32)
        self.start_with(task)

    def begin_task(self, task: CartPoleTask) -> None:
        """Sets the parameters and what follows from them."""
        self.length, self.masscart, self.masspole = task.length, task.masscart, task.masspole
        self.force_mag, self.gravity = task.force_mag, task.gravity
        self.total_mass = self.masspole + self.masscart
        self.polemass_length = self.masspole * self.length


class CartPoleUnsignedFamilyEnv(CartPoleFamilyEnv):
    """The same where tasks are never drawn with a reversed motor."""

    family = CARTPOLE_UNSIGNED


_CLASSES = {
    f"{cls.__module__}:{cls.__name__}": cls
    for cls in (CartPoleFamilyEnv, CartPoleUnsignedFamilyEnv)
}
for _entry_point, _class in _CLASSES.items():
    register_family(_class.family, _entry_point, HORIZON)


class CartPoleVectorEnv(ClassicVectorEnv):
    """The families' rows as arrays."""

    kind = "family of CartPoles"
    entry_points = frozenset(_CLASSES)
    num_actions = 2

    def _take_constants(self, base: Any) -> None:
        self._tau, self._x_limit = base.tau, base.x_threshold
        self._angle_limit = base.theta_threshold_radians

    def _begin_tasks(self, tasks: tuple[Task, ...]) -> None:
        self._gravity, self._force = parameters(tasks, "gravity"), parameters(tasks, "force_mag")
        self._length, self._masspole = parameters(tasks, "length"), parameters(tasks, "masspole")
        self._total_mass = self._masspole + parameters(tasks, "masscart")
        self._polemass_length = self._masspole * self._length

    def _draw_state(self, i: int, generator: np.random.Generator) -> None:
        self._state[:, i] = generator.uniform(low=-0.05, high=0.05, size=(4,))

    def _advance(self, actions: NDArray[Any]) -> Outcome:
        """Follows `CartPoleEnv.step` operation by operation; the state is x, x', θ, θ'."""
        _, x_dot, theta, theta_dot = self._state
        force = np.where(actions == 1, self._force, -self._force)  # [B]
        cos, sin = np.cos(theta), np.sin(theta)
        temp = (force + self._polemass_length * np.square(theta_dot) * sin) / self._total_mass
        theta_acc = (self._gravity * sin - cos * temp) / (
            self._length * (4.0 / 3.0 - self._masspole * np.square(cos) / self._total_mass)
        )
        x_acc = temp - self._polemass_length * theta_acc * cos / self._total_mass
        self._state += self._tau * np.stack((x_dot, x_acc, theta_dot, theta_acc))
        terminated = (np.abs(self._state[0]) > self._x_limit) | (
            np.abs(self._state[2]) > self._angle_limit
        )
        return self._observation(), np.ones(self.num_envs), terminated, {}

    def _observation(self) -> NDArray[np.float32]:
        obs: NDArray[np.float32] = self._state.T.astype(np.float32, order="C")
        return obs  # [B, 4]
