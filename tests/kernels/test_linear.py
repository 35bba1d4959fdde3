from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from ssm_fast.ops.linear import linear


@pytest.mark.parametrize("tanh", [False, True])
def test_gradients_of_both_orders(device, tanh):
    generator = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(*shape, dtype=torch.float64, generator=generator).to(device).requires_grad_()
        for shape in ((3, 5), (4, 5), (4,))
    ]
    assert gradcheck(lambda *t: linear(*t, tanh=tanh), leaves)
    assert gradgradcheck(lambda *t: linear(*t, tanh=tanh), leaves)
