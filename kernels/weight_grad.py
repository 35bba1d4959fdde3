"""weight_grad on a GPU: one GEMM a group, torch's own. Maths in docs/ops/weight_grad.md."""

from __future__ import annotations

from torch import Tensor

from ssm_fast.ops.weight_grad import incoming


def weight_grad(
    x: Tensor, s: Tensor, s0: Tensor | None, reset: Tensor | None, reverse: bool
) -> Tensor:
    """The op ``ssm_fast::weight_grad``: [G, N, N]."""
    h = incoming(s, s0, reset, reverse)  # [G, B, T, N]
    if x.stride(2) > x.stride(1):  # time-major: put rows and time side by side without a copy
        x, h = x.transpose(1, 2), h.transpose(1, 2)
    return x.flatten(1, 2).mT @ h.flatten(1, 2)
