"""Trials of several episodes, for a policy that learns a task in its recurrent state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ssm_fast.checks import check_count
from ssm_fast.env_runner.environment import Environment
from ssm_fast.env_runner.task_families import Task, TaskFamily

if TYPE_CHECKING:
    from typing_extensions import Self


class TrialEnvironment:
    """An `Environment` whose rows play trials of several episodes of one task.

    RL² (Duan et al. 2016, arXiv 1611.02779): the observation of a step is followed by the action,
    the reward and the end of an episode that led to it, and to a learner a whole trial is one
    episode. A recurrent policy whose state lives as long as a trial can find out there what its
    task is.

    `reset` and `step` are those of `Environment`, with these differences. Observations are
    `[B, I + K + 2]`: the observation, the action `[K]` (clipped; one-hot where it is discrete), the
    reward, and 1 where an episode ended in the last step. All that is zero where a trial begins.
    `terminated` and `truncated` are set where a trial ends, and `final_obs` differs from the first
    result there only. `info["episode_return"]` and `info["episode_length"]` still tell of the
    episodes, and `info["episode_index"]` `[B]` which one of its trial each row was in.

    Args:
        env: The environment; it is closed with this one.
        episodes: Episodes of a trial.

    Raises:
        ValueError: `episodes` is below 1.
        TypeError: It is no integer.
    """

    def __init__(self, env: Environment, episodes: int = 2) -> None:
        self.env = env
        self.episodes = check_count("episodes", episodes)
        self.env_name = env.env_name
        self.batch_size = env.batch_size
        self.action_dim = env.action_dim
        self.discrete = env.discrete
        self.single_action_space = env.single_action_space
        self.family: TaskFamily[Any] | None = env.family
        self.input_dim = env.input_dim + env.action_dim + 2
        limit = env.max_episode_steps
        self.max_episode_steps = None if limit is None else limit * episodes
        self._index = np.zeros(env.batch_size, dtype=np.int64)  # [B], of the episode in its trial

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks that the rows play, or will start with."""
        return self.env.tasks

    def set_tasks(self, tasks: Sequence[Task]) -> None:
        """Gives every row a task of its own, from the next `reset` on."""
        self.env.set_tasks(tasks)

    def reset(
        self,
        seed: int | Sequence[int] | NDArray[np.integer] | None = None,
        *,
        options: dict[str, Any] | None = None,
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Starts a trial in every row; see `Environment.reset`."""
        obs, info = self.env.reset(seed, options=options)
        self._index[:] = 0
        blank = np.zeros((self.batch_size, self.action_dim + 2), dtype=np.float32)
        return np.concatenate([obs, blank], axis=1), info

    def step(
        self, actions: ArrayLike
    ) -> tuple[
        NDArray[np.float32],
        NDArray[np.float64],
        NDArray[np.bool_],
        NDArray[np.bool_],
        dict[str, Any],
    ]:
        """Steps every row and begins a new trial where one ended; see `Environment.step`."""
        obs, rewards, terminated, truncated, info = self.env.step(actions)
        done = terminated | truncated  # [B]
        last = self._experience(np.asarray(actions), rewards, done)  # [B, K + 2]
        index = self._index.copy()
        self._index += done
        over = self._index == self.episodes  # [B]
        self._index[over] = 0
        led_to = np.where(over[:, None], info["final_obs"], obs)  # [B, I]
        final = np.concatenate([led_to, last], axis=1)  # [B, I + K + 2]
        last[over] = 0.0
        info = {**info, "final_obs": final, "episode_index": index}
        now = np.concatenate([obs, last], axis=1)  # [B, I + K + 2]
        return now, rewards, terminated & over, truncated & over, info

    def _experience(
        self, actions: NDArray[Any], rewards: NDArray[np.float64], done: NDArray[np.bool_]
    ) -> NDArray[np.float32]:
        last = np.zeros((self.batch_size, self.action_dim + 2), dtype=np.float32)
        if self.discrete:
            last[np.arange(self.batch_size), actions] = 1.0
        else:
            last[:, :-2] = np.clip(actions, self.env.action_low, self.env.action_high)
        last[:, -2] = rewards
        last[:, -1] = done
        return last

    def policy_metadata(self) -> dict[str, str]:
        """`Environment.policy_metadata`, and the episodes of a trial as `trial_episodes`."""
        return self.env.policy_metadata() | {"trial_episodes": str(self.episodes)}

    def close(self) -> None:
        """Closes the environment; a second call does nothing."""
        self.env.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"TrialEnvironment({self.env!r}, episodes={self.episodes})"
