"""Adam on the parameters of a model as one vector, by torch or by a native epoch."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ssm_fast._torch import steps_are_watched
from ssm_fast.meta_rl.flat_parameters import FlatParameters
from ssm_fast.native.plan import Reason


class FlatAdam:
    """An optimizer's steps on `FlatParameters`, each entry with a learning rate of its own.

    Native code takes the steps of torch's Adam (Kingma & Ba 2015, arXiv 1412.6980, algorithm 1) and
    leaves its state as torch would: both can go on from where the other stopped.

    Args:
        weights: The parameters.
        optimizer: Of ``weights.vector``; torch's Adam where native steps are to be possible.
    """

    def __init__(self, weights: FlatParameters, optimizer: torch.optim.Optimizer) -> None:
        self.weights, self.optimizer = weights, optimizer

    @torch.no_grad()
    def step(self) -> None:
        """Take a step along ``weights.vector.grad``, and give the values to the model."""
        vector = self.weights.vector
        before = vector.clone()  # [P]
        self.optimizer.step()
        torch.lerp(before, vector, self.weights.lr_scales, out=vector)
        self.weights.write()

    def why_not_native(self) -> Reason | None:
        """Why native code cannot take the steps, if so: the optimizer is another, or is watched."""
        optimizer = self.optimizer
        if type(optimizer) is not torch.optim.Adam:
            return Reason(f"the optimizer is a {type(optimizer).__name__}, not torch.optim.Adam")
        groups = optimizer.param_groups
        if len(groups) != 1 or [id(p) for p in groups[0]["params"]] != [id(self.weights.vector)]:
            return Reason("the optimizer has other parameters than the trainer's vector")
        (group,) = groups
        others = (
            "weight_decay",
            "amsgrad",
            "maximize",
            "differentiable",
            "decoupled_weight_decay",
        )
        for option in others:
            if group.get(option):
                return Reason(f"the optimizer's {option} is {group[option]}")
        if not all(type(x) is float for x in (group["lr"], *group["betas"], group["eps"])):
            return Reason("an option of the optimizer is no float")
        if "step" in vars(optimizer) or steps_are_watched(optimizer):
            return Reason("the optimizer's step() is hooked or replaced")
        return None

    def options(self) -> tuple[float, float, float, float]:
        """Learning rate, both betas and eps, for native code."""
        (group,) = self.optimizer.param_groups
        return cast(
            "tuple[float, float, float, float]", (group["lr"], *group["betas"], group["eps"])
        )

    def moments(self) -> tuple[Tensor, Tensor]:
        """Adam's first and second moments ``[P]``, made as its first step would."""
        state = self._state()
        for name in ("exp_avg", "exp_avg_sq"):
            moment, vector = state[name], self.weights.vector
            if moment.shape != vector.shape or moment.dtype != vector.dtype:
                raise ValueError(f"{name} must be {vector.dtype} of shape {list(vector.shape)}")
        return state["exp_avg"], state["exp_avg_sq"]

    @property
    def steps(self) -> int:
        """How many steps were taken."""
        return int(self._state()["step"])

    def count_native(self, steps: int) -> None:
        """Count steps that native code has taken on the vector, the moments and the parameters."""
        self._state()["step"] += steps
        increment_version([self.weights.vector, *self.weights.parameters])

    def _state(self) -> dict[str, Tensor]:
        state = self.optimizer.state[self.weights.vector]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(
                    self.weights.vector, memory_format=torch.preserve_format
                )
        return cast("dict[str, Tensor]", state)
