"""What the families of Gymnasium's classic control share: draws of parameters, rows as arrays."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import gymnasium
import numpy as np
from numpy.typing import NDArray

from ssm_fast.checks import check_count
from ssm_fast.env_runner.same_step import Info, SameStepVectorEnv
from ssm_fast.env_runner.task_families import Task, TaskFamily, TaskT


class LogUniformFamily(TaskFamily[TaskT]):
    """Every parameter is drawn log-uniformly from its range.

    Out of range, one of the parameters lies outside by a factor of up to `beyond`.

    Args:
        env_name: The Gymnasium id.
        sided: The parameter whose sign is drawn by a coin, if any. In the frozen sets, every second
            one is negative.

    Attributes:
        ranges: Lowest and highest value of each parameter.
        beyond: The factor.
    """

    ranges: ClassVar[Mapping[str, tuple[float, float]]]
    beyond: ClassVar[float]

    def __init__(self, env_name: str, sided: str | None = None) -> None:
        super().__init__(env_name)
        self.sided = sided

    def draw(self, generator: np.random.Generator) -> TaskT:
        """Draws the parameters from `ranges`."""
        return self.task_type(**self._draw(generator))

    def draw_out_of_range(self, generator: np.random.Generator) -> TaskT:
        """Draws one parameter from outside and the others from `ranges`."""
        values = self._draw(generator)
        name = list(self.ranges)[generator.integers(len(self.ranges))]
        low, high = self.ranges[name]
        beyond = self.beyond ** generator.uniform(0.0, 1.0)
        value = high * beyond if generator.integers(2) else low / beyond
        values[name] = float(np.copysign(value, values[name]))
        return self.task_type(**values)

    def _draw(self, generator: np.random.Generator) -> dict[str, float]:
        values = {
            name: low * (high / low) ** generator.uniform()
            for name, (low, high) in self.ranges.items()
        }
        if self.sided is not None:
            values[self.sided] *= generator.choice([-1.0, 1.0])
        return values

    def _frozen(
        self,
        draw: Callable[[np.random.Generator], TaskT],
        n: int,
        split: int,
        others: tuple[TaskT, ...] = (),
    ) -> tuple[TaskT, ...]:
        tasks = super()._frozen(draw, n, split, others)
        if self.sided is None:
            return tasks
        sizes = [abs(getattr(task, self.sided)) for task in tasks]
        return tuple(
            replace(task, **{self.sided: size * (-1) ** i})
            for i, (task, size) in enumerate(zip(tasks, sizes, strict=True))
        )


class ClassicVectorEnv(SameStepVectorEnv):
    """`num_envs` rows of a family of classic control, each with a task of its own, as arrays.

    Row `i` does what `gymnasium.make(env_name, task=tasks[i])` does under the same seed and
    actions. Rows restart, and the arguments are, as in `MujocoVectorEnv`, but for `task`.

    Args:
        task: Of every row where `tasks` is `None`; by default the parameters of Gymnasium.
    """

    kind: ClassVar[str]  # of the environments, for messages
    entry_points: ClassVar[frozenset[str]]  # of the single environments
    num_actions: ClassVar[int]

    def __init__(
        self,
        env_name: str,
        num_envs: int = 1,
        *,
        tasks: Sequence[Task] | None = None,
        task: Task | None = None,
        max_episode_steps: int | None = None,
    ) -> None:
        reason = self.unsupported(env_name)
        if reason is not None:
            raise ValueError(f"env_name {env_name!r} has no vector physics: {reason}")
        check_count("num_envs", num_envs)
        kwargs: dict[str, Any] = {} if task is None else {"task": task}
        if max_episode_steps is not None:
            kwargs["max_episode_steps"] = max_episode_steps
        env = gymnasium.make(env_name, disable_env_checker=True, **kwargs)
        self._take_constants(env.unwrapped)
        self._state = np.zeros((4, num_envs))  # [4, B]
        self._setup_rows(env, num_envs, tasks)

    @classmethod
    def unsupported(cls, env_name: str, **env_kwargs: Any) -> str | None:
        """Says why this class does not run an environment; `None` if it does."""
        spec = gymnasium.registry.get(env_name)
        if spec is None:
            return "the id is not registered"
        if spec.entry_point not in cls.entry_points:
            return f"it is no {cls.kind}"
        if spec.additional_wrappers:
            return "its registration adds wrappers"
        foreign = sorted({**spec.kwargs, **env_kwargs}.keys() - {"task", "max_episode_steps"})
        return f"it does not take {', '.join(foreign)}" if foreign else None

    @abstractmethod
    def _take_constants(self, base: Any) -> None:
        """Takes over what is the same in all tasks, from a single environment."""

    def _check_actions(self, actions: NDArray[Any]) -> None:
        if actions.shape != (self.num_envs,):
            raise ValueError(
                f"actions must have shape [B] = [{self.num_envs}], got {list(actions.shape)}"
            )
        if actions.dtype.kind not in "iu":
            raise TypeError(f"actions must be integers, got {actions.dtype}")
        if ((actions < 0) | (actions >= self.num_actions)).any():
            raise ValueError(f"actions must lie in [0, {self.num_actions}), got {actions.tolist()}")

    def _place(self) -> Info:
        return {}

    def __repr__(self) -> str:
        assert self.spec is not None
        return f"{type(self).__name__}({self.spec.id!r}, num_envs={self.num_envs})"


def parameters(tasks: Sequence[Task], name: str) -> NDArray[np.float64]:
    """A parameter of all tasks, `[B]`."""
    return np.array([getattr(task, name) for task in tasks])
