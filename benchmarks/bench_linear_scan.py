"""linear_scan beside a copy of the same bytes and the eager loop."""

from __future__ import annotations

import pytest
import torch
from contest import contest

from ssm_fast.ops import linear_scan


def eager_loop(a, b, dim):
    state = torch.zeros_like(b.select(dim, 0))
    states = []
    for t in range(b.shape[dim]):
        state = torch.addcmul(b.select(dim, t), a.select(dim, t), state)
        states.append(state)
    return torch.stack(states, dim)


@pytest.mark.parametrize(
    ("shape", "dim"),
    [((1024, 1024), 1), ((1024, 1024), 0), ((8, 1024, 2048), 1)],
    ids=["B1024-T1024", "T1024-B1024", "B8-T1024-C2048"],
)
def test_linear_scan_forward(benchmark, shape, dim):
    a, b = torch.rand(shape), torch.randn(shape)
    source = torch.randn(3 * b.numel() // 2)  # a copy moves as many bytes as the scan
    target = torch.empty_like(source)
    contest(
        benchmark,
        "linear_scan",
        {
            "linear_scan": lambda: linear_scan(a, b, dim=dim),
            "copy of the same bytes": lambda: target.copy_(source),
            "eager loop": lambda: eager_loop(a, b, dim),
        },
        floor="copy of the same bytes",
    )


def test_linear_scan_forward_backward(benchmark):
    shape = (8, 1024, 256)
    a, b = torch.rand(shape, requires_grad=True), torch.randn(shape, requires_grad=True)
    weights = torch.randn(shape)
    contest(
        benchmark,
        "linear_scan",
        {
            "linear_scan": lambda: torch.autograd.grad(linear_scan(a, b), (a, b), weights),
            "eager loop": lambda: torch.autograd.grad(eager_loop(a, b, 1), (a, b), weights),
        },
    )
