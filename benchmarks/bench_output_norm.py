"""output_norm beside the three torch calls that it replaces; the floor is a copy of the same bytes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from contest import contest

from ssm_fast.ops.output_norm import output_norm


def torch_calls(z, weight, bias, residual):
    return residual + torch.tanh(F.layer_norm(z, z.shape[-1:], weight, bias))


@pytest.mark.parametrize(("rows", "H"), [(256, 128), (2048, 128), (16384, 64)])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward_backward"])
def test_output_norm(benchmark, rows, H, backward):
    z, residual, cotangent = torch.randn(3, rows, H)
    weight, bias = torch.ones(H), torch.zeros(H)
    out = torch.empty_like(z)
    leaves = [x.clone().requires_grad_(backward) for x in (z, weight, bias, residual)]

    def run(f):
        y = f(*leaves)
        if backward:
            torch.autograd.grad(y, leaves, cotangent)

    def copies():  # forward reads z and residual and writes y; backward reads z and grad, writes grad_z
        for _ in range(3 if backward else 2):
            out.copy_(z)

    contest(
        benchmark,
        "output_norm",
        {
            "output_norm": lambda: run(lambda *x: output_norm(*x, tanh=True)),
            "layer_norm, tanh, add": lambda: run(torch_calls),
            "copies": copies,
        },
        floor="copies",
        calls=10,
    )
