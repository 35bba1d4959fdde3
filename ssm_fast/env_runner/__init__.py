"""Batched Gymnasium environments and the evaluation of policies in them."""

from __future__ import annotations

from ssm_fast.env_runner import positions as positions  # registers its environments
from ssm_fast.env_runner.acrobot_family import AcrobotTask, AcrobotVectorEnv
from ssm_fast.env_runner.cartpole_family import CartPoleTask, CartPoleVectorEnv
from ssm_fast.env_runner.environment import Environment, MetaEnvironment
from ssm_fast.env_runner.evaluation import Evaluation, evaluate, longest_evaluation
from ssm_fast.env_runner.mujoco_families import (
    AntDirTask,
    HalfCheetahBodyTask,
    HalfCheetahDirTask,
    HalfCheetahVelTask,
    Walker2dBodyTask,
)
from ssm_fast.env_runner.task_families import Task, TaskFamily, get_family, register_family
from ssm_fast.env_runner.trial_environment import TrialEnvironment
from ssm_fast.env_runner.vector_physics import MujocoVectorEnv

__all__ = [
    "AcrobotTask",
    "AcrobotVectorEnv",
    "AntDirTask",
    "CartPoleTask",
    "CartPoleVectorEnv",
    "Environment",
    "Evaluation",
    "HalfCheetahBodyTask",
    "HalfCheetahDirTask",
    "HalfCheetahVelTask",
    "MetaEnvironment",
    "MujocoVectorEnv",
    "Task",
    "TaskFamily",
    "TrialEnvironment",
    "Walker2dBodyTask",
    "evaluate",
    "get_family",
    "longest_evaluation",
    "register_family",
]
