"""Networks as lists of stages, and whatever runs them in native calls."""

from ssm_fast.native.plan import Plan, Reason, plan_of

__all__ = ["Plan", "Reason", "plan_of"]
