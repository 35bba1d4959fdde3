"""What the policies of several tasks did in one round, and what its steps were worth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssm_fast import ops

_RIDGE = 1e-5  # of the baseline's regression
_FITS = 2  # of the baseline where episodes are cut off: the later one bootstraps with the first
_SMALLEST_DEVIATION = 1e-3  # of advantages, in largest returns: what lies below is the fit's error
_FEATURE_CLIP = 10.0  # of the observations that the baseline sees


Step: TypeAlias = tuple[
    NDArray[Any], NDArray[Any], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]
]
"""What `Environment.step` returns."""


@dataclass(frozen=True)
class Trajectories:
    """`T` steps in `R` rows of each of `G` tasks, from the first step of an episode on.

    A row whose episode ends starts its next one. Where the environment plays trials, a trial stands
    for an episode, except in `episode_returns`.

    Attributes:
        observations: `[G, R, T, I]`, not normalised.
        actions: `[G, R, T, K]`, not clipped; `[G, R, T]` int64 of a discrete policy.
        log_probs: `[G, R, T]`, of the policy that acted.
        rewards: `[G, R, T]`.
        terminated: `[G, R, T]` bool, the episode ended in a terminal state.
        truncated: `[G, R, T]` bool, the episode was cut short.
        reset: `[G, R, T]` bool, the observation is the first of an episode.
        last_observations: `[G, R, I]`, what the last step led to.
        episode_returns: `[G, R, E]`, of the first episode of each row, or of the `E` episodes of
            its first trial; what was earned until the end where it did not finish. Later episodes
            of a row are not counted: those that fit into `T` steps are the short ones.
        time_limit: Steps after which an episode is cut short, if any.
    """

    observations: Tensor
    actions: Tensor
    log_probs: Tensor
    rewards: Tensor
    terminated: Tensor
    truncated: Tensor
    reset: Tensor
    last_observations: Tensor
    episode_returns: Tensor
    time_limit: int | None = None

    def steps_into_episode(self) -> Tensor:
        """Steps of the same episode before each step: `[G, R, T]`."""
        T = self.rewards.shape[-1]
        t = torch.arange(T, device=self.rewards.device).expand_as(self.rewards)
        return t - torch.where(self.reset, t, 0).cummax(-1).values


class Recording:
    """Keeps the steps of a round as they are played.

    Args:
        rows: Rows of the environment, `B`.
        steps: Steps of each, `T`.
        input_dim: Entries of an observation, `I`.
        episodes: Episodes whose returns count, `E`.
        time_limit: Steps after which an episode (or trial) is cut short, if any.
    """

    def __init__(
        self, rows: int, steps: int, input_dim: int, episodes: int, time_limit: int | None = None
    ) -> None:
        self.steps = steps
        self._time_limit = time_limit
        self._played = 0
        self._observations = np.empty((rows, steps, input_dim), dtype=np.float32)  # [B, T, I]
        self._rewards = np.empty((rows, steps))  # [B, T]
        self._terminated, self._truncated, self._reset = np.empty((3, rows, steps), dtype=np.bool_)
        self._actions: list[Tensor] = []  # T of [G, R, K] or [G, R]
        self._log_probs: list[Tensor] = []  # T of [G, R]
        self._returns = np.zeros((rows, episodes))  # [B, E]
        self._counts = np.ones(rows, dtype=np.bool_)  # [B], rows in their first episode or trial
        self._last_observations: NDArray[Any] = self._observations[:, 0]  # [B, I]

    def add(
        self,
        observation: NDArray[Any],
        first: NDArray[np.bool_],
        action: Tensor,
        log_prob: Tensor,
        step: Step,
    ) -> None:
        """Takes up what all rows saw and did, and what came of it."""
        t, (_, reward, terminated, truncated, info) = self._played, step
        self._observations[:, t], self._reset[:, t] = observation, first
        self._rewards[:, t] = reward
        self._terminated[:, t], self._truncated[:, t] = terminated, truncated
        self._actions.append(action)
        self._log_probs.append(log_prob)
        earned = np.where(self._counts, reward, 0.0)
        self._returns[np.arange(len(earned)), info.get("episode_index", 0)] += earned
        self._counts &= ~(terminated | truncated)
        self._last_observations = info["final_obs"]
        self._played += 1

    def trajectories(
        self, tasks: int, dtype: torch.dtype, device: str | torch.device
    ) -> Trajectories:
        """What was played, by the tasks that the rows belong to."""

        def split(x: NDArray[Any]) -> Tensor:
            return torch.from_numpy(x).to(device).view(tasks, -1, *x.shape[1:])

        return Trajectories(
            split(self._observations).to(dtype),
            torch.stack(self._actions, 2),
            torch.stack(self._log_probs, 2),
            split(self._rewards).to(dtype),
            split(self._terminated),
            split(self._truncated),
            split(self._reset),
            split(self._last_observations).to(dtype),
            split(self._returns),
            self._time_limit,
        )


def compute_advantages(trajectories: Trajectories, gamma: float, gae_lambda: float) -> Tensor:
    """Generalised advantages over a baseline of each task, normalised per task.

    The baseline is the ridge regression of the discounted returns on the observation, its square
    and powers of the time in the episode (Duan et al. 2016, arXiv 1604.06778), and the discount of
    what would come after the time limit: towards it a steady reward is worth less and less. It is
    fitted to the task's own steps: tasks differ in what a state is worth, which a critic that they
    share cannot know. A time limit ends the return, as it does in the objective. An episode that
    goes on beyond the last step is bootstrapped with the baseline.

    Args:
        trajectories: The steps.
        gamma: Discount factor.
        gae_lambda: Weight of longer returns.

    Returns:
        `[G, R, T]`, of mean 0 and deviation 1 in each task; close to 0 where every step is worth
        the same.
    """
    time = trajectories.steps_into_episode()  # [G, R, T]
    clock = (time.shape[-1], trajectories.time_limit, gamma)
    features = _features(trajectories.observations, time, *clock)  # [G, R, T, F]
    beyond = _features(trajectories.last_observations, time[..., -1] + 1, *clock)  # [G, R, F]
    ends = trajectories.terminated | trajectories.truncated  # [G, R, T]
    cut = torch.zeros_like(ends)
    cut[..., -1] = ~ends[..., -1]
    next_values = torch.zeros_like(trajectories.rewards)  # [G, R, T]
    for _ in range(_FITS if bool(cut.any()) else 1):
        returns = ops.discounted_returns(trajectories.rewards, ends, cut, gamma, next_values)
        weights = _ridge(features, returns)  # [G, F, 1]
        values = _predict(features, weights)  # [G, R, T]
        next_values[..., :-1] = values[..., 1:]
        next_values[..., -1] = _predict(beyond, weights)
    advantages, _ = ops.gae(trajectories.rewards, values, next_values, ends, cut, gamma, gae_lambda)
    mean = advantages.mean((1, 2), keepdim=True)
    deviation = advantages.std((1, 2), keepdim=True, correction=0)
    floor = _SMALLEST_DEVIATION * returns.abs().amax((1, 2), keepdim=True)
    return (advantages - mean) / torch.maximum(deviation, floor + 1e-8)


def _features(
    observations: Tensor, time: Tensor, steps: int, time_limit: int | None, gamma: float
) -> Tensor:
    """`[..., I]` and `[...]` to `[..., F]`, of a round of so many steps."""
    x = observations.clamp(-_FEATURE_CLIP, _FEATURE_CLIP)
    t = time.to(x.dtype).unsqueeze(-1) / steps
    features = [x, x.square(), t, t**2, t**3, torch.ones_like(t)]
    if time_limit is not None:
        left = (time_limit - time).clamp(min=0).to(x.dtype).unsqueeze(-1)
        features.append(torch.pow(gamma, left))
    return torch.cat(features, -1)


def _ridge(features: Tensor, targets: Tensor) -> Tensor:
    """Regression of each task, in float64: features `[G, R, T, F]`, targets `[G, R, T]`."""
    X = features.flatten(1, 2).double()  # [G, R T, F]
    y = targets.flatten(1, 2).double().unsqueeze(-1)  # [G, R T, 1]
    damping = _RIDGE * torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
    weights: Tensor = torch.linalg.solve(X.mT @ X + damping, X.mT @ y)
    return weights


def _predict(features: Tensor, weights: Tensor) -> Tensor:
    values = features.flatten(1, -2).double() @ weights  # [G, ..., 1]
    return values.view(features.shape[:-1]).to(features.dtype)
