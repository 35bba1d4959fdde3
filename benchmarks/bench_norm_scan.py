"""norm_scan beside its GEMM floor, the eager loop, torch's recurrent layers and JAX."""

from __future__ import annotations

import pytest
import torch
from contest import contest
from jax_scans import jax_contenders
from references import norm_scan_loop
from second_order import gradients, peak_memory

from ssm_fast.ops import norm_scan

SHAPES = [
    (8, 256, 64),
    (64, 256, 64),
    (64, 1000, 64),
    (32, 256, 128),
    (1, 1000, 64),
    (256, 128, 32),
]


def problem(B, T, N):
    generator = torch.Generator().manual_seed(0)
    u, weights = torch.randn(2, B, T, N, generator=generator)
    A = torch.nn.init.orthogonal_(torch.empty(N, N), 0.9)
    return (u, A, torch.ones(N), torch.zeros(N)), weights


@pytest.mark.parametrize(("B", "T", "N"), SHAPES)
def test_norm_scan_forward(benchmark, B, T, N):
    tensors, _ = problem(B, T, N)
    u, A, *_ = tensors
    x = u.reshape(-1, N)
    contenders = {
        "norm_scan": lambda: norm_scan(*tensors),
        "one mm": lambda: torch.mm(x, A),
        **jax_contenders(tensors),
        "eager loop": lambda: norm_scan_loop(*tensors),
    }
    with torch.no_grad():
        contest(benchmark, "norm_scan", contenders, floor="one mm")


@pytest.mark.parametrize(("B", "T", "N"), SHAPES)
def test_norm_scan_forward_backward(benchmark, B, T, N):
    leaves, weights = problem(B, T, N)
    u, A, *_ = leaves
    x = u.reshape(-1, N).clone()
    for leaf in leaves:
        leaf.requires_grad_()

    def three_mm():
        with torch.no_grad():
            torch.mm(x, A)
            torch.mm(x, A)
            torch.mm(x.T, x)

    contenders = {
        "norm_scan": lambda: torch.autograd.grad(norm_scan(*leaves), leaves, weights),
        "three mm": three_mm,
        **jax_contenders(leaves, weights),
        "eager loop": lambda: torch.autograd.grad(norm_scan_loop(*leaves), leaves, weights),
    }
    for kind in ("RNN", "GRU", "LSTM"):
        layer = getattr(torch.nn, kind)(N, N, batch_first=True)
        inputs = (u, *layer.parameters())
        contenders[f"nn.{kind}"] = lambda layer=layer, inputs=inputs: torch.autograd.grad(
            layer(u)[0], inputs, weights
        )
    contest(benchmark, "norm_scan", contenders, floor="three mm")


def test_norm_scan_second_order(benchmark):
    sizes = {"B": 16, "T": 256, "N": 64}
    contenders = {
        "norm_scan": gradients("norm_scan", loop=False, **sizes),
        "eager loop": gradients("norm_scan", loop=True, **sizes),
    }
    contest(benchmark, "norm_scan", contenders)
    benchmark.extra_info["peak_mib"] = {
        "norm_scan": peak_memory("norm_scan", loop=False, **sizes),
        "eager loop": peak_memory("norm_scan", loop=True, **sizes),
    }
