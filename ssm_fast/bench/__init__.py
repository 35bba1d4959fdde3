"""What `ssm-fast bench` measures: the ops and layers of a machine beside what else there is."""

from __future__ import annotations

from typing import Literal, TypeAlias

Op: TypeAlias = Literal[
    "dense_scan",
    "norm_scan",
    "linear_scan",
    "output_norm",
    "gae",
    "discounted_returns",
    "policy_step",
    "ssm",
]
