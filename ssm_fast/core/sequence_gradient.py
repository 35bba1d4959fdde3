"""The gradient of a policy over sequences, natively where that is possible."""

from __future__ import annotations

from torch import Tensor

from ssm_fast.core.improved_ssm import ImprovedSSM
from ssm_fast.native.gradient import SequenceGradient, gradient_plan
from ssm_fast.native.plan import Reason


def sequence_gradient(model: ImprovedSSM, x: Tensor, state: Tensor) -> SequenceGradient | Reason:
    """A native gradient for inputs like these, or why there is none.

    Args:
        model: The policy.
        x: Observations ``[S, T, I]``.
        state: ``[L, S, N]``.
    """
    plan = gradient_plan(model, x, state)
    if not plan:
        return plan
    if sentence := plan.overridden("evaluate_actions", "log_prob_and_entropy"):
        return Reason(sentence)
    return SequenceGradient(plan, model.log_prob_and_entropy)
