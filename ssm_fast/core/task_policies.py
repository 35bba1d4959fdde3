"""One actor-critic with the weights of several tasks: all of them act in one native call."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.func import vmap

from ssm_fast._torch import is_plain
from ssm_fast.core.functional_call import functional_call
from ssm_fast.core.improved_ssm import (
    ImprovedSSM,
    check_noise,
    choose_action,
    gaussian_log_prob,
)
from ssm_fast.native.step import PolicyStep, step_plan
from ssm_fast.ops.validation import check_dtype


class TaskPolicies:
    """An `ImprovedSSM` with weights of its own for each of ``G`` tasks.

    Args:
        model: The architecture, its observation statistics, and the parameters that tasks share.
        weights: Tensors ``[G, ...]`` by the names of the parameters they stand for, as
            `MetaMAML` returns them. They are copied where they are not contiguous; no gradient
            flows to them.

    Raises:
        KeyError: If a name is not that of a parameter.
        ValueError: If there are no weights, or a shape does not fit.
        TypeError: If a dtype does not fit.
    """

    def __init__(self, model: ImprovedSSM, weights: Mapping[str, Tensor]) -> None:
        if not weights:
            raise ValueError("weights must hold at least one tensor")
        own = dict(model.named_parameters())
        self.model = model
        self.tasks = len(next(iter(weights.values())))
        for name, weight in weights.items():
            expected = [self.tasks, *own[name].shape]
            if list(weight.shape) != expected:
                raise ValueError(f"{name} must have shape {expected}, got {list(weight.shape)}")
            check_dtype(name, weight, own[name])
        names = {id(p): name for name, p in own.items()}  # one of each that several places share
        self.weights = {
            place: weights.get(names[id(p)], p.expand(self.tasks, *p.shape)).detach().contiguous()
            for place, p in model.named_parameters(remove_duplicate=False)
        }
        self._like = next(iter(self.weights.values()))  # every weight has its dtype and device
        self._is_plain = all(is_plain(weight) for weight in self.weights.values())

    @torch.no_grad()
    def get_action(
        self,
        x: Tensor,
        hidden_state: Tensor | None = None,
        deterministic: bool = False,
        reset: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Choose actions of one step.

        Arguments, results and errors are those of `ImprovedSSM.get_action`, with ``[G, B]`` in the
        place of ``[B]``: ``x`` is ``[G, B, I]``, the state ``[L, G, B, N]``. The noise alone has
        the rows of all tasks in one dimension, ``[G B, K]``.
        """
        self._check(x, hidden_state, reset)
        if deterministic:
            noise = None
        elif noise is None:
            noise = self.model.draw_noise(len(x) * x.shape[1])
        else:
            check_noise(noise, [len(x) * x.shape[1], self.model.action_dim], x)
            noise = noise.contiguous()
        native = self._native_action(x, hidden_state, reset, noise)
        return native or self._vmapped_action(x, hidden_state, reset, noise)

    def _check(self, x: Tensor, hidden_state: Tensor | None, reset: Tensor | None) -> None:
        model = self.model
        if x.ndim != 3 or x.shape[0] != self.tasks or x.shape[2] != model.input_dim:
            raise ValueError(
                f"x must have shape [G, B, I] = [{self.tasks}, B, {model.input_dim}], "
                f"got {list(x.shape)}"
            )
        check_dtype("x", x, self._like)
        if hidden_state is not None:
            expected = [model.num_layers, *x.shape[:2], model.state_dim]
            if list(hidden_state.shape) != expected:
                raise ValueError(
                    f"hidden_state must have shape [L, G, B, N] = {expected}, "
                    f"got {list(hidden_state.shape)}"
                )
            check_dtype("hidden_state", hidden_state, self._like)
        if reset is not None and reset.shape != x.shape[:2]:
            raise ValueError(
                f"reset must have shape [G, B] = {list(x.shape[:2])}, got {list(reset.shape)}"
            )

    def _native_action(
        self, x: Tensor, hidden_state: Tensor | None, reset: Tensor | None, noise: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """All groups in one call, or ``None`` where the modules themselves have to run."""
        model, groups, rows = self.model, x.shape[:2], x.flatten(0, 1)  # [G B, I]
        state = None if hidden_state is None else hidden_state.flatten(1, 2)  # [L, G B, N]
        starts = None if reset is None else reset.flatten().bool()  # [G B]
        plan = step_plan(model, rows, state, starts, noise)
        if not plan or not self._is_plain or plan.overridden("forward"):
            return None
        weights = [self.weights[name] for name in plan.names]
        if plan.dtype != self._like.dtype or any(
            w.shape[1:] != p.shape for w, p in zip(weights, plan.parameters, strict=True)
        ):  # the model has become another
            return None
        step = PolicyStep(plan, [w.data_ptr() for w in weights], self.tasks, weights)
        noise_of_step = None if model.discrete else noise
        action, log_prob, value, next_hidden = step(rows, state, starts, noise_of_step)
        if log_prob is None:
            action, log_prob = choose_action(action, noise is None, noise)
        return (
            action.view(*groups, *action.shape[1:]),
            log_prob.view(groups),
            value.view(groups),
            next_hidden.view(-1, *groups, model.state_dim),
        )

    def _vmapped_action(
        self, x: Tensor, hidden_state: Tensor | None, reset: Tensor | None, noise: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The modules, vmapped over the tasks."""
        arguments = (x, hidden_state, reset)
        in_dims = (0, None if hidden_state is None else 1, None if reset is None else 0)

        def step(weights: dict[str, Tensor], *inputs: Tensor | None) -> tuple[Tensor, ...]:
            mean, _, value, next_hidden = functional_call(self.model, weights, inputs)
            return mean, value, next_hidden

        run = vmap(step, (0, *in_dims), (0, 0, 1))
        mean, value, next_hidden = run(self.weights, *arguments)
        noise = None if noise is None else noise.view_as(mean)  # [G, B, K]
        if self.model.discrete:
            return *choose_action(mean, noise is None, noise), value, next_hidden
        action, log_std = mean, self.weights["log_std"].unsqueeze(1)  # [G, 1, K]
        if noise is not None:
            action = torch.addcmul(mean, noise, log_std.exp())
        return action, gaussian_log_prob(action, mean, log_std), value, next_hidden
