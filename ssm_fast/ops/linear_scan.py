"""linear_scan: the elementwise linear recurrence. Maths in docs/ops/linear_scan.md."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ssm_fast._torch import direct_apply
from ssm_fast.ops.dispatch import LIBRARY, Impl, choose, cpu_kernel, native_kernel, needs_autograd
from ssm_fast.ops.validation import check_dtypes, check_shape, check_tensors, promoted


def reference(a: Tensor, b: Tensor, h0: Tensor | None, reverse: bool) -> Tensor:
    """The recurrence as a loop of differentiable torch calls: [M, T, C], any dtype and device."""
    T = b.shape[1]
    state = torch.zeros_like(b[:, 0]) if h0 is None else h0  # [M, C]
    states: list[Tensor] = []
    for t in reversed(range(T)) if reverse else range(T):
        state = a[:, t] * state + b[:, t]
        states.append(state)
    return torch.stack(states[::-1] if reverse else states, dim=1)


# One schema serves both sweeps. `shift` takes the coefficient of the step before in sweep order
# (none for the first step), which is what the adjoint of an unshifted scan needs:
#   reverse=False, shift=False:  h_t = a_t     h_{t-1} + b_t,  h_{-1} = h0
#   reverse=True,  shift=True:   h_t = a_{t+1} h_{t+1} + b_t,  h_T = 0
LIBRARY.define(
    "linear_scan(Tensor a, Tensor b, Tensor? h0, bool reverse, bool shift) -> Tensor",
)


@torch.library.register_fake("ssm_fast::linear_scan")
def _(a: Tensor, b: Tensor, h0: Tensor | None, reverse: bool, shift: bool) -> Tensor:
    return torch.empty_like(b)


@cpu_kernel("linear_scan")
def _op(a: Tensor, b: Tensor, h0: Tensor | None, reverse: bool, shift: bool) -> Tensor:
    h = torch.empty_like(b)  # in the layout of b where that is dense
    if h.numel() == 0:
        return h
    if b.is_complex():
        a, b = a.resolve_conj(), b.resolve_conj()
        h0 = None if h0 is None else h0.resolve_conj()
    a, b = a.resolve_neg(), b.resolve_neg()
    h0 = None if h0 is None else h0.resolve_neg()
    side_by_side = _unit_dim(h)
    if b.stride(side_by_side) != 1:
        b = torch.empty_like(h).copy_(b)
    if a.stride(side_by_side) > 1:
        a = torch.empty_like(h).copy_(a)
    native_kernel("linear_scan", b.dtype)(a, b, h0, h, h.shape, reverse, shift)
    return h


def _unit_dim(h: Tensor) -> int:
    """The dimension along which the elements of a dense tensor lie side by side."""
    sizes, strides = h.shape, h.stride()
    for dim in (2, 1, 0):
        if strides[dim] == 1 and sizes[dim] > 1:
            return dim
    return 2


def _later(x: Tensor, first: Tensor | None, reverse: bool) -> Tensor:
    """``x`` delayed by one step in sweep order, [M, T, C]; ``first`` (or zero) enters."""
    edge = torch.zeros_like(x[:, :1]) if first is None else first.unsqueeze(1)  # [M, 1, C]
    return torch.cat([x[:, 1:], edge] if reverse else [edge, x[:, :-1]], dim=1)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, _, h0, ctx.reverse, ctx.shift = inputs
    ctx.save_for_backward(a, h0, output)
    ctx.save_for_forward(a, h0, output)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of a, b and h0. The adjoint sweep is the scan itself, backwards and shifted."""
    a, h0, h = ctx.saved_tensors
    scan = _op
    if not torch.compiler.is_compiling() and needs_autograd(grad, a, h0, h):
        scan = _differentiable
    adjoint = scan(a.conj(), grad, None, not ctx.reverse, not ctx.shift)  # the gradient of b
    grad_a = grad_h0 = None
    if ctx.needs_input_grad[0]:
        if ctx.shift:
            grad_a = _later(adjoint, None, not ctx.reverse) * h.conj()
        else:
            grad_a = adjoint * _later(h, h0, ctx.reverse).conj()
    if ctx.needs_input_grad[2]:
        first = -1 if ctx.reverse else 0
        grad_h0 = torch.zeros_like(h0) if ctx.shift else a[:, first].conj() * adjoint[:, first]
    return grad_a, adjoint, grad_h0, None, None


