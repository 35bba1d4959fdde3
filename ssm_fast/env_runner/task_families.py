"""Families of tasks for meta-learning: what a task is, how tasks are drawn, which are held out."""

from __future__ import annotations

import math
import numbers
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, ClassVar, Generic, TypeVar, cast

import gymnasium
import numpy as np


@dataclass(frozen=True)
class Task:
    """Base of the tasks: a frozen dataclass of numbers and of tuples of numbers.

    Tasks compare and hash by value, pickle, and go through JSON:
    `family.task_type(**json.loads(json.dumps(task.as_dict()))) == task`.

    Raises:
        TypeError: A field is no number, or no sequence of numbers.
        ValueError: A field is not finite, or not positive where it has to be.
    """

    positive: ClassVar[frozenset[str]] = frozenset()  # names of the fields that must be above zero

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            checked: float | tuple[float, ...]
            if field.type == "tuple[float, ...]":
                if isinstance(value, str) or not isinstance(value, (Sequence, np.ndarray)):
                    raise TypeError(f"{field.name} must be numbers, got {value!r}")
                checked = tuple(self._check(f"{field.name}[{i}]", v) for i, v in enumerate(value))
            else:
                checked = self._check(field.name, value)
            object.__setattr__(self, field.name, checked)

    def _check(self, name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be a number, got {value!r}")
        if not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")
        if name.partition("[")[0] in self.positive and value <= 0:
            raise ValueError(f"{name} must be positive, got {value}")
        return float(value)

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields, for `json.dumps`."""
        return asdict(self)


_PATIENCE = 100  # draws for each task that is wanted

TaskT = TypeVar("TaskT", bound=Task)


class TaskFamily(ABC, Generic[TaskT]):
    """A distribution of tasks, with sets of tasks that stay the same for ever.

    `train_tasks`, `test_tasks` and `out_of_range_tasks` are disjoint, and `sample` never draws a
    task of the last two. A family of two directions is the exception: there is nothing to hold out.

    Attributes:
        env_name: The Gymnasium id whose task this family sets.
        task_type: The class of its tasks.
        default_task: What an environment plays that was given no task.
    """

    task_type: type[TaskT]
    default_task: TaskT
    num_train_tasks: ClassVar[int] = 100
    num_test_tasks: ClassVar[int] = 40
    num_out_of_range_tasks: ClassVar[int] = 20

    def __init__(self, env_name: str) -> None:
        self.env_name = env_name

    @abstractmethod
    def draw(self, generator: np.random.Generator) -> TaskT:
        """Draws a task of the distribution."""

    @abstractmethod
    def draw_out_of_range(self, generator: np.random.Generator) -> TaskT:
        """Draws a task that lies outside the distribution."""

    def sample(self, n: int, seed: int) -> tuple[TaskT, ...]:
        """Draws `n` tasks; the same for the same seed, and the first `k` are `sample(k, seed)`."""
        if n < 0:
            raise ValueError(f"n must not be negative, got {n}")
        if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
            raise TypeError(f"seed must be an integer, got {type(seed)}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        generator = np.random.default_rng(seed)
        held_out = {*self.test_tasks, *self.out_of_range_tasks} - {*self.train_tasks}
        tasks: list[TaskT] = []
        for _ in range(_PATIENCE * n):
            task = self.draw(generator)
            if task not in held_out:
                tasks.append(task)
            if len(tasks) == n:
                break
        return self._all(tasks, n)

    @cached_property
    def train_tasks(self) -> tuple[TaskT, ...]:
        """The 100 tasks to train on, for methods that need a fixed set."""
        return self._frozen(self.draw, self.num_train_tasks, 0)

    @cached_property
    def test_tasks(self) -> tuple[TaskT, ...]:
        """The 40 held-out tasks of the same distribution."""
        return self._frozen(self.draw, self.num_test_tasks, 1, self.train_tasks)

    @cached_property
    def out_of_range_tasks(self) -> tuple[TaskT, ...]:
        """The 20 held-out tasks outside the distribution."""
        others = self.train_tasks + self.test_tasks
        return self._frozen(self.draw_out_of_range, self.num_out_of_range_tasks, 2, others)

    def _frozen(
        self,
        draw: Callable[[np.random.Generator], TaskT],
        n: int,
        split: int,
        others: tuple[TaskT, ...] = (),
    ) -> tuple[TaskT, ...]:
        """Draws `n` different tasks that are none of the others."""
        generator = np.random.default_rng([zlib.crc32(self.env_name.encode()), split])
        tasks: dict[TaskT, None] = {}
        for _ in range(_PATIENCE * n):
            task = draw(generator)
            if task not in others:
                tasks[task] = None
            if len(tasks) == n:
                break
        return self._all(tasks, n)

    def _all(self, tasks: Collection[TaskT], n: int) -> tuple[TaskT, ...]:
        if len(tasks) < n:
            raise ValueError(f"{self.env_name} must have {n} more tasks, found {len(tasks)}")
        return tuple(tasks)

    def check_task(self, task: Task) -> TaskT:
        """Returns the task if it is one of this family's, in or out of range."""
        if not isinstance(task, self.task_type):
            raise TypeError(
                f"tasks of {self.env_name} must be {self.task_type.__name__}, got {task!r}"
            )
        return task

    def check_tasks(self, tasks: Sequence[Task], count: int) -> tuple[TaskT, ...]:
        """Returns the tasks if they are `count` tasks of this family."""
        if isinstance(tasks, Task) or not isinstance(tasks, Sequence):
            raise TypeError(f"tasks must be a sequence of tasks, got {type(tasks)}")
        if len(tasks) != count:
            raise ValueError(f"tasks must have {count} entries, got {len(tasks)}")
        return tuple(self.check_task(task) for task in tasks)

    def __reduce__(self) -> tuple[Any, ...]:
        return get_family, (self.env_name,)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.env_name!r})"


