from __future__ import annotations

import pytest
import torch

from ssm_fast.ops import weight_grad as op


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("time_major", [False, True])
def test_equals_reference(device, reverse, time_major):
    generator = torch.Generator().manual_seed(0)
    x, s = (
        torch.randn(2, 3, 5, 4, dtype=torch.float64, generator=generator).to(device)
        for _ in range(2)
    )
    if time_major:
        x, s = (y.transpose(1, 2).contiguous().transpose(1, 2) for y in (x, s))
    s0 = None if reverse else torch.randn(2, 3, 4, dtype=torch.float64).to(device)
    reset = torch.rand(2, 3, 5) < 0.3
    for given in (None, reset.to(device)):
        torch.testing.assert_close(
            op.weight_grad(x, s, s0, given, reverse), op.reference(x, s, s0, given, reverse)
        )
