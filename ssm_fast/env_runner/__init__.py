"""Batched Gymnasium environments and the evaluation of policies in them."""

from __future__ import annotations

from ssm_fast.env_runner.environment import Environment
from ssm_fast.env_runner.evaluation import Evaluation, evaluate
from ssm_fast.env_runner.vector_physics import MujocoVectorEnv

__all__ = ["Environment", "Evaluation", "MujocoVectorEnv", "evaluate"]
