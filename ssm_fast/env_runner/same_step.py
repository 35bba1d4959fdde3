"""What vector environments share that step all rows in whole-array operations."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.utils.seeding import np_random
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import ArrayLike, NDArray

from ssm_fast.env_runner.task_families import Task, TaskFamily, get_family

Info = dict[str, Any]
Outcome = tuple[NDArray[Any], NDArray[np.float64], NDArray[np.bool_], Info]


class SameStepVectorEnv(VectorEnv[NDArray[Any], NDArray[Any], NDArray[Any]]):
    """Seeds, restarts, time limits, `info` and tasks of rows; a subclass adds the dynamics.

    Rows restart in the step in which their episode ends, as in a `SyncVectorEnv` with
    `AutoresetMode.SAME_STEP`, and each draws its first states from a generator of its own.

    Attributes:
        family: The `TaskFamily` of the environment; `None` where it has no tasks.
    """

    family: TaskFamily[Any] | None = None

    def _setup_rows(
        self, env: gymnasium.Env[Any, Any], num_envs: int, tasks: Sequence[Task] | None
    ) -> None:
        """Takes over what one row, as Gymnasium makes it, says of itself, and its task."""
        assert env.spec is not None
        base: Any = env.unwrapped
        self.spec = env.spec
        self.render_mode = None
        self.metadata = {**base.metadata, "autoreset_mode": AutoresetMode.SAME_STEP}
        self.single_observation_space = env.observation_space
        self.single_action_space = env.action_space
        self.observation_space = batch_space(env.observation_space, num_envs)
        self.action_space = batch_space(env.action_space, num_envs)
        self.num_envs = num_envs
        self._max_episode_steps = env.spec.max_episode_steps
        self._generators: list[np.random.Generator | None] = [None] * num_envs
        self._elapsed = np.zeros(num_envs, dtype=np.int64)  # [B]
        self._all_rows = np.ones(num_envs, dtype=np.bool_)  # [B], shared by the info of all steps
        self._all_rows.flags.writeable = False
        self._is_reset = False
        self._tasks: tuple[Task, ...] = ()
        self._next_tasks: tuple[Task, ...] | None = None
        self.family = getattr(base, "family", None)
        if tasks is None and self.family is not None:
            tasks = [base.task] * num_envs
        if tasks is not None:
            self.set_tasks(tasks)

    @abstractmethod
    def _check_actions(self, actions: NDArray[Any]) -> None:
        """Raises before anything moves where the actions do not fit the rows."""

    @abstractmethod
    def _advance(self, actions: NDArray[Any]) -> Outcome:
        """Returns observations, rewards `[B]`, `terminated` `[B]`, and what the step reports."""

    @abstractmethod
    def _observation(self) -> NDArray[Any]:
        """Returns the observations of all rows as they stand, in memory of their own."""

    @abstractmethod
    def _place(self) -> Info:
        """Returns the `info` of a reset, which is part of the `info` of a step."""

    @abstractmethod
    def _draw_state(self, i: int, generator: np.random.Generator) -> None:
        """Puts row `i` to the start of an episode."""

    @abstractmethod
    def _begin_tasks(self, tasks: tuple[Task, ...]) -> None:
        """Takes up the tasks, a task a row, before all rows restart."""

    def _after_restart(self, rows: NDArray[np.intp]) -> None:
        """Called when the rows stand at their first states."""

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks that the rows play, or will start with; empty where there are none."""
        if self._next_tasks is not None and not self._is_reset:
            return self._next_tasks
        return self._tasks

    def set_tasks(self, tasks: Sequence[Task]) -> None:
        """Gives every row a task of its own from the next `reset` of all rows on.

        Until then the rows play on, and restart, with the tasks that they have.

        Raises:
            ValueError: The environment has no tasks, or these are not one a row.
            TypeError: These are no tasks of the environment's family.
        """
        if self.family is None:
            assert self.spec is not None
            get_family(self.spec.id)
            raise ValueError(f"{self!r} has no tasks")
        self._next_tasks = self.family.check_tasks(tasks, self.num_envs)

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[NDArray[Any], Info]:
        """Starts a new episode in every row, or in those of `options["reset_mask"]` `[B]`.

        Args:
            seed: Row `i` is seeded `seed + i`, or `seed[i]` of a sequence. `None` lets the row's
                generator run on.
            options: `reset_mask`, as in Gymnasium's vector environments, and `elapsed`: steps `[B]`
                that the time limit counts as taken by the episodes that start.

        Raises:
            ValueError: One of these has another shape, or `elapsed` is out of range.
            TypeError: `elapsed` is no integer.
            RuntimeError: Some rows are reset before all have been.
        """
        self._check_open()
        if seed is None or isinstance(seed, int):
            seeds = [seed if seed is None else seed + i for i in range(self.num_envs)]
        else:
            seeds = list(seed)
        if len(seeds) != self.num_envs:
            raise ValueError(f"seed must have {self.num_envs} entries, got {len(seeds)}")
        mask = np.ones(self.num_envs, dtype=np.bool_)
        if options is not None and "reset_mask" in options:
            mask = np.asarray(options["reset_mask"])
            if mask.shape != (self.num_envs,) or mask.dtype != np.bool_:
                raise ValueError(
                    f"reset_mask must be boolean of shape [B] = [{self.num_envs}], "
                    f"got {mask.dtype} of shape {list(mask.shape)}"
                )
            if not mask.all() and (not self._is_reset or self._next_tasks is not None):
                raise RuntimeError("call reset() of all rows before reset() of some")
        elapsed = None if options is None else options.get("elapsed")
        steps = check_elapsed(
            np.zeros(self.num_envs, dtype=np.int64) if elapsed is None else elapsed,
            self.num_envs,
            self._max_episode_steps,
        )
        self._is_reset = False
        if self._next_tasks is not None:
            self._begin_tasks(self._next_tasks)
            self._tasks, self._next_tasks = self._next_tasks, None
        for i in np.flatnonzero(mask).tolist():
            if seeds[i] is not None:
                self._generators[i] = np_random(seeds[i])[0]
        self._restart(np.flatnonzero(mask))
        self._elapsed[mask] = steps[mask]
        self._is_reset = True
        return self._observation(), _with_masks(_only(mask, self._place()), mask)

    def step(
        self, actions: ArrayLike
    ) -> tuple[NDArray[Any], NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], Info]:
        """Steps every row by `actions` and restarts those whose episode ended.

        Args:
            actions: `[B, action_dim]`, or `[B]` integers where actions are discrete.

        Returns:
            The observations `[B, O]` to act on next, rewards `[B]`, `terminated` `[B]`, `truncated`
            `[B]` and `info`: an array a key with a mask `_key` of the rows that have it. Where an
            episode ended, `info["final_obs"]` holds the observation that this step led to and
            `info["final_info"]` what the step reported.
        """
        self._check_open()
        if not self._is_reset:
            raise RuntimeError(
                "call reset() before step(): there was none, or an error ended the last step"
            )
        actions = np.asarray(actions)
        self._check_actions(actions)
        self._is_reset = False  # whatever interrupts the rows, they have to start together
        self._elapsed += 1
        obs, rewards, terminated, report = self._advance(actions)
        place = self._place()
        if self._max_episode_steps is None:
            truncated = np.zeros(self.num_envs, dtype=np.bool_)  # [B]
        else:
            truncated = self._elapsed >= self._max_episode_steps
        done = terminated | truncated  # [B]
        if not np.count_nonzero(done):  # a quarter of the time of done.any()
            self._is_reset = True
            return obs, rewards, terminated, truncated, _with_masks(place | report, self._all_rows)

        final_obs, final_info = obs, _with_masks(_only(done, place | report), done)
        rows = np.flatnonzero(done)
        self._restart(rows)
        info = _with_masks(self._place(), self._all_rows)
        if not done.all():
            info |= _with_masks(_only(~done, report), ~done)
        info["final_obs"] = np.full(self.num_envs, None, dtype=object)
        for i in rows:
            info["final_obs"][i] = final_obs[i]
        info["final_info"] = final_info
        info["_final_obs"] = info["_final_info"] = done
        self._is_reset = True
        return self._observation(), rewards, terminated, truncated, info

    def _restart(self, rows: NDArray[np.intp]) -> None:
        """Draws first states as Gymnasium does: each row from its own generator."""
        if not rows.size:
            return
        for i in rows.tolist():
            generator = self._generators[i]
            if generator is None:
                generator = self._generators[i] = np_random()[0]
            self._draw_state(i, generator)
        self._after_restart(rows)
        self._elapsed[rows] = 0

    def _check_open(self) -> None:
        if self.closed:
            raise RuntimeError(f"{self!r} is closed")


