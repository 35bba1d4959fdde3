"""norm_scan: the recurrence with a layer norm on the state. Maths in docs/ops/norm_scan.md."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from ssm_fast._native import Sweep
from ssm_fast._torch import direct_apply
from ssm_fast.ops.dispatch import LIBRARY, Impl, choose, cpu_kernel, native_kernel, needs_autograd
from ssm_fast.ops.layer_norm import normalised, project_norm
from ssm_fast.ops.layout import empty_states, fold, last_contiguous
from ssm_fast.ops.validation import check_dtypes, check_reset, check_shape, check_tensors, promoted
from ssm_fast.ops.weight_grad import incoming, weight_grad


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
        n, _ = normalised(state @ A.mT + u[:, :, t], eps)
        state = n * weight + bias
        states.append(state)
    return torch.stack(states, dim=2)


# Three sweeps, each with G groups that have weights of their own. n is the normalised state, rstd
# the reciprocal standard deviation, P(x) = x - mean(x) - n mean(x n), and h the incoming states.
#   norm_scan:         z_t = A h_{t-1} + u_t,  n_t = (z_t - mean(z_t)) rstd_t,  s_t = n_t w + b
#   norm_scan_tangent: z_t = A h_{t-1} + a_t,  s_t = c_t + w rstd_t P(z_t)
#   norm_scan_adjoint: s_t = A^T h_{t+1} + g_t,  z_t = q_t + rstd_t P(w s_t),  in reverse, h from z
# The last two are linear in their sources and each other's adjoint: gradients of any order close.
LIBRARY.define(
    "norm_scan(Tensor u, Tensor A, Tensor weight, Tensor bias, Tensor? s0, Tensor? reset, "
    "float eps, bool save) -> (Tensor, Tensor, Tensor)",
)
LIBRARY.define(
    "norm_scan_tangent(Tensor a, Tensor? c, Tensor A, Tensor weight, Tensor n, Tensor rstd, "
    "Tensor? s0, Tensor? reset) -> (Tensor, Tensor)",
)
LIBRARY.define(
    "norm_scan_adjoint(Tensor g, Tensor? q, Tensor A, Tensor weight, Tensor n, Tensor rstd, "
    "Tensor? reset) -> (Tensor, Tensor)",
)
# The adjoint sweep of a first-order gradient: z, and instead of s the gradients of w and b.
LIBRARY.define(
    "norm_scan_gradients(Tensor g, Tensor? q, Tensor A, Tensor weight, Tensor n, Tensor rstd, "
    "Tensor? reset) -> (Tensor, Tensor, Tensor)",
)


@torch.library.register_fake("ssm_fast::norm_scan")
def _(
    u: Tensor,
    A: Tensor,
    weight: Tensor,
    bias: Tensor,
    s0: Tensor | None,
    reset: Tensor | None,
    eps: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if not save:
        return empty_states(u), u.new_empty(0), u.new_empty(0)
    return empty_states(u), empty_states(u), u.new_empty(u.shape[:3])


# n is the fifth argument of the sweeps, weight the fourth.
@torch.library.register_fake("ssm_fast::norm_scan_tangent")
@torch.library.register_fake("ssm_fast::norm_scan_adjoint")
def _(*tensors: Tensor | None) -> tuple[Tensor, Tensor]:
    n = cast("Tensor", tensors[4])
    return empty_states(n), empty_states(n)


@torch.library.register_fake("ssm_fast::norm_scan_gradients")
def _(*tensors: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    weight, n = cast("tuple[Tensor, Tensor]", tensors[3:5])
    return empty_states(n), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def _sweep(
    sweep: Sweep,
    u: Tensor,
    c: Tensor | None,
    A: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    n: Tensor | None,
    rstd: Tensor | None,
    s0: Tensor | None,
    reset: Tensor | None,
    s: Tensor,
    x: Tensor | None,
    eps: float = 0.0,
    grad_weight: Tensor | None = None,
    grad_bias: Tensor | None = None,
) -> None:
    """Run one of the sweeps in C++; it writes ``s``, and ``n`` and ``rstd``, ``x`` or the sums."""
    if s.numel() == 0:
        return
    u = last_contiguous(u)
    c = None if c is None else last_contiguous(c)
    s0 = None if s0 is None else last_contiguous(s0)
    weight = last_contiguous(weight)
    bias = None if bias is None else last_contiguous(bias)
    native_kernel("norm_scan", u.dtype)(
        sweep, u, c, A, weight, bias, n, rstd, s0, reset, s, x, u.shape, eps, grad_weight, grad_bias
    )


@cpu_kernel("norm_scan")
def _scan(
    u: Tensor,
    A: Tensor,
    weight: Tensor,
    bias: Tensor,
    s0: Tensor | None,
    reset: Tensor | None,
    eps: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    s = empty_states(u)
    n = empty_states(u) if save else None
    rstd = u.new_empty(u.shape[:3]) if save else None
    _sweep(Sweep.forward, u, None, A, weight, bias, n, rstd, s0, reset, s, None, eps)
    if n is None or rstd is None:
        return s, u.new_empty(0), u.new_empty(0)
    return s, n, rstd


@cpu_kernel("norm_scan_tangent", "norm_scan")
def _scan_tangent(
    a: Tensor,
    c: Tensor | None,
    A: Tensor,
    weight: Tensor,
    n: Tensor,
    rstd: Tensor,
    s0: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor]:
    s, z = empty_states(n), empty_states(n)
    n, rstd = last_contiguous(n), rstd.contiguous()
    _sweep(Sweep.tangent, a, c, A, weight, None, n, rstd, s0, reset, s, z)
    return s, z


@cpu_kernel("norm_scan_adjoint", "norm_scan")
def _scan_adjoint(
    g: Tensor,
    q: Tensor | None,
    A: Tensor,
    weight: Tensor,
    n: Tensor,
    rstd: Tensor,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor]:
    z, s = empty_states(n), empty_states(n)
    n, rstd = last_contiguous(n), rstd.contiguous()
    _sweep(Sweep.adjoint, g, q, A.mT, weight, None, n, rstd, None, reset, z, s)
    return z, s


@cpu_kernel("norm_scan_gradients", "norm_scan")
def _scan_gradients(
    g: Tensor,
    q: Tensor | None,
    A: Tensor,
    weight: Tensor,
    n: Tensor,
    rstd: Tensor,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    z = empty_states(n)
    empty = weight.new_zeros if z.numel() == 0 else weight.new_empty
    sums = empty(weight.shape), empty(weight.shape)
    n, rstd = last_contiguous(n), rstd.contiguous()
    _sweep(Sweep.adjoint, g, q, A.mT, weight, None, n, rstd, None, reset, z, None, 0.0, *sums)
    return z, *sums


def _project(x: Tensor, n: Tensor, rstd: Tensor) -> Tensor:
    """The Jacobian of the norm, rstd P(x), with rstd [G, B, T]: [G, B, T, N]."""
    return project_norm(x, n, rstd.unsqueeze(-1))


def _project_change(
    x: Tensor, n: Tensor, rstd: Tensor, n_t: Tensor | None, rstd_t: Tensor | None
) -> Tensor:
    """The tangent of rstd P(x) in the directions ``n_t`` and ``rstd_t``."""
    change = torch.zeros_like(n)
    if rstd_t is not None:
        change = change + _project(x, n, rstd_t)
    if n_t is not None:
        mean_n, mean_t = (x * n).mean(-1, keepdim=True), (x * n_t).mean(-1, keepdim=True)
        change = change - (n_t * mean_n + n * mean_t) * rstd.unsqueeze(-1)
    return change


def _initial(z: Tensor, A: Tensor, reset: Tensor | None) -> Tensor:
    """The gradient of the initial state, [G, B, N]."""
    grad = z[:, :, 0] @ A
    return grad if reset is None else grad.masked_fill(reset[:, :, 0, None], 0)


def _adjoint(*tensors: Tensor | None) -> tuple[Tensor, Tensor]:
    run = _adjoint_differentiable if needs_autograd(*tensors) else _scan_adjoint
    return run(*tensors)


def _tangent(*tensors: Tensor | None) -> tuple[Tensor, Tensor]:
    run = _tangent_differentiable if needs_autograd(*tensors) else _scan_tangent
    return run(*tensors)


def _coefficient_gradients(
    wanted: tuple[bool, ...],
    tangents: tuple[Tensor, Tensor],
    adjoints: tuple[Tensor, Tensor],
    weight: Tensor,
    n: Tensor,
    rstd: Tensor,
    s0: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of A, w, n and rstd, those that are wanted.

    Both linear sweeps have the bilinear form ``sum <ζ, A h> + <w σ, rstd P(z)>`` of the tangents
    ``(s, z)`` and the adjoints ``(ζ, σ)``.
    """
    (s, z), (zeta, sigma) = tangents, adjoints
    grad_A = weight_grad(zeta, s, s0, reset, False) if wanted[0] else None
    grad_w = grad_n = grad_rstd = None
    if wanted[1]:
        grad_w = (sigma * _project(z, n, rstd)).sum((1, 2))
    if wanted[2] or wanted[3]:
        p = sigma * weight[:, None, None]  # [G, B, T, N]
        mean_p, mean_z = (p * n).mean(-1, keepdim=True), (z * n).mean(-1, keepdim=True)
        grad_n = -rstd.unsqueeze(-1) * (z * mean_p + p * mean_z)
        grad_rstd = (p * _project(z, n, torch.ones_like(rstd))).sum(-1)
    return grad_A, grad_w, grad_n, grad_rstd


