"""weight_grad: the gradient of a recurrent matrix, after the sweep. Maths in docs/ops/weight_grad.md."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssm_fast._torch import direct_apply
from ssm_fast.ops.dispatch import LIBRARY, cpu_kernel, native_kernel, needs_autograd
from ssm_fast.ops.layout import fold, last_contiguous
from ssm_fast.ops.linear import grouped_linear


def incoming(s: Tensor, s0: Tensor | None, reset: Tensor | None, reverse: bool) -> Tensor:
    """The state h that enters each step, [G, B, T, N]: ``s`` one step earlier in sweep order.

    Forward, ``h_t = (1 - reset_t) s_{t-1}`` with ``s_{-1} = s0``; in reverse,
    ``h_t = (1 - reset_{t+1}) s_{t+1}`` and nothing enters the last step.
    """
    edge = torch.zeros_like(s[:, :, :1]) if s0 is None else s0.unsqueeze(2)  # [G, B, 1, N]
    if reverse:
        if reset is not None:
            s = s.masked_fill(reset.unsqueeze(-1), 0)
        return torch.cat([s[:, :, 1:], edge], dim=2)
    h = torch.cat([edge, s[:, :, :-1]], dim=2)
    return h if reset is None else h.masked_fill(reset.unsqueeze(-1), 0)


def reference(
    x: Tensor, s: Tensor, s0: Tensor | None, reset: Tensor | None, reverse: bool
) -> Tensor:
    """The sum as torch calls: [G, B, T, N] twice -> [G, N, N]."""
    return torch.einsum("gbtn,gbtm->gnm", x, incoming(s, s0, reset, reverse))


LIBRARY.define(
    "weight_grad(Tensor x, Tensor s, Tensor? s0, Tensor? reset, bool reverse) -> Tensor",
)


@torch.library.register_fake("ssm_fast::weight_grad")
def _(x: Tensor, s: Tensor, s0: Tensor | None, reset: Tensor | None, reverse: bool) -> Tensor:
    G, _, _, N = x.shape
    return x.new_empty(G, N, N)


@cpu_kernel("weight_grad")
def _op(x: Tensor, s: Tensor, s0: Tensor | None, reset: Tensor | None, reverse: bool) -> Tensor:
    G, _, _, N = x.shape
    if x.numel() == 0:
        return x.new_zeros(G, N, N)
    grad = x.new_empty(G, N, N)
    x, s = last_contiguous(x), last_contiguous(s)
    s0 = None if s0 is None else last_contiguous(s0)
    native_kernel("weight_grad", x.dtype)(x, s, s0, reset, grad, x.shape, reverse)
    return grad


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def _product(x: Tensor, matrix: Tensor) -> Tensor:
    """Rows times the matrix of their group, one GEMM a group: [G, B, T, N]."""
    return grouped_linear(x.flatten(1, 2), matrix.mT).view(x.shape)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x, s and s0; bilinear, so torch's own formulas serve the higher orders."""
    x, s, s0, reset = ctx.saved_tensors
    grad_x = _product(incoming(s, s0, reset, ctx.reverse), grad.mT)
    grad_h = _product(x, grad)
    grad_s0 = None
    if s0 is not None:
        grad_s0 = grad_h[:, :, 0] if x.shape[2] else torch.zeros_like(s0)
        if reset is not None and x.shape[2]:
            grad_s0 = grad_s0.masked_fill(reset[:, :, 0, None], 0)
    return grad_x, incoming(grad_h, None, reset, not ctx.reverse), grad_s0, None, None


class WeightGrad(torch.autograd.Function):
    """Autograd of the sum."""

    @staticmethod
    def forward(  # noqa: D102
        x: Tensor, s: Tensor, s0: Tensor | None, reset: Tensor | None, reverse: bool
    ) -> Tensor:
        return _op(x, s, s0, reset, reverse)

    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_gradients)

    @staticmethod
    def jvp(  # noqa: D102
        ctx: Any, x_t: Tensor | None, s_t: Tensor | None, s0_t: Tensor | None, *_: None
    ) -> Tensor:
        x, s, s0, reset = ctx.saved_tensors
        tangent = x.new_zeros(x.shape[0], x.shape[-1], x.shape[-1])
        if x_t is not None:
            tangent = tangent + weight_grad(x_t, s, s0, reset, ctx.reverse)
        if s_t is not None or s0_t is not None:
            s_t = torch.zeros_like(s) if s_t is None else s_t
            tangent = tangent + weight_grad(x, s_t, s0_t, reset, ctx.reverse)
        return tangent

    @staticmethod
    def vmap(  # noqa: D102
        info: Any,
        in_dims: tuple[int | None, ...],
        x: Tensor,
        s: Tensor,
        s0: Tensor | None,
        reset: Tensor | None,
        reverse: bool,
    ) -> tuple[Tensor, int]:
        V = info.batch_size
        x, s = fold(x, in_dims[0], V, 0), fold(s, in_dims[1], V, 0)
        s0 = None if s0 is None else fold(s0, in_dims[2], V, 0)
        reset = None if reset is None else fold(reset, in_dims[3], V, 0)
        return _differentiable(x, s, s0, reset, reverse).unflatten(0, (V, -1)), 0


_differentiable = direct_apply(WeightGrad)

torch.library.register_autograd(
    "ssm_fast::weight_grad",
    _gradients,
    setup_context=lambda ctx, inputs, output: _setup_context(ctx, inputs, output),
)


def weight_grad(
    x: Tensor, s: Tensor, s0: Tensor | None, reset: Tensor | None, reverse: bool
) -> Tensor:
    """Sum ``x_t h_t^T`` over rows and time, where ``h`` are the incoming states of a scan.

    The gradient of a recurrent matrix from the adjoint variables ``x`` of a sweep. Internal to the
    scans: arguments are not validated.

    Args:
        x: ``[G, B, T, N]``.
        s: states that the scan gave, ``[G, B, T, N]``.
        s0: its initial state, ``[G, B, N]``, or None.
        reset: its episode starts, boolean ``[G, B, T]``, or None.
        reverse: whether the scan ran from the last step to the first.

    Returns:
        ``[G, N, N]``, bitwise the same for any number of threads.
    """
    if not torch.compiler.is_compiling() and needs_autograd(x, s, s0):
        return _differentiable(x, s, s0, reset, reverse)
    return _op(x, s, s0, reset, reverse)
