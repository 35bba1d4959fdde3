"""An actor-critic that plays a rollout, step after step, and keeps what it did."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from ssm_fast.core.improved_ssm import ImprovedSSM, check_noise
from ssm_fast.native.step import PolicyStep


class RolloutPolicy:
    """`ImprovedSSM.get_action` for ``T`` steps of ``B`` rows; made by `of`, without gradients.

    The weights are looked up and checked once: no other tensor may take the place of one meanwhile.

    Attributes:
        state: After the last step, ``[L, B, N]``.
    """

    def __init__(self, model: ImprovedSSM, x: Tensor, state: Tensor) -> None:
        self.state = state
        self._act = model.stepper(x, state)
        self._steps: list[tuple[Tensor, Tensor, Tensor]] = []

    @staticmethod
    def of(model: ImprovedSSM, x: Tensor, state: Tensor, steps: int) -> RolloutPolicy:
        """One for steps like a first one.

        Args:
            model: The policy.
            x: Observations of that step ``[B, I]``.
            state: Before it ``[L, B, N]``. It is not modified.
            steps: ``T``.
        """
        step = None if model.discrete else model.native_stepper(x, state)
        if step is None:
            return RolloutPolicy(model, x, state)
        return _NativeRolloutPolicy(step, model.action_dim, x, state, steps)

    def act(self, x: Tensor, noise: Tensor) -> tuple[NDArray[Any], bool]:
        """Takes the next step.

        Args:
            x: Observations ``[B, I]``.
            noise: Of `ImprovedSSM.draw_noise`.

        Returns:
            The actions ``[B, K]`` (``[B]`` of a discrete policy), and whether log-probabilities and
            values are finite.

        Raises:
            ValueError: A shape does not fit, or all steps are taken.
            TypeError: The noise has another dtype.
        """
        action, log_prob, value, self.state = self._act(x, self.state, noise)
        self._steps.append((action, log_prob, value))
        finite = torch.isfinite(log_prob + value).all()  # NaN where the action is
        return action.cpu().numpy(), bool(finite)

    def end_episodes(self, rows: Tensor) -> None:
        """Zeroes the state of some rows ``[B]``, after a step."""
        self.state = self.state.masked_fill(rows[:, None], 0.0)

    def recorded(self) -> tuple[Tensor, Tensor, Tensor]:
        """Actions ``[B, T, ...]``, log-probabilities and values ``[B, T]`` of the steps so far."""
        actions, log_probs, values = zip(*self._steps, strict=True)
        return torch.stack(actions, 1), torch.stack(log_probs, 1), torch.stack(values, 1)


class _NativeRolloutPolicy(RolloutPolicy):
    """The same in one native call a step, which writes into the memory of all."""

    def __init__(
        self, step: PolicyStep, action_dim: int, x: Tensor, state: Tensor, steps: int
    ) -> None:
        B = len(x)
        self._step, self._rows, self._taken = step, B, 0
        self._x_shape, self._noise_shape = x.shape, [B, action_dim]
        self._actions = x.new_empty(steps, B, action_dim)
        self._views = self._actions.numpy()
        self._log_probs, self._values = x.new_empty(2, steps, B)
        self._states = torch.stack((state, state))  # before a step and after it, in turn
        outputs = (self._actions, self._log_probs, self._values)
        self._outputs = [(t.data_ptr(), t[0].numel() * t.element_size()) for t in outputs]
        self._state_addresses = [s.data_ptr() for s in self._states]
        self.state = self._states[0]

    def act(self, x: Tensor, noise: Tensor) -> tuple[NDArray[Any], bool]:
        t, before = self._taken, self._taken % 2
        check_noise(noise, self._noise_shape, self._actions)
        if x.shape != self._x_shape or x.dtype != self._actions.dtype or t == len(self._views):
            raise ValueError(
                f"x must be {self._actions.dtype} {list(self._x_shape)} for {len(self._views)} "
                f"steps, got {x.dtype} {list(x.shape)} for step {t}"
            )
        x, noise = x.contiguous(), noise.contiguous()
        action, log_prob, value = (first + t * size for first, size in self._outputs)
        finite = self._step.run(
            self._rows,
            x.data_ptr(),
            self._state_addresses[before],
            0,
            noise.data_ptr(),
            action,
            log_prob,
            value,
            self._state_addresses[1 - before],
        )
        self._taken += 1
        self.state = self._states[1 - before]
        return self._views[t], finite

    def end_episodes(self, rows: Tensor) -> None:
        self.state[:, rows] = 0.0

    def recorded(self) -> tuple[Tensor, Tensor, Tensor]:
        recorded = (self._actions, self._log_probs, self._values)
        actions, log_probs, values = (x[: self._taken].transpose(0, 1) for x in recorded)
        return actions.contiguous(), log_probs.contiguous(), values.contiguous()