def check_elapsed(
    elapsed: ArrayLike, rows: int, limit: int | list[int] | None
) -> NDArray[np.integer]:
    """Steps `[rows]` that a time limit, or one for each row, is to count as taken, checked."""
    steps = np.asarray(elapsed)
    if steps.dtype.kind not in "iu":
        raise TypeError(f"elapsed must be integers, got {steps.dtype}")
    if steps.shape != (rows,):
        raise ValueError(f"elapsed must have shape [B] = [{rows}], got {list(steps.shape)}")
    if (steps < 0).any() or (steps >= np.asarray(limit or 1)).any():
        raise ValueError(
            f"elapsed must lie in [0, {limit}), got {steps.tolist()}"
            if limit is not None
            else f"elapsed needs a time limit of Gymnasium's, got {steps.tolist()} without one"
        )
    return steps


def _only(mask: NDArray[np.bool_], entries: Info) -> Info:
    """Zeroes the rows outside the mask, as Gymnasium leaves them."""
    return {
        key: np.where(mask.reshape(-1, *[1] * (value.ndim - 1)), value, value.dtype.type(0))
        for key, value in entries.items()
    }


def _with_masks(entries: Info, mask: NDArray[np.bool_]) -> Info:
    return entries | dict.fromkeys([f"_{key}" for key in entries], mask)
