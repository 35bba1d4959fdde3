"""dense_scan beside its GEMM floor, the eager loop, torch's recurrent layers and JAX."""

from __future__ import annotations

import pytest
import torch
from contest import contest
from jax_scans import jax_contenders
from references import dense_scan_loop
from second_order import gradients, peak_memory

from ssm_fast.ops import dense_scan

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
    u = torch.randn(B, T, N, generator=generator)
    A = torch.nn.init.orthogonal_(torch.empty(N, N), 0.9)
    return u, A, torch.randn(B, T, N, generator=generator)


@pytest.mark.parametrize(("B", "T", "N"), SHAPES)
def test_dense_scan_forward(benchmark, B, T, N):
    u, A, _ = problem(B, T, N)
    x = u.reshape(-1, N)
    contenders = {
        "dense_scan": lambda: dense_scan(u, A),
        "one mm": lambda: torch.mm(x, A),
        **jax_contenders((u, A)),
        "eager loop": lambda: dense_scan_loop(u, A),
    }
    for kind in ("RNN", "GRU", "LSTM"):
        layer = getattr(torch.nn, kind)(N, N, batch_first=True)
        contenders[f"nn.{kind}"] = lambda layer=layer: layer(u)
    with torch.no_grad():
        contest(benchmark, "dense_scan", contenders, floor="one mm")


@pytest.mark.parametrize(("B", "T", "N"), SHAPES)
def test_dense_scan_forward_backward(benchmark, B, T, N):
    u, A, weights = problem(B, T, N)
    x = u.reshape(-1, N).clone()
    u.requires_grad_()
    A.requires_grad_()

    def three_mm():
        with torch.no_grad():
            torch.mm(x, A)
            torch.mm(x, A)
            torch.mm(x.T, x)

    contenders = {
        "dense_scan": lambda: torch.autograd.grad(dense_scan(u, A), (u, A), weights),
        "three mm": three_mm,
        **jax_contenders((u, A), weights),
        "eager loop": lambda: torch.autograd.grad(dense_scan_loop(u, A), (u, A), weights),
    }
    for kind in ("RNN", "GRU", "LSTM"):
        layer = getattr(torch.nn, kind)(N, N, batch_first=True)
        leaves = (u, *layer.parameters())
        contenders[f"nn.{kind}"] = lambda layer=layer, leaves=leaves: torch.autograd.grad(
            layer(u)[0], leaves, weights
        )
    contest(benchmark, "dense_scan", contenders, floor="three mm")


def test_dense_scan_second_order(benchmark):
    sizes = {"B": 16, "T": 256, "N": 64}
    contenders = {
        "dense_scan": gradients("dense_scan", loop=False, **sizes),
        "eager loop": gradients("dense_scan", loop=True, **sizes),
    }
    contest(benchmark, "dense_scan", contenders)
    benchmark.extra_info["peak_mib"] = {
        "dense_scan": peak_memory("dense_scan", loop=False, **sizes),
        "eager loop": peak_memory("dense_scan", loop=True, **sizes),
    }
