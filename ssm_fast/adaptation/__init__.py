"""Adapting a trained model to one task; maths and numbers in docs/adaptation.md."""

from __future__ import annotations

from ssm_fast.adaptation.hybrid_adapter import HybridAdaptationConfig, HybridAdapter
from ssm_fast.adaptation.policy_objective import Experience, PolicyObjective, policy_batch
from ssm_fast.adaptation.standard_adapter import StandardAdaptationConfig, StandardAdapter
from ssm_fast.adaptation.test_time_adapter import TestTimeAdapter

__all__ = [
    "Experience",
    "HybridAdaptationConfig",
    "HybridAdapter",
    "PolicyObjective",
    "StandardAdaptationConfig",
    "StandardAdapter",
    "TestTimeAdapter",
    "policy_batch",
]
