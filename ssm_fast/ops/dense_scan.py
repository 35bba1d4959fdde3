"""dense_scan: the linear recurrence with a full state matrix. Maths in docs/ops/dense_scan.md."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssm_fast._torch import direct_apply
from ssm_fast.ops.dispatch import LIBRARY, Impl, choose, cpu_kernel, native_kernel, needs_autograd
from ssm_fast.ops.layout import empty_states, fold, last_contiguous
from ssm_fast.ops.validation import check_dtypes, check_reset, check_shape, check_tensors, promoted
from ssm_fast.ops.weight_grad import incoming, weight_grad


def reference(u: Tensor, A: Tensor, s0: Tensor | None, reset: Tensor | None) -> Tensor:
    """The recurrence as a loop of differentiable torch calls: [G, B, T, N], any dtype and device."""
    state = torch.zeros_like(u[:, :, 0]) if s0 is None else s0  # [G, B, N]
    states = []
    for t in range(u.shape[2]):
        if reset is not None:
            state = state.masked_fill(reset[:, :, t, None], 0)
        state = state @ A.mT + u[:, :, t]
        states.append(state)
    return torch.stack(states, dim=2)


# One schema serves both sweeps. With G groups, each with a matrix of its own:
#   forward:  s_t = A h_{t-1} + u_t,  h_{t-1} = (1 - reset_t) s_{t-1},  s_{-1} = s0
#   reverse:  s_t = A h_{t+1} + u_t,  h_{t+1} = (1 - reset_{t+1}) s_{t+1},  h_T = 0
LIBRARY.define(
    "dense_scan(Tensor u, Tensor A, Tensor? s0, Tensor? reset, bool reverse) -> Tensor",
)


@torch.library.register_fake("ssm_fast::dense_scan")
def _(u: Tensor, A: Tensor, s0: Tensor | None, reset: Tensor | None, reverse: bool) -> Tensor:
    return empty_states(u)


@cpu_kernel("dense_scan")
def _op(u: Tensor, A: Tensor, s0: Tensor | None, reset: Tensor | None, reverse: bool) -> Tensor:
    s = empty_states(u)
    if s.numel() == 0:
        return s
    u = last_contiguous(u)
    s0 = None if s0 is None else last_contiguous(s0)
    native_kernel("dense_scan", u.dtype)(u, A, s0, reset, s, u.shape, reverse)
    return s


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, A, s0, reset, ctx.reverse = inputs
    ctx.save_for_backward(A, s0, reset, output)
    ctx.save_for_forward(A, s0, reset, output)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of u, A and s0. The adjoint sweep is the scan itself, backwards, with A^T."""
    A, s0, reset, s = ctx.saved_tensors
    scan = _op
    if not torch.compiler.is_compiling() and needs_autograd(grad, A, s0, s):
        scan = _differentiable
    adjoint = scan(grad, A.mT, None, reset, not ctx.reverse)  # [G, B, T, N], the gradient of u
    grad_A = grad_s0 = None
    if ctx.needs_input_grad[1]:
        grad_A = weight_grad(adjoint, s, s0, reset, ctx.reverse)
    if ctx.needs_input_grad[2]:
        grad_s0 = adjoint[:, :, 0] @ A
        if reset is not None:
            grad_s0 = grad_s0.masked_fill(reset[:, :, 0, None], 0)
    return adjoint, grad_A, grad_s0, None, None


class DenseScan(torch.autograd.Function):
    """Autograd of the scan. Its gradients call the Function again: any order is exact."""

    @staticmethod
    def forward(  # noqa: D102
        u: Tensor, A: Tensor, s0: Tensor | None, reset: Tensor | None, reverse: bool
    ) -> Tensor:
        return _op(u, A, s0, reset, reverse)

    setup_context = staticmethod(_setup_context)

    backward = staticmethod(_gradients)

    @staticmethod
    def jvp(  # noqa: D102
        ctx: Any,
        u_t: Tensor | None,
        A_t: Tensor | None,
        s0_t: Tensor | None,
        *_: None,
    ) -> Tensor:
        A, s0, reset, s = ctx.saved_tensors
        source = torch.zeros_like(s) if u_t is None else u_t
        if A_t is not None:
            source = source + incoming(s, s0, reset, ctx.reverse) @ A_t.mT.unsqueeze(1)
        return _differentiable(source, A, s0_t, reset, ctx.reverse)

    @staticmethod
    def vmap(  # noqa: D102
        info: Any,
        in_dims: tuple[int | None, ...],
        u: Tensor,
        A: Tensor,
        s0: Tensor | None,
        reset: Tensor | None,
        reverse: bool,
    ) -> tuple[Tensor, int]:
        V = info.batch_size
        to = 1 if in_dims[1] is None else 0  # a shared matrix: more rows; its own: more groups
        u = fold(u, in_dims[0], V, to)
        A = fold(A, in_dims[1], V, 0) if to == 0 else A
        s0 = None if s0 is None else fold(s0, in_dims[2], V, to)
        reset = None if reset is None else fold(reset, in_dims[3], V, to)
        return _differentiable(u, A, s0, reset, reverse).unflatten(to, (V, -1)), to


