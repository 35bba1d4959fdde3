"""The models: `StateSpaceModel` and the actor-critic `ImprovedSSM`."""

from ssm_fast.core.improved_ssm import ImprovedSSM
from ssm_fast.core.ssm import StateSpaceModel

__all__ = ["ImprovedSSM", "StateSpaceModel"]
