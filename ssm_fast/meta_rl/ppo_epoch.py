"""An epoch of PPO in one native call: minibatches, losses, gradients and the steps of Adam."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ssm_fast.meta_rl.flat_adam import FlatAdam
from ssm_fast.native.inputs import misfit
from ssm_fast.native.plan import Reason

if TYPE_CHECKING:
    from ssm_fast.native.gradient import SequenceGradient

METRICS = ("policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction", "grad_norm")


@dataclass(frozen=True)
class Objective:
    """PPO's loss and the length of its steps, with the meanings that `PPOTrainer` gives them."""

    clip_epsilon: float
    value_coef: float
    entropy_coef: float
    clip_value_loss: bool
    max_grad_norm: float


class PpoEpoch:
    """What `PPOTrainer` does with an epoch's minibatches, without Python between them.

    It gathers the sequences of each, standardizes their advantages, and goes on with the loss, the
    gradient (`SequenceGradient`), its clipping and Adam, as the trainer does to rounding. For the
    small networks of control, these take less time one by one than the calls that they consist of.

    Made by `of`, for one update.
    """

    def __init__(self, gradient: SequenceGradient, adam: FlatAdam, objective: Objective) -> None:
        self._gradient, self._adam, self._objective = gradient, adam, objective

    @classmethod
    def of(
        cls, gradient: SequenceGradient | None, adam: FlatAdam, objective: Objective
    ) -> PpoEpoch | Reason:
        """One for a policy whose gradient is native and an optimizer whose steps can be, or a reason."""
        if gradient is None:
            return Reason("autograd computes the gradients")
        reason = adam.why_not_native()
        return cls(gradient, adam, objective) if reason is None else reason

    @torch.no_grad()
    def __call__(
        self, sequences: Sequence[Tensor], states: Tensor, order: Tensor, minibatch: int
    ) -> Tensor:
        """Learn from the sequences of a rollout.

        Args:
            sequences: Normalised observations ``[S, L, I]``, actions ``[S, L, K]``, log-probabilities
                when they were taken, resets, values then, returns and advantages, ``[S, L]``.
            states: Before the sequences ``[num_layers, S, N]``.
            order: Numbers of the sequences ``[S]``, those of a minibatch behind each other.
            minibatch: Sequences in one.

        Returns:
            `METRICS` of each minibatch ``[M, 6]``. Where the gradient of one is not finite it is the
            last, and its step was not taken.
        """
        x, actions, log_probs, reset, *rest = (t.contiguous() for t in sequences)
        is_discrete = self._gradient.plan.stages.log_std is None
        states, order = states.contiguous(), order.contiguous()
        actions = self._gradient.check(x, actions, states, reset)
        S, L, _ = x.shape
        names = ("log_probs", "values", "returns", "advantages")
        rows = zip(names, (log_probs, *rest), strict=True)
        if error := misfit(**{name: (tensor, (S, L), x.dtype) for name, tensor in rows}):
            raise error
        every = torch.arange(S, device="cpu")
        if order.dtype != torch.int64 or not torch.equal(order.sort().values, every):
            raise ValueError(f"order must hold the numbers 0 to {S - 1} as int64, each once")
        weights, gradient = self._adam.weights, self._gradient.vector
        vector, (m, v) = weights.vector, self._adam.moments()
        if gradient.shape != vector.shape or {gradient.dtype, vector.dtype} != {x.dtype}:
            raise ValueError(f"gradient must be {x.dtype} of shape {list(vector.shape)}")
        objective, count = self._objective, -(-S // minibatch)
        metrics = torch.empty(count, len(METRICS), dtype=torch.float64, device="cpu")  # [M, 6]
        addresses = [t.data_ptr() for t in (x, actions, log_probs, *rest, reset, states)]
        addresses[1:2] = [0, addresses[1]] if is_discrete else [addresses[1], 0]
        steps = self._gradient.plan.network(2).ppo_epoch(
            addresses,
            (S, L),
            order.data_ptr(),
            (S, minibatch),
            (objective.clip_epsilon, objective.value_coef, objective.entropy_coef),
            objective.clip_value_loss,
            [t.data_ptr() for t in (vector, gradient, m, v, weights.lr_scales)],
            [p.data_ptr() for p in weights.parameters],
            (*self._adam.options(), objective.max_grad_norm),
            self._adam.steps,
            metrics.data_ptr(),
        )
        self._adam.count_native(steps)
        return metrics[: steps + 1]  # all of them, or up to the one that ended the epoch
