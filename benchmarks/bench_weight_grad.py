"""weight_grad beside the torch calls that it replaces and its GEMM floor."""

from __future__ import annotations

import pytest
import torch
from contest import contest

from ssm_fast.ops.weight_grad import reference, weight_grad


@pytest.mark.parametrize(("B", "T", "N"), [(64, 256, 64), (32, 256, 128), (256, 128, 32)])
def test_weight_grad(benchmark, B, T, N):
    x, s = torch.randn(2, 1, B, T, N)
    rows = x.reshape(-1, N)
    contest(
        benchmark,
        "weight_grad",
        {
            "weight_grad": lambda: weight_grad(x, s, None, None, False),
            "one mm": lambda: torch.mm(rows.T, rows),
            "cat and einsum": lambda: reference(x, s, None, None, False),
        },
        floor="one mm",
    )
