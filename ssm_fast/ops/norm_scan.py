"""norm_scan: the recurrence with a layer norm on the state. Maths in docs/ops/norm_scan.md."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from ssm_fast.ops.backend import IMPLS, Impl, check_dtype, check_reset, check_shape, check_tensors


def reference(
    u: Tensor,
    A: Tensor,
    weight: Tensor,
    bias: Tensor,
    s0: Tensor | None,
    reset: Tensor | None,
    eps: float,
) -> Tensor:
    """The recurrence as a loop of differentiable torch calls: [G, B, T, N], any dtype and device."""
    weight, bias = weight.unsqueeze(1), bias.unsqueeze(1)  # [G, 1, N]
    state = torch.zeros_like(u[:, :, 0]) if s0 is None else s0  # [G, B, N]
    states = []
    for t in range(u.shape[2]):
        if reset is not None:
            state = state.masked_fill(reset[:, :, t, None], 0)
        z = state @ A.mT + u[:, :, t]
        state = layer_norm(z, z.shape[-1:], eps=eps) * weight + bias
        states.append(state)
    return torch.stack(states, dim=2)


def norm_scan(
    u: Tensor,
    A: Tensor,
    weight: Tensor,
    bias: Tensor,
    s0: Tensor | None = None,
    reset: Tensor | None = None,
    eps: float = 1e-5,
    impl: Impl = "auto",
) -> Tensor:
    """Scan ``z_t = A h_{t-1} + u_t``, ``s_t = LN(z_t) * weight + bias`` over time.

    ``h_{t-1} = (1 - reset_t) s_{t-1}``; LN is layer normalisation over the state (Ba et al. 2016,
    arXiv 1607.06450, section 3.1). This version runs the reference recurrence on every device.

    Args:
        u: input of every step, ``[B, T, N]``, or ``[G, B, T, N]`` with weights per group; float32
            or float64.
        A: state matrix, ``[N, N]``, or ``[G, N, N]``.
        weight: gain of the norm, ``[N]``, or ``[G, N]``.
        bias: offset of the norm, ``[N]``, or ``[G, N]``.
        s0: state before the first step, ``[B, N]`` or ``[G, B, N]``; zeros if None.
        reset: ``[B, T]`` or ``[G, B, T]``, true (non-zero) where a new episode begins.
        eps: added to the variance, positive.
        impl: "auto" or "reference".

    Returns:
        The states ``s``, shaped as ``u``; the last one is ``s[..., -1, :]``.

    Raises:
        ValueError: a shape, device or range is wrong, or ``impl`` is unknown.
        RuntimeError: ``impl`` names a kernel that norm_scan does not have.
        TypeError: a dtype is not supported, or the dtypes differ.
    """
    check_tensors(u=u, A=A, weight=weight, bias=bias)
    if impl not in IMPLS:
        raise ValueError(f"unknown impl {impl!r}; expected one of {', '.join(IMPLS)}")
    if impl not in ("auto", "reference"):
        raise RuntimeError(f"norm_scan has no {impl} kernel yet; expected 'auto' or 'reference'")
    if u.dim() not in (3, 4):
        raise ValueError(f"u must have shape [B, T, N] or [G, B, T, N], got {list(u.shape)}")
    check_dtype("norm_scan", {"u": u, "A": A, "weight": weight, "bias": bias, "s0": s0})
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")
    grouped = u.dim() == 4
    *G, B, T, N = u.shape
    group, g = ("G, ", G) if grouped else ("", [])
    check_shape("A", A, f"[{group}N, N]", [*g, N, N])
    check_shape("weight", weight, f"[{group}N]", [*g, N])
    check_shape("bias", bias, f"[{group}N]", [*g, N])
    if s0 is not None:
        check_shape("s0", s0, f"[{group}B, N]", [*g, B, N])
    if reset is not None:
        reset = check_reset(reset, u, f"[{group}B, T]", [*g, B, T])
    if T == 0:
        return u.clone()
    if not grouped:
        u, A, weight, bias = (x.unsqueeze(0) for x in (u, A, weight, bias))
        s0 = None if s0 is None else s0.unsqueeze(0)
        reset = None if reset is None else reset.unsqueeze(0)
    s = reference(u, A, weight, bias, s0, reset, eps)
    return s if grouped else s.squeeze(0)
