from __future__ import annotations

import pytest
import torch
from references import weight_grad_sum

from ssm_fast.ops.weight_grad import reference, weight_grad


def problem(G, B, T, N, dtype=torch.float64, s0=True):
    generator = torch.Generator().manual_seed(0)
    x, s = torch.randn(2, G, B, T, N, dtype=dtype, generator=generator)
    initial = torch.randn(G, B, N, dtype=dtype, generator=generator) if s0 else None
    return x, s, initial, torch.rand(G, B, T, generator=generator) < 0.2


def test_reset_drops_a_state_that_is_not_finite():
    x, s, s0, reset = problem(1, 2, 5, 4)
    reset[:, :, 3] = True
    s[:, :, 2] = float("inf")
    assert weight_grad(x, s, s0, reset, False).isfinite().all()


@pytest.mark.parametrize("reverse", [False, True])
def test_reference_equals_explicit_sum(reverse):
    x, s, s0, reset = problem(3, 2, 9, 7, s0=not reverse)
    expected = weight_grad_sum(x, s, s0, reset, reverse)
    torch.testing.assert_close(reference(x, s, s0, reset, reverse), expected)
