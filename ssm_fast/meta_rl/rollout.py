"""What environments did in the steps that PPO learns from, and how that is recorded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Rollout:
    """What `B` environments did in `T` steps, and where values beyond a step are needed.

    Attributes:
        observations: `[B, T, input_dim]`, not normalised.
        actions: `[B, T, action_dim]`, not clipped; `[B, T]` int64 of a discrete policy.
        log_probs: `[B, T]`, of the policy that acted.
        rewards: `[B, T]`, not scaled.
        terminated: `[B, T]` bool, the episode ended in a terminal state.
        truncated: `[B, T]` bool, the episode was cut short.
        reset: `[B, T]` bool, the observation is the first of an episode.
        initial_state: `[num_layers, B, N]`, the state before step 0.
        boundary_rows: `[M]` int64, environments whose step `boundary_steps` is followed by an
            observation that no later step holds: truncations, and the last step.
        boundary_steps: `[M]` int64.
        boundary_observations: `[M, input_dim]`, the observation that such a step led to.
        episode_returns: Of the episodes that ended, sums of raw rewards.
        episode_lengths: Of the same episodes.
    """

    observations: Tensor
    actions: Tensor
    log_probs: Tensor
    rewards: Tensor
    terminated: Tensor
    truncated: Tensor
    reset: Tensor
    initial_state: Tensor
    boundary_rows: Tensor
    boundary_steps: Tensor
    boundary_observations: Tensor
    episode_returns: list[float] = field(default_factory=list)
    episode_lengths: list[int] = field(default_factory=list)


class RolloutRecording:
    """Keeps the steps of a `Rollout` as they are played.

    Args:
        rows: Environments, `B`.
        steps: Steps of each, `T`.
        input_dim: Entries of an observation.
    """

    def __init__(self, rows: int, steps: int, input_dim: int) -> None:
        self._steps = steps
        self._played = 0
        self._observations = np.empty((rows, steps, input_dim), dtype=np.float32)
        self._rewards = np.empty((rows, steps))  # [B, T]
        self._terminated, self._truncated, self._reset = np.empty((3, rows, steps), dtype=np.bool_)
        self._boundary_rows: list[NDArray[np.intp]] = []
        self._boundary_steps: list[NDArray[np.intp]] = []
        self._boundary_observations: list[NDArray[np.float32]] = []
        self._returns: list[float] = []
        self._lengths: list[int] = []

    def add(
        self,
        observation: NDArray[np.float32],
        first: NDArray[np.bool_],
        step: tuple[Any, Any, NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]],
    ) -> tuple[NDArray[np.bool_], bool]:
        """Takes up what the policy saw, and what `Environment.step` returned.

        Args:
            observation: `[B, input_dim]`.
            first: `[B]`, whether it is the first of an episode.
            step: Of the action that was taken.

        Returns:
            Where an episode ended `[B]`, and whether any did.
        """
        t, (_, reward, terminated, truncated, info) = self._played, step
        self._observations[:, t], self._reset[:, t] = observation, first
        self._rewards[:, t] = reward
        self._terminated[:, t], self._truncated[:, t] = terminated, truncated
        self._played += 1
        ended = terminated | truncated
        any_ended = bool(np.count_nonzero(ended))  # a sixth of the time of ended.any()
        is_last = self._played == self._steps
        if any_ended:
            self._returns.extend(info["episode_return"][ended].tolist())
            self._lengths.extend(info["episode_length"][ended].tolist())
        if any_ended or is_last:
            beyond = np.flatnonzero(~terminated if is_last else truncated & ~terminated)
            self._boundary_rows.append(beyond)
            self._boundary_steps.append(np.full_like(beyond, t))
            self._boundary_observations.append(info["final_obs"][beyond])
        return ended, any_ended

    def rollout(self, actions: Tensor, log_probs: Tensor, initial_state: Tensor) -> Rollout:
        """All of it, on the policy's device and in its dtype.

        Args:
            actions: `[B, T, action_dim]` or `[B, T]`.
            log_probs: `[B, T]`.
            initial_state: `[num_layers, B, N]`, before the first step.
        """
        device, dtype = log_probs.device, initial_state.dtype

        def tensor(x: NDArray[Any]) -> Tensor:
            return torch.from_numpy(x).to(device)

        return Rollout(
            tensor(self._observations).to(dtype),
            actions,
            log_probs,
            tensor(self._rewards).to(dtype),
            tensor(self._terminated),
            tensor(self._truncated),
            tensor(self._reset),
            initial_state,
            tensor(np.concatenate(self._boundary_rows)),
            tensor(np.concatenate(self._boundary_steps)),
            tensor(np.concatenate(self._boundary_observations)).to(dtype),
            self._returns,
            self._lengths,
        )
