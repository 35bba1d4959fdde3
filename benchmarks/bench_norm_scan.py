"""norm_scan beside its GEMM floor, the eager loop and torch's recurrent layers."""

from __future__ import annotations

import pytest
import torch
from contest import contest
from references import norm_scan_loop

from ssm_fast.ops import norm_scan

SHAPES = [(8, 256, 64), (64, 256, 64), (64, 1000, 64), (32, 256, 128)]


@pytest.mark.parametrize(("B", "T", "N"), SHAPES)
def test_norm_scan_forward_backward(benchmark, B, T, N):
    u, weights = torch.randn(2, B, T, N)
    A = torch.nn.init.orthogonal_(torch.empty(N, N), 0.9)
    x = u.reshape(-1, N).clone()
    leaves = [y.requires_grad_() for y in (u, A, torch.ones(N), torch.zeros(N))]

    def three_mm():
        with torch.no_grad():
            torch.mm(x, A)
            torch.mm(x, A)
            torch.mm(x.T, x)

    contenders = {
        "norm_scan": lambda: torch.autograd.grad(norm_scan(*leaves), leaves, weights),
        "three mm": three_mm,
        "eager loop": lambda: torch.autograd.grad(norm_scan_loop(*leaves), leaves, weights),
    }
    layer = torch.nn.GRU(N, N, batch_first=True)
    gru_leaves = (u, *layer.parameters())
    contenders["nn.GRU"] = lambda: torch.autograd.grad(layer(u)[0], gru_leaves, weights)
    contest(benchmark, "norm_scan", contenders, floor="three mm")


def test_norm_scan_second_order(benchmark):
    B, T, N = 16, 256, 64
    u, weights = torch.randn(2, B, T, N)
    A = torch.nn.init.orthogonal_(torch.empty(N, N), 0.9)
    leaves = [y.requires_grad_() for y in (u, A, torch.ones(N), torch.zeros(N))]

    def gradient_of_gradient_norm(scan):
        first = torch.autograd.grad(scan(*leaves), leaves, weights, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    contest(
        benchmark,
        "norm_scan",
        {
            "norm_scan": lambda: gradient_of_gradient_norm(norm_scan),
            "eager loop": lambda: gradient_of_gradient_norm(norm_scan_loop),
        },
    )