class LinearScan(torch.autograd.Function):
    """Autograd of the scan. Its gradients call the Function again: any order is exact."""

    @staticmethod
    def forward(  # noqa: D102
        a: Tensor, b: Tensor, h0: Tensor | None, reverse: bool, shift: bool
    ) -> Tensor:
        return _op(a, b, h0, reverse, shift)

    setup_context = staticmethod(_setup_context)

    backward = staticmethod(_gradients)

    @staticmethod
    def jvp(  # noqa: D102
        ctx: Any,
        a_t: Tensor | None,
        b_t: Tensor | None,
        h0_t: Tensor | None,
        *_: None,
    ) -> Tensor:
        a, h0, h = ctx.saved_tensors
        source = torch.zeros_like(h) if b_t is None else b_t
        if a_t is not None:
            coefficient_t = _later(a_t, None, ctx.reverse) if ctx.shift else a_t
            source = source + coefficient_t * _later(h, None if ctx.shift else h0, ctx.reverse)
        return _differentiable(a, source, h0_t, ctx.reverse, ctx.shift)

    @staticmethod
    def vmap(  # noqa: D102
        info: Any,
        in_dims: tuple[int | None, ...],
        a: Tensor,
        b: Tensor,
        h0: Tensor | None,
        reverse: bool,
        shift: bool,
    ) -> tuple[Tensor, int]:
        V = info.batch_size

        def fold(x: Tensor | None, in_dim: int | None) -> Tensor | None:
            if x is None:
                return None
            x = x.expand(V, *x.shape) if in_dim is None else x.movedim(in_dim, 0)
            return x.flatten(0, 1)

        folded = (fold(x, d) for x, d in zip((a, b, h0), in_dims, strict=False))
        return _differentiable(*folded, reverse, shift).unflatten(0, (V, -1)), 0


_differentiable = direct_apply(LinearScan)

# What torch.compile traces: the op with the same gradients registered on it.
torch.library.register_autograd("ssm_fast::linear_scan", _gradients, setup_context=_setup_context)


def linear_scan(
    a: Tensor,
    b: Tensor,
    h0: Tensor | None = None,
    reverse: bool = False,
    dim: int = 1,
    impl: Impl = "auto",
) -> Tensor:
    """Scan ``h_t = a_t * h_{t-1} + b_t`` elementwise over time.

    The diagonal state-space recurrence (Gupta et al. 2022, arXiv 2203.14343; Smith et al. 2023,
    arXiv 2208.04933, eq. 4). Differentiable any number of times, forward mode included.

    Args:
        a: coefficients, broadcastable to the shape of ``b``.
        b: inputs, ``[B, T, ...]``, or with time as dimension ``dim``; float32, float64, complex64
            or complex128.
        h0: state before the first step (after the last one in reverse), the shape of ``b`` without
            its time dimension; zeros if None.
        reverse: scan from the last step to the first, ``h_t = a_t * h_{t+1} + b_t``.
        dim: the time dimension of ``b``.
        impl: "auto" (the kernel of the tensors' device), "native" (C++), "triton" or "reference".

    Returns:
        The states ``h``, shaped as ``b``.

    Raises:
        ValueError: a shape or device is wrong, or ``impl`` is unknown or cannot run there.
        TypeError: a dtype is not supported, or the dtypes differ.
    """
    check_tensors(a=a, b=b, h0=h0)
    a, b, h0 = promoted(a, b, h0)
    chosen = choose("linear_scan", impl, b.device)
    check_dtypes("linear_scan", {"b": b, "a": a, "h0": h0}, complex_too=True)
    if not -b.dim() <= dim < b.dim():
        raise ValueError(f"dim must be a dimension of b, {list(b.shape)}, got {dim}")
    dim %= b.dim()
    if a.dim() != b.dim() or a.shape != b.shape:
        try:
            a = a.expand(b.shape)
        except RuntimeError:
            raise ValueError(
                f"a must be broadcastable to the shape of b, {list(b.shape)}, got {list(a.shape)}"
            ) from None
    if h0 is not None:
        check_shape("h0", h0, "b without time", [*b.shape[:dim], *b.shape[dim + 1 :]])
    if b.numel() == 0:
        return b.clone()

    shape = b.shape
    before, T, after = math.prod(shape[:dim]), shape[dim], math.prod(shape[dim + 1 :])
    a, b = a.reshape(before, T, after), b.reshape(before, T, after)  # [M, T, C]
    h0 = None if h0 is None else h0.reshape(before, after)
    if chosen == "reference":
        h = reference(a, b, h0, reverse)
    elif not torch.compiler.is_compiling() and needs_autograd(a, b, h0):
        h = _differentiable(a, b, h0, reverse, False)
    else:
        h = _op(a, b, h0, reverse, False)
    return h.reshape(shape)
