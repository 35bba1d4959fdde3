"""Layers: the ``nn.GRU`` drop-in, its single layer, and observation normalisation."""

from ssm_fast.nn.running_norm import RunningNorm
from ssm_fast.nn.ssm import SSM
from ssm_fast.nn.ssm_layer import SSMLayer

__all__ = ["SSM", "RunningNorm", "SSMLayer"]
