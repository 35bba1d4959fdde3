"""Differentiable recurrences: native C++ on the CPU, Triton on CUDA devices."""

from ssm_fast.ops.dense_scan import dense_scan
from ssm_fast.ops.gae import discounted_returns, gae
from ssm_fast.ops.linear_scan import linear_scan
from ssm_fast.ops.norm_scan import norm_scan
from ssm_fast.ops.output_norm import output_norm

__all__ = ["dense_scan", "discounted_returns", "gae", "linear_scan", "norm_scan", "output_norm"]
