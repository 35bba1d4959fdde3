"""What the dense recurrences are compared with: their GEMM floor, torch's recurrent layers and JAX."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ssm_fast.bench.peers import jax_contenders, torch_contenders

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

__all__ = ["SHAPES", "jax_contenders", "three_mm", "torch_contenders"]

SHAPES = [  # B, T, N
    (8, 256, 64),
    (64, 256, 64),
    (64, 1000, 64),
    (32, 256, 128),
    (1, 1000, 64),
    (256, 128, 32),
]


def three_mm(u: Tensor, A: Tensor) -> Callable[[], None]:
    """The products that a recurrence and its gradients cannot do without."""
    x, A = u.detach().reshape(-1, u.shape[-1]).clone(), A.detach()

    def run() -> None:
        torch.mm(x, A)
        torch.mm(x, A)
        torch.mm(x.T, x)

    return run
