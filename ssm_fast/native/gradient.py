"""The gradient of a policy over sequences without an autograd graph of the network."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ssm_fast.native.inputs import misfit, whole_numbers
from ssm_fast.native.plan import Plan, Reason
from ssm_fast.native.step import step_plan
from ssm_fast.ops.dispatch import native_kernel

Loss = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Sequence[Tensor]]]
Evaluate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class SequenceGradient:
    """The gradient of a loss of log-probabilities, values and entropies by all parameters.

    Args:
        plan: Of the model.
        evaluate: Log-probabilities and entropies ``[S, T]`` of actions, from the means or logits
            ``[S, T, K]`` and the actions; differentiable, also by ``log_std``.

    Attributes:
        vector: The gradient ``[P]``, in the order of ``model.parameters()``. The next call overwrites
            it; callers may modify it.
        plan: Of the model.
    """

    def __init__(self, plan: Plan, evaluate: Evaluate) -> None:
        self.plan, self._evaluate = plan, evaluate
        self.vector = torch.cat([torch.zeros_like(p).reshape(-1) for p in plan.parameters])  # [P]
        self._weights = [p.detach() for p in plan.parameters]  # holds the memory
        self._pass = native_kernel("Pass", plan.dtype)()
        self._log_std_gradient: Tensor | None = None
        if plan.stages.log_std is not None:
            begin = sum(p.numel() for p in plan.parameters[: plan.log_std])
            self._log_std_gradient = self.vector[begin : begin + plan.stages.log_std.numel()]

    @torch.no_grad()
    def __call__(
        self, x: Tensor, actions: Tensor, state: Tensor, reset: Tensor, loss: Loss
    ) -> Tensor:
        """Set `vector`.

        Args:
            x: Observations ``[S, T, I]``, normalised.
            actions: ``[S, T, K]``, or ``[S, T]`` of a discrete policy.
            state: ``[L, S, N]``.
            reset: Boolean ``[S, T]``.
            loss: Of the log-probabilities, values and entropies ``[S, T]``.

        Returns:
            What the loss reports.
        """
        S, T, _ = x.shape
        actions = self.check(x, actions, state, reset)
        x, state, reset = x.contiguous(), state.contiguous(), reset.contiguous()
        output, value = x.new_empty(S, T, self.plan.outputs), x.new_empty(S, T)
        network, log_std = self.plan.network(2), self.plan.stages.log_std
        self._pass.forward(
            network,
            [w.data_ptr() for w in self._weights],
            x.data_ptr(),
            state.data_ptr(),
            reset.data_ptr(),
            [output.data_ptr(), value.data_ptr()],
            S,
            T,
        )
        with torch.enable_grad():
            output.requires_grad_()
            inputs = [output] if log_std is None else [output, log_std]
            log_prob, entropy = self._evaluate(output, actions)
        report, gradients = loss(log_prob.detach(), value, entropy.detach())
        of_log_prob, of_value, *of_entropy = gradients
        of_output, *of_log_std = torch.autograd.grad(
            [log_prob, entropy][: 1 + len(of_entropy)], inputs, [of_log_prob, *of_entropy]
        )
        if of_value.shape != value.shape:
            raise ValueError(
                f"the gradient of the values must have shape {list(value.shape)}, "
                f"got {list(of_value.shape)}"
            )
        of_output, of_value = of_output.contiguous(), of_value.to(x.dtype).contiguous()
        self._pass.backward(
            network, [of_output.data_ptr(), of_value.data_ptr()], self.vector.data_ptr()
        )
        if self._log_std_gradient is not None:
            self._log_std_gradient.copy_(of_log_std[0])
        return report

    def check(self, x: Tensor, actions: Tensor, state: Tensor, reset: Tensor) -> Tensor:
        """The actions as native calls read them; arguments as of a call.

        Raises:
            ValueError: A shape does not fit, or a discrete action lies outside ``[0, K)``.
            TypeError: A dtype does not fit.
        """
        S, T, _ = x.shape
        plan = self.plan
        is_discrete = plan.stages.log_std is None
        error = misfit(
            x=(x, (S, T, plan.inputs), plan.dtype),
            state=(state, (len(plan.states), S, plan.states[0]), plan.dtype),
            reset=(reset, (S, T), torch.bool),
            actions=(actions, (S, T), None)
            if is_discrete
            else (actions, (S, T, plan.outputs), plan.dtype),
        )
        if error:
            raise error
        return whole_numbers("actions", actions, plan.outputs) if is_discrete else actions


def gradient_plan(model: nn.Module, x: Tensor, state: Tensor) -> Plan | Reason:
    """How the gradient of all parameters is native, or why it is not.

    Args:
        model: The policy.
        x: Observations ``[S, T, I]``.
        state: ``[L, S, N]``.
    """
    with torch.no_grad():
        plan = step_plan(model, x[:, 0], state)
    if not plan:
        return plan
    if unread := sorted(set(plan.names) - plan.used(branches=2)):
        return Reason(f"{unread[0]} is in no stage")
    sentence = plan.not_differentiable(branches=2)
    return plan if sentence is None else Reason(sentence)