_differentiable = direct_apply(DenseScan)

# What torch.compile traces: the op with the same gradients registered on it.
torch.library.register_autograd("ssm_fast::dense_scan", _gradients, setup_context=_setup_context)


def sweep(
    u: Tensor, A: Tensor, s0: Tensor | None, reset: Tensor | None, reverse: bool = False
) -> Tensor:
    """`dense_scan` without a graph, or its adjoint. Internal to the models: nothing is validated.

    Args:
        u: ``[B, T, N]``.
        A: ``[N, N]``.
        s0: ``[B, N]``.
        reset: Boolean ``[B, T]``.
        reverse: Whether to run from the last step to the first.
    """
    s0 = None if s0 is None else s0.unsqueeze(0)
    reset = None if reset is None else reset.unsqueeze(0)
    s: Tensor = _op(u.unsqueeze(0), A.unsqueeze(0), s0, reset, reverse)
    return s.squeeze(0)


def matrix_gradient(adjoint: Tensor, s: Tensor, s0: Tensor, reset: Tensor) -> Tensor:
    """The gradient of ``A`` from the adjoint `sweep`, ``[N, N]``; internal and without a graph."""
    adjoint, s, s0, reset = (x.unsqueeze(0) for x in (adjoint, s, s0, reset))
    return weight_grad(adjoint, s, s0, reset, False).squeeze(0)


def dense_scan(
    u: Tensor,
    A: Tensor,
    s0: Tensor | None = None,
    reset: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Scan ``s_t = A h_{t-1} + u_t`` with ``h_{t-1} = (1 - reset_t) s_{t-1}`` over time.

    The linear state-space recurrence (Gu et al. 2021, arXiv 2111.00396, eq. 2) with a full matrix.
    Differentiable any number of times, forward mode included; under ``torch.func.vmap`` a batch of
    matrices runs as groups of one call.

    Args:
        u: input of every step, ``[B, T, N]``, or ``[G, B, T, N]`` with a matrix per group; float32
            or float64; any batch and time stride.
        A: state matrix, ``[N, N]``, or ``[G, N, N]``.
        s0: state before the first step, ``[B, N]`` or ``[G, B, N]``; zeros if None.
        reset: ``[B, T]`` or ``[G, B, T]``, true (non-zero) where a new episode begins: the incoming
            state is zeroed before it is used.
        impl: "auto" (the kernel of the tensors' device), "native" (C++), "triton" or "reference".

    Returns:
        The states ``s``, shaped as ``u``; the last one is ``s[..., -1, :]``.

    Raises:
        ValueError: a shape or device is wrong, or ``impl`` is unknown or cannot run there.
        TypeError: a dtype is not supported, or the dtypes differ.
    """
    check_tensors(u=u, A=A, s0=s0)
    u, A, s0 = promoted(u, A, s0)
    if u.dim() not in (3, 4):
        raise ValueError(f"u must have shape [B, T, N] or [G, B, T, N], got {list(u.shape)}")
    chosen = choose("dense_scan", impl, u.device)
    check_dtypes("dense_scan", {"u": u, "A": A, "s0": s0})
    grouped = u.dim() == 4
    *G, B, T, N = u.shape
    group, g = ("G, ", G) if grouped else ("", [])
    check_shape("A", A, f"[{group}N, N]", [*g, N, N])
    if s0 is not None:
        check_shape("s0", s0, f"[{group}B, N]", [*g, B, N])
    if reset is not None:
        reset = check_reset(reset, u, f"[{group}B, T]", [*g, B, T])
    if T == 0:
        return u.clone()
    if not grouped:
        u, A = u.unsqueeze(0), A.unsqueeze(0)
        s0 = None if s0 is None else s0.unsqueeze(0)
        reset = None if reset is None else reset.unsqueeze(0)
    if chosen == "reference":
        s = reference(u, A, s0, reset)
    elif not torch.compiler.is_compiling() and needs_autograd(u, A, s0):
        s = _differentiable(u, A, s0, reset, False)
    else:
        s = _op(u, A, s0, reset, False)
    return s if grouped else s.squeeze(0)
