"""The gradient of a gradient norm: its time and, in a process of its own, the memory it takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from fresh_process import added_memory, in_fresh_process
from references import dense_scan_loop, norm_scan_loop

from ssm_fast.ops import dense_scan, norm_scan

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

SCANS = {
    "dense_scan": (dense_scan, dense_scan_loop),
    "norm_scan": (norm_scan, norm_scan_loop),
}


def gradients(op: str, *, loop: bool, B: int, T: int, N: int) -> Callable[[], tuple[Tensor, ...]]:
    """A call that differentiates the squared norm of an op's gradients."""
    generator = torch.Generator().manual_seed(0)
    u, weights = torch.randn(2, B, T, N, generator=generator)
    A = torch.linalg.qr(torch.randn(N, N, generator=generator))[0] * 0.9
    leaves = [u, A] if op == "dense_scan" else [u, A, torch.ones(N), torch.zeros(N)]
    leaves = [x.requires_grad_() for x in leaves]
    scan = SCANS[op][loop]

    def run() -> tuple[Tensor, ...]:
        first = torch.autograd.grad(scan(*leaves), leaves, weights, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    return run


def peak_memory(op: str, *, loop: bool, B: int, T: int, N: int) -> float:
    """MiB that the call adds to a fresh process."""
    return in_fresh_process(_memory_of, op, loop, B, T, N)


def _memory_of(op: str, loop: bool, B: int, T: int, N: int) -> float:
    gradients(op, loop=loop, B=2, T=4, N=8)()  # what every process pays once
    return added_memory(gradients(op, loop=loop, B=B, T=T, N=N))