def _vmapped(
    function: Any,
    V: int,
    in_dims: tuple[int | None, ...],
    tensors: tuple[Tensor | None, ...],
    weights: set[int],
    *constants: float,
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Apply a Function over a vmapped dimension: groups if a weight has it, else rows.

    ``weights`` are the places of the tensors that belong to a group.
    """
    to = 0 if any(in_dims[i] is not None for i in weights) else 1
    folded = [
        x if x is None or (to == 1 and i in weights) else fold(x, in_dims[i], V, to)
        for i, x in enumerate(tensors)
    ]
    outputs = tuple(x.unflatten(to, (V, -1)) for x in function.apply(*folded, *constants))
    return outputs, (to,) * len(outputs)


class NormScan(torch.autograd.Function):
    """Autograd of the scan; its outputs are s, and n and rstd for the sweeps of its gradients."""

    @staticmethod
    def forward(  # noqa: D102
        u: Tensor,
        A: Tensor,
        weight: Tensor,
        bias: Tensor,
        s0: Tensor | None,
        reset: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _scan(u, A, weight, bias, s0, reset, eps, True)

    @staticmethod
    def setup_context(  # noqa: D102
        ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        _, A, weight, _, s0, reset, *_ = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(A, weight, s0, reset, *output)
        ctx.save_for_forward(A, weight, s0, reset, *output)

    @staticmethod
    def backward(  # noqa: D102
        ctx: Any, grad_s: Tensor | None, grad_n: Tensor | None, grad_rstd: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        A, weight, s0, reset, s, n, rstd = ctx.saved_tensors
        source = None  # what reaches z past s: n and rstd are functions of z alone
        if grad_n is not None:
            source = _project(grad_n, n, rstd)
        if grad_rstd is not None:
            through = -n * (grad_rstd * rstd.square() / n.shape[-1]).unsqueeze(-1)
            source = through if source is None else source + through
        if grad_s is None:
            grad_s = torch.zeros_like(s)
        wanted = ctx.needs_input_grad
        sweep = grad_s, source, A, weight, n, rstd, reset
        if needs_autograd(*sweep):
            z_grad, s_grad = _adjoint(*sweep)
            grad_w = (s_grad * n).sum((1, 2)) if wanted[2] else None
            grad_b = s_grad.sum((1, 2)) if wanted[3] else None
        else:
            z_grad, grad_w, grad_b = _scan_gradients(*sweep)
        return (
            z_grad,
            weight_grad(z_grad, s, s0, reset, False) if wanted[1] else None,
            grad_w,
            grad_b,
            _initial(z_grad, A, reset) if wanted[4] else None,
            *(None,) * (len(wanted) - 5),
        )

    @staticmethod
    def jvp(  # noqa: D102
        ctx: Any,
        u_t: Tensor | None,
        A_t: Tensor | None,
        weight_t: Tensor | None,
        bias_t: Tensor | None,
        s0_t: Tensor | None,
        *_: None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        A, weight, s0, reset, s, n, rstd = ctx.saved_tensors
        before = torch.zeros_like(s) if u_t is None else u_t
        if A_t is not None:
            before = before + incoming(s, s0, reset, False) @ A_t.mT.unsqueeze(1)
        behind = None if weight_t is None else n * weight_t[:, None, None]
        if bias_t is not None:
            offset = bias_t[:, None, None].expand_as(n)
            behind = offset if behind is None else behind + offset
        s_t, z_t = _tangent(before, behind, A, weight, n, rstd, s0_t, reset)
        return s_t, _project(z_t, n, rstd), -rstd.square() * (n * z_t).mean(-1)

    @staticmethod
    def vmap(  # noqa: D102
        info: Any, in_dims: tuple[int | None, ...], *arguments: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        *tensors, eps = arguments
        return _vmapped(NormScan, info.batch_size, in_dims, tuple(tensors), {1, 2, 3}, eps)


class NormScanTangent(torch.autograd.Function):
    """Autograd of the tangent sweep."""

    @staticmethod
    def forward(*tensors: Tensor | None) -> tuple[Tensor, Tensor]:  # noqa: D102
        return _scan_tangent(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: D102
        _, _, A, weight, n, rstd, s0, reset = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(A, weight, n, rstd, reset, s0, *output)
        ctx.save_for_forward(A, weight, n, rstd, reset, s0, *output)

    @staticmethod
    def backward(  # noqa: D102
        ctx: Any, grad_s: Tensor | None, grad_z: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        A, weight, n, rstd, reset, s0, s, z = ctx.saved_tensors
        grad_s = torch.zeros_like(s) if grad_s is None else grad_s
        adjoints = _adjoint(grad_s, grad_z, A, weight, n, rstd, reset)
        wanted = ctx.needs_input_grad
        return (
            adjoints[0],
            adjoints[1] if wanted[1] else None,
            *_coefficient_gradients(wanted[2:6], (s, z), adjoints, weight, n, rstd, s0, reset),
            _initial(adjoints[0], A, reset) if wanted[6] else None,
            None,
        )

    @staticmethod
    def jvp(  # noqa: D102
        ctx: Any,
        a_t: Tensor | None,
        c_t: Tensor | None,
        A_t: Tensor | None,
        weight_t: Tensor | None,
        n_t: Tensor | None,
        rstd_t: Tensor | None,
        s0_t: Tensor | None,
        *_: None,
    ) -> tuple[Tensor, Tensor]:
        A, weight, n, rstd, reset, s0, s, z = ctx.saved_tensors
        before = torch.zeros_like(s) if a_t is None else a_t
        if A_t is not None:
            before = before + incoming(s, s0, reset, False) @ A_t.mT.unsqueeze(1)
        behind = torch.zeros_like(s) if c_t is None else c_t
        if weight_t is not None:
            behind = behind + weight_t[:, None, None] * _project(z, n, rstd)
        change = _project_change(z, n, rstd, n_t, rstd_t)
        behind = behind + weight[:, None, None] * change
        return _tangent(before, behind, A, weight, n, rstd, s0_t, reset)

    @staticmethod
    def vmap(  # noqa: D102
        info: Any, in_dims: tuple[int | None, ...], *tensors: Tensor | None
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return _vmapped(NormScanTangent, info.batch_size, in_dims, tensors, {2, 3})


class NormScanAdjoint(torch.autograd.Function):
    """Autograd of the adjoint sweep."""

    @staticmethod
    def forward(*tensors: Tensor | None) -> tuple[Tensor, Tensor]:  # noqa: D102
        return _scan_adjoint(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: D102
        _, _, A, weight, n, rstd, reset = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(A, weight, n, rstd, reset, *output)
        ctx.save_for_forward(A, weight, n, rstd, reset, *output)

    @staticmethod
    def backward(  # noqa: D102
        ctx: Any, grad_z: Tensor | None, grad_s: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        A, weight, n, rstd, reset, zeta, sigma = ctx.saved_tensors
        grad_z = torch.zeros_like(zeta) if grad_z is None else grad_z
        s, z = _tangent(grad_z, grad_s, A, weight, n, rstd, None, reset)
        wanted, adjoints = ctx.needs_input_grad, (zeta, sigma)
        return (
            s,
            z if wanted[1] else None,
            *_coefficient_gradients(wanted[2:6], (s, z), adjoints, weight, n, rstd, None, reset),
            None,
        )

    @staticmethod
    def jvp(  # noqa: D102
        ctx: Any,
        g_t: Tensor | None,
        q_t: Tensor | None,
        A_t: Tensor | None,
        weight_t: Tensor | None,
        n_t: Tensor | None,
        rstd_t: Tensor | None,
        *_: None,
    ) -> tuple[Tensor, Tensor]:
        A, weight, n, rstd, reset, zeta, sigma = ctx.saved_tensors
        before = torch.zeros_like(zeta) if g_t is None else g_t
        if A_t is not None:
            before = before + incoming(zeta, None, reset, True) @ A_t.unsqueeze(1)
        behind = torch.zeros_like(zeta) if q_t is None else q_t
        if weight_t is not None:
            behind = behind + _project(weight_t[:, None, None] * sigma, n, rstd)
        p = weight[:, None, None] * sigma
        behind = behind + _project_change(p, n, rstd, n_t, rstd_t)
        return _adjoint(before, behind, A, weight, n, rstd, reset)

    @staticmethod
    def vmap(  # noqa: D102
        info: Any, in_dims: tuple[int | None, ...], *tensors: Tensor | None
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return _vmapped(NormScanAdjoint, info.batch_size, in_dims, tensors, {2, 3})


_differentiable = direct_apply(NormScan)
_tangent_differentiable = direct_apply(NormScanTangent)
_adjoint_differentiable = direct_apply(NormScanAdjoint)

# What torch.compile traces: the ops with the same gradients registered on them.
torch.library.register_autograd(
    "ssm_fast::norm_scan",
    NormScan.backward,
    setup_context=lambda ctx, inputs, output: NormScan.setup_context(ctx, inputs, output),
)
torch.library.register_autograd(
    "ssm_fast::norm_scan_tangent",
    NormScanTangent.backward,
    setup_context=lambda ctx, inputs, output: NormScanTangent.setup_context(ctx, inputs, output),
)
torch.library.register_autograd(
    "ssm_fast::norm_scan_adjoint",
    NormScanAdjoint.backward,
    setup_context=lambda ctx, inputs, output: NormScanAdjoint.setup_context(ctx, inputs, output),
)


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
    arXiv 1607.06450, section 3.1). Differentiable any number of times, forward mode included; under
    ``torch.func.vmap`` a batch of weights runs as groups of one call.

    Args:
        u: input of every step, ``[B, T, N]``, or ``[G, B, T, N]`` with weights per group; float32
            or float64; any batch and time stride.
        A: state matrix, ``[N, N]``, or ``[G, N, N]``.
        weight: gain of the norm, ``[N]``, or ``[G, N]``.
        bias: offset of the norm, ``[N]``, or ``[G, N]``.
        s0: state before the first step, ``[B, N]`` or ``[G, B, N]``; zeros if None.
        reset: ``[B, T]`` or ``[G, B, T]``, true (non-zero) where a new episode begins: the incoming
            state is zeroed before it is used.
        eps: added to the variance, positive.
        impl: "auto" (the kernel of the tensors' device), "native" (C++), "triton" or "reference".

    Returns:
        The states ``s``, shaped as ``u``; the last one is ``s[..., -1, :]``.

    Raises:
        ValueError: a shape, device or range is wrong, or ``impl`` is unknown or cannot run there.
        TypeError: a dtype is not supported, or the dtypes differ.
    """
    check_tensors(u=u, A=A, weight=weight, bias=bias, s0=s0)
    u, A, weight, bias, s0 = promoted(u, A, weight, bias, s0)
    if u.dim() not in (3, 4):
        raise ValueError(f"u must have shape [B, T, N] or [G, B, T, N], got {list(u.shape)}")
    chosen = choose("norm_scan", impl, u.device)
    check_dtypes("norm_scan", {"u": u, "A": A, "weight": weight, "bias": bias, "s0": s0})
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
    if chosen == "reference":
        s = reference(u, A, weight, bias, s0, reset, eps)
    elif torch.compiler.is_compiling():
        s, _, _ = _scan(u, A, weight, bias, s0, reset, eps, True)
    elif needs_autograd(u, A, weight, bias, s0):
        s, _, _ = _differentiable(u, A, weight, bias, s0, reset, eps)
    else:
        s, _, _ = _scan(u, A, weight, bias, s0, reset, eps, False)
    return s if grouped else s.squeeze(0)