_FAMILIES: dict[str, TaskFamily[Any]] = {}


def get_family(env_name: str) -> TaskFamily[Any]:
    """Returns the family of a registered id.

    Raises:
        ValueError: The id has no family. The message lists those that have one.
    """
    family = _FAMILIES.get(env_name)
    if family is None:
        names = ", ".join(sorted(_FAMILIES))
        raise ValueError(f"env_name {env_name!r} is no task family; expected one of {names}")
    return family


def register_family(
    family: TaskFamily[Any], entry_point: str, max_episode_steps: int
) -> TaskFamily[Any]:
    """Registers the family and its Gymnasium id.

    Args:
        family: The family.
        entry_point: `"module:class"` of its environment, which has the family as class attribute
            `family`, takes an argument `task` and has a method `set_task(task)`.
        max_episode_steps: Horizon of the task.
    """
    if family.env_name not in gymnasium.registry:
        gymnasium.register(family.env_name, entry_point, max_episode_steps=max_episode_steps)
    return _FAMILIES.setdefault(family.env_name, family)


class PlaysTask:
    """What the single environments of the families share: a task that a reset takes up.

    A mixin, before the environment's own class. Attribute `task` is the task that is being played.
    """

    family: ClassVar[TaskFamily[Any]]

    def start_with(self, task: Task | None) -> None:
        """Takes up the first task, or the default; the constructor's last call."""
        family = self.family
        self.task = family.default_task if task is None else family.check_task(task)
        self._next_task = self.task
        self.begin_task(self.task)

    def set_task(self, task: Task) -> None:
        """Plays this task from the next reset on."""
        self._next_task = self.family.check_task(task)

    def begin_task(self, task: Any) -> None:
        """Takes the task up; where only the reward reads `self.task`, there is nothing to do."""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Starts an episode of the task that was set last."""
        if self._next_task is not self.task:
            self.task = self._next_task
            self.begin_task(self.task)
        return cast(Any, super()).reset(seed=seed, options=options)  # type: ignore[no-any-return]
