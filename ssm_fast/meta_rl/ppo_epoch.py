"""An epoch of PPO in one native call: minibatches, losses, gradients and the steps of Adam."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ssm_fast._torch import steps_are_watched
from ssm_fast.meta_rl.flat_parameters import FlatParameters

if TYPE_CHECKING:
    from ssm_fast.native.gradient import SequenceGradient

FIGURES = ("policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction", "grad_norm")


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

    def __init__(
        self,
        gradient: SequenceGradient,
        weights: FlatParameters,
        optimizer: torch.optim.Adam,
        objective: Objective,
    ) -> None:
        self._gradient = gradient
        self._weights = weights
        self._optimizer = optimizer
        self._objective = objective

    @classmethod
    def of(
        cls,
        gradient: SequenceGradient | None,
        weights: FlatParameters,
        optimizer: torch.optim.Optimizer,
        objective: Objective,
    ) -> PpoEpoch | None:
        """One for a policy whose gradient is written out, or None.

        None also where somebody has changed the optimizer: it has to be a plain Adam of the vector,
        and nobody may watch its steps.
        """
        if gradient is None or not _is_plain_adam(optimizer, weights.vector):
            return None
        return cls(gradient, weights, cast("torch.optim.Adam", optimizer), objective)

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
            `FIGURES` of each minibatch ``[M, 6]``. Where the gradient of one is not finite it is the
            last, and its step was not taken.
        """
        x, actions, log_probs, reset, *rest = (t.contiguous() for t in sequences)
        is_discrete = actions.dtype == torch.int64
        states, order = states.contiguous(), order.contiguous()
        self._gradient.check(x, actions, states, reset)
        S, L, _ = x.shape
        names = ("log_probs", "values", "returns", "advantages")
        for name, tensor in zip(names, (log_probs, *rest), strict=True):
            if tensor.shape != (S, L):
                raise ValueError(f"{name} must have shape {[S, L]}, got {list(tensor.shape)}")
            if tensor.dtype != x.dtype:
                raise TypeError(f"{name} must have dtype {x.dtype}, got {tensor.dtype}")
        every = torch.arange(S, device="cpu")
        if order.dtype != torch.int64 or not torch.equal(order.sort().values, every):
            raise ValueError(f"order must hold the numbers 0 to {S - 1} as int64, each once")
        vector = self._weights.vector
        m, v, steps = self._state()
        for name, tensor in (
            ("exp_avg", m),
            ("exp_avg_sq", v),
            ("gradient", self._gradient.vector),
        ):
            if tensor.shape != vector.shape or tensor.dtype != x.dtype:
                raise ValueError(f"{name} must be {x.dtype} of shape {list(vector.shape)}")
        (group,) = self._optimizer.param_groups
        objective, count = self._objective, -(-S // minibatch)
        figures = torch.empty(count, len(FIGURES), dtype=torch.float64, device="cpu")  # [M, 6]
        addresses = [t.data_ptr() for t in (x, actions, log_probs, *rest, reset, states)]
        addresses[1:2] = [0, addresses[1]] if is_discrete else [addresses[1], 0]
        taken = self._gradient.plan.network(2).ppo_epoch(
            addresses,
            (S, L),
            order.data_ptr(),
            (S, minibatch),
            (objective.clip_epsilon, objective.value_coef, objective.entropy_coef),
            objective.clip_value_loss,
            [t.data_ptr() for t in (vector, self._gradient.vector, m, v, self._weights.pace)],
            [p.data_ptr() for p in self._weights.parameters],
            (group["lr"], *group["betas"], group["eps"], objective.max_grad_norm),
            int(steps),
            figures.data_ptr(),
        )
        steps += taken
        increment_version([vector, *self._weights.parameters])
        return figures[: taken + 1]  # all of them, or up to the one that ended the epoch

    def _state(self) -> tuple[Tensor, Tensor, Tensor]:
        """Adam's moments and its number of steps; made as its first step would."""
        vector = self._weights.vector
        state = self._optimizer.state[vector]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(vector, memory_format=torch.preserve_format)
        return state["exp_avg"], state["exp_avg_sq"], state["step"]


def _is_plain_adam(optimizer: torch.optim.Optimizer, vector: Tensor) -> bool:
    """Whether it steps this vector alone, by the formula of the paper and unseen."""
    if type(optimizer) is not torch.optim.Adam or len(optimizer.param_groups) != 1:
        return False
    (group,) = optimizer.param_groups
    others = ("weight_decay", "amsgrad", "maximize", "differentiable", "decoupled_weight_decay")
    return (
        len(group["params"]) == 1
        and group["params"][0] is vector
        and not any(group.get(name) for name in others)
        and all(type(x) is float for x in (group["lr"], *group["betas"], group["eps"]))
        and "step" not in vars(optimizer)
        and not steps_are_watched(optimizer)
    )
