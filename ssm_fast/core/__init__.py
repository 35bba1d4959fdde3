"""The models: `StateSpaceModel`, the actor-critic `ImprovedSSM` and copies of it for many tasks."""

from ssm_fast.core.improved_ssm import ImprovedSSM
from ssm_fast.core.ssm import StateSpaceModel
from ssm_fast.core.task_policies import TaskPolicies

__all__ = ["ImprovedSSM", "StateSpaceModel", "TaskPolicies"]
