"""CartPole with another pole, cart, motor and gravity in every task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium.envs.classic_control.cartpole import CartPoleEnv
from numpy.typing import NDArray

from ssm_fast.checks import check_count
from ssm_fast.env_runner.same_step import (
    Info,
    Outcome,
    SameStepVectorEnv,
    check_discrete_actions,
    why_not_in_arrays,
)
from ssm_fast.env_runner.task_families import PlaysTask, Task, TaskFamily, register_family

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


RANGES = {
    "length": (0.15, 2.5),
    "masscart": (0.3, 3.0),
    "masspole": (0.05, 1.0),
    "force_mag": (4.0, 20.0),
    "gravity": (4.0, 20.0),
}


class CartPoleFamily(TaskFamily[CartPoleTask]):
    """Every parameter is drawn log-uniformly from `RANGES`, the side of the motor by a coin.

    Out of range, one of the parameters lies outside by a factor of up to 1.5. In the frozen sets,
    every second motor is reversed.

    Args:
        env_name: The Gymnasium id.
        signed: Whether the motor may be reversed. Where it never is, one linear feedback balances
            nearly all tasks, and there is little to adapt.
    """

    task_type = CartPoleTask
    default_task = CartPoleTask()

    def __init__(self, env_name: str, signed: bool) -> None:
        super().__init__(env_name)
        self.signed = signed

    def draw(self, generator: np.random.Generator) -> CartPoleTask:
        """Draws the parameters from `RANGES`."""
        return CartPoleTask(**self._draw(generator))

    def draw_out_of_range(self, generator: np.random.Generator) -> CartPoleTask:
        """Draws one parameter from outside and the others from `RANGES`."""
        values = self._draw(generator)
        name = list(RANGES)[generator.integers(len(RANGES))]
        low, high = RANGES[name]
        beyond = 1.5 ** generator.uniform(0.0, 1.0)
        value = high * beyond if generator.integers(2) else low / beyond
        values[name] = float(np.copysign(value, values[name]))
        return CartPoleTask(**values)

    def _frozen(
        self,
        draw: Callable[[np.random.Generator], CartPoleTask],
        n: int,
        split: int,
        others: tuple[CartPoleTask, ...] = (),
    ) -> tuple[CartPoleTask, ...]:
        tasks = super()._frozen(draw, n, split, others)
        if not self.signed:
            return tasks
        return tuple(
            replace(task, force_mag=abs(task.force_mag) * (-1) ** i) for i, task in enumerate(tasks)
        )

    def _draw(self, generator: np.random.Generator) -> dict[str, float]:
        values = {
            name: low * (high / low) ** generator.uniform() for name, (low, high) in RANGES.items()
        }
        if self.signed:
            values["force_mag"] *= generator.choice([-1.0, 1.0])
        return values


CARTPOLE = CartPoleFamily("ssm_fast/CartPoleFamily-v0", signed=True)
CARTPOLE_UNSIGNED = CartPoleFamily("ssm_fast/CartPoleUnsignedFamily-v0", signed=False)


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


class CartPoleVectorEnv(SameStepVectorEnv):
    """`num_envs` rows of a CartPole family, each with a task of its own, as arrays.

    Row `i` does what `gymnasium.make(env_name, task=tasks[i])` does under the same seed and
    actions. Rows restart, and the arguments are, as in `MujocoVectorEnv`, but for `task`.

    Args:
        task: Of every row where `tasks` is `None`; by default CartPole-v1's own parameters.
    """

    def __init__(
        self,
        env_name: str,
        num_envs: int = 1,
        *,
        tasks: Sequence[Task] | None = None,
        task: Task | None = None,
        max_episode_steps: int | None = None,
    ) -> None:
        reason = unsupported(env_name)
        if reason is not None:
            raise ValueError(f"env_name {env_name!r} has no vector physics: {reason}")
        check_count("num_envs", num_envs)
        kwargs: dict[str, Any] = {} if task is None else {"task": task}
        if max_episode_steps is not None:
            kwargs["max_episode_steps"] = max_episode_steps
        env = gymnasium.make(env_name, disable_env_checker=True, **kwargs)
        base: Any = env.unwrapped
        self._tau, self._x_limit = base.tau, base.x_threshold
        self._angle_limit = base.theta_threshold_radians
        self._state = np.zeros((4, num_envs))  # [4, B]: x, x', θ, θ'
        self._setup_rows(env, num_envs, tasks)

    def _begin_tasks(self, tasks: tuple[Any, ...]) -> None:
        def of(name: str) -> NDArray[np.float64]:
            return np.array([getattr(task, name) for task in tasks])  # [B]

        self._gravity, self._force = of("gravity"), of("force_mag")
        self._length, self._masspole = of("length"), of("masspole")
        self._total_mass = self._masspole + of("masscart")
        self._polemass_length = self._masspole * self._length

    def _draw_state(self, i: int, generator: np.random.Generator) -> None:
        self._state[:, i] = generator.uniform(low=-0.05, high=0.05, size=(4,))

    def _check_actions(self, actions: NDArray[Any]) -> None:
        check_discrete_actions(actions, self.num_envs, 2)

    def _advance(self, actions: NDArray[Any]) -> Outcome:
        """Follows `CartPoleEnv.step` operation by operation."""
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

    def _place(self) -> Info:
        return {}

    def __repr__(self) -> str:
        assert self.spec is not None
        return f"CartPoleVectorEnv({self.spec.id!r}, num_envs={self.num_envs})"


def unsupported(env_name: str, **env_kwargs: Any) -> str | None:
    """Says why `CartPoleVectorEnv` does not run this environment; `None` if it does."""
    return why_not_in_arrays(env_name, _CLASSES, "family of CartPoles", env_kwargs)
