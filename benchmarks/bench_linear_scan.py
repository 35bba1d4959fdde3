"""linear_scan beside copies of the same bytes, into warm and into fresh memory, and the eager loop."""

from __future__ import annotations

import pytest
import torch
from contest import contest

from ssm_fast.ops import linear_scan
from ssm_fast.ops.dispatch import native_kernel

LONGEST_LOOP = 1024  # steps; beyond it the eager loop only takes time

CASES = {
    "B8-T256": ((8, 256), 1, torch.float32),
    "B64-T1000": ((64, 1000), 1, torch.float32),
    "B1024-T1024": ((1024, 1024), 1, torch.float32),
    "T1024-B1024": ((1024, 1024), 0, torch.float32),
    "B8-T1024-C128-N16": ((8, 1024, 128, 16), 1, torch.float32),
    "B1024-T1024-complex64": ((1024, 1024), 1, torch.complex64),
    "B1-T1000000": ((1, 1_000_000), 1, torch.float32),
}


def eager_loop(a, b, dim):
    state = torch.zeros_like(b.select(dim, 0))
    states = []
    for t in range(b.shape[dim]):
        state = torch.addcmul(b.select(dim, t), a.select(dim, t), state)
        states.append(state)
    return torch.stack(states, dim)


def into_warm_memory(a, b, dim):
    """The kernel alone, its output allocated beforehand."""
    sizes = b.shape[:dim].numel(), b.shape[dim], b.shape[dim + 1 :].numel()
    h = torch.empty_like(b)
    a, b, states = (x.reshape(sizes) for x in (a, b, h))
    kernel = native_kernel("linear_scan", b.dtype)
    return lambda: kernel(a, b, None, states, sizes, False, False)


@pytest.mark.parametrize("case", CASES)
def test_linear_scan_forward(benchmark, case):
    shape, dim, dtype = CASES[case]
    a, b = torch.rand(shape, dtype=dtype) / 2, torch.randn(shape, dtype=dtype)
    source = torch.randn(3 * b.numel() // 2, dtype=dtype)  # as many bytes are moved as by the scan
    target = torch.empty_like(source)
    contenders = {
        "linear_scan": lambda: linear_scan(a, b, dim=dim),
        "linear_scan, warm output": into_warm_memory(a, b, dim),
        "copy of the same bytes": lambda: target.copy_(source),
        "clone of the same bytes": lambda: source.clone(),
        "a + b": lambda: a + b,
    }
    if shape[dim] <= LONGEST_LOOP and b.numel() <= 1 << 20:
        contenders["eager loop"] = lambda: eager_loop(a, b, dim)
    contest(benchmark, "linear_scan", contenders, floor="copy of the same bytes")


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
