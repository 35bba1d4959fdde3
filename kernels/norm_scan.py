"""norm_scan and its two linear sweeps on a GPU. Maths in docs/ops/norm_scan.md."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm_fast.kernels.recurrence import (
    OPTIONS,
    accumulator,
    flags_of,
    matrix_of,
    multiply,
    only_if,
    plan,
    resident_matrix,
    strides,
)
from ssm_fast.ops.layout import empty_states, last_contiguous

_SIZES = (
    "u_g", "u_b", "u_t", "c_g", "c_b", "c_t", "A_g", "A_row", "A_col", "weight_g", "bias_g",
    "n_g", "n_b", "n_t", "s0_g", "s0_b", "reset_g", "reset_b", "reset_t", "s_g", "s_b", "s_t",
    "B", "T",
)  # fmt: skip


@triton.jit
def mean_of(x, N: tl.constexpr):
    """The mean of each row, [BB, 1]."""
    return (tl.sum(x, axis=1) * (1.0 / N))[:, None]


@triton.jit
def project(x, n, N: tl.constexpr):
    """P(x) = x - mean(x) - n mean(x n); the columns outside are not zero."""
    return x - mean_of(x, N) - n * mean_of(x * n, N)


# SWEEP "forward" writes s, and n and rstd where they are given; "tangent" writes s and x = z;
# "adjoint" runs in reverse with A^T and writes s = z and x = s, in the names of ops/norm_scan.py.
@triton.jit(do_not_specialize=_SIZES)
def kernel(
    p_u, p_c, p_A, p_weight, p_bias, p_n, p_rstd, p_s0, p_reset, p_s, p_x,
    u_g, u_b, u_t, c_g, c_b, c_t, A_g, A_row, A_col, weight_g, bias_g, n_g, n_b, n_t,
    s0_g, s0_b, reset_g, reset_b, reset_t, s_g, s_b, s_t, B, T,
    eps: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, BB: tl.constexpr,
    SWEEP: tl.constexpr, PRODUCT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    REVERSE: tl.constexpr = SWEEP == "adjoint"
    FORWARD: tl.constexpr = SWEEP == "forward"
    blocks = tl.cdiv(B, BB)
    i_g = (tl.program_id(0) // blocks).to(tl.int64)
    b = (tl.program_id(0) % blocks) * BB + tl.arange(0, BB)
    o_n = tl.arange(0, BN)
    columns = (o_n < N)[None, :]
    in_batch = b < B
    inside = in_batch[:, None] & columns
    b = b.to(tl.int64)
    p_A += i_g * A_g
    W = resident_matrix(p_A, A_row, A_col, N, BN, PRODUCT, ACC)
    weight = tl.load(p_weight + i_g * weight_g + o_n, mask=o_n < N, other=0.0).to(ACC)[None, :]
    if p_bias is not None:
        bias = tl.load(p_bias + i_g * bias_g + o_n, mask=o_n < N, other=0.0).to(ACC)[None, :]

    h = tl.zeros((BB, BN), ACC)
    if p_s0 is not None:
        o_s0 = i_g * s0_g + b[:, None] * s0_b + o_n[None, :]
        h += tl.load(p_s0 + o_s0, mask=inside, other=0.0).to(ACC)

    # What a step reads is asked for two steps ahead, before the store of the step in between.
    step: tl.constexpr = -1 if REVERSE else 1
    t = ((T - 1) * (1 if REVERSE else 0)).to(tl.int64)
    p_u += i_g * u_g + b[:, None] * u_b + t * u_t + o_n[None, :]
    u = tl.load(p_u, mask=inside, other=0.0)
    p_u += step * u_t
    u_1 = tl.load(p_u, mask=only_if(T > 1, inside), other=0.0)
    if p_c is not None:
        p_c += i_g * c_g + b[:, None] * c_b + t * c_t + o_n[None, :]
        c = tl.load(p_c, mask=inside, other=0.0)
        p_c += step * c_t
        c_1 = tl.load(p_c, mask=only_if(T > 1, inside), other=0.0)
    if p_n is not None:
        p_n += i_g * n_g + b[:, None] * n_b + t * n_t + o_n[None, :]
        p_rstd += (i_g * B + b) * T + t
    if not FORWARD:
        n = tl.load(p_n, mask=inside, other=0.0)
        rstd = tl.load(p_rstd, mask=in_batch, other=0.0)
        p_n += step * n_t
        p_rstd += step
        n_1 = tl.load(p_n, mask=only_if(T > 1, inside), other=0.0)
        rstd_1 = tl.load(p_rstd, mask=only_if(T > 1, in_batch), other=0.0)
    if p_reset is not None:
        gate = t + 1 if REVERSE else t  # the step whose reset cuts the incoming state
        p_reset += i_g * reset_g + b * reset_b + gate * reset_t
        if REVERSE:
            cut = tl.zeros((BB,), tl.uint8)  # nothing enters the last step
        else:
            cut = tl.load(p_reset, mask=in_batch, other=0)
        p_reset += step * reset_t
        cut_1 = tl.load(p_reset, mask=only_if(T > 1, in_batch), other=0)
    p_s += i_g * s_g + b[:, None] * s_b + t * s_t + o_n[None, :]
    if p_x is not None:
        p_x += i_g * s_g + b[:, None] * s_b + t * s_t + o_n[None, :]

    for i in range(T):
        ahead = only_if(i + 2 < T, inside)
        p_u += step * u_t
        u_2 = tl.load(p_u, mask=ahead, other=0.0)
        if p_c is not None:
            p_c += step * c_t
            c_2 = tl.load(p_c, mask=ahead, other=0.0)
        if not FORWARD:
            p_n += step * n_t
            p_rstd += step
            n_2 = tl.load(p_n, mask=ahead, other=0.0)
            rstd_2 = tl.load(p_rstd, mask=only_if(i + 2 < T, in_batch), other=0.0)
        if p_reset is not None:
            p_reset += step * reset_t
            cut_2 = tl.load(p_reset, mask=only_if(i + 2 < T, in_batch), other=0)
            h = tl.where((cut != 0)[:, None], 0.0, h)
            cut = cut_1
            cut_1 = cut_2

        x = multiply(h, W, p_A, A_row, A_col, N, BN, BB, PRODUCT, ACC) + u.to(ACC)
        if FORWARD:
            centred = tl.where(columns, x - mean_of(x, N), 0.0)
            scale = tl.rsqrt(mean_of(centred * centred, N) + eps)  # [BB, 1]
            normalised = centred * scale
            h = normalised * weight + bias
            if p_n is not None:
                tl.store(p_n, normalised.to(p_n.dtype.element_ty), mask=inside)
                tl.store(p_rstd[:, None], scale.to(p_rstd.dtype.element_ty), mask=in_batch[:, None])
                p_n += n_t
                p_rstd += 1
        else:
            scale = rstd.to(ACC)[:, None]
            if REVERSE:
                h = project(x * weight, n.to(ACC), N) * scale
            else:
                h = project(x, n.to(ACC), N) * scale * weight
            if p_c is not None:
                h += c.to(ACC)
                c = c_1
                c_1 = c_2
            n = n_1
            n_1 = n_2
            rstd = rstd_1
            rstd_1 = rstd_2
        tl.store(p_s, h.to(p_s.dtype.element_ty), mask=inside)
        p_s += step * s_t
        if p_x is not None:
            tl.store(p_x, x.to(p_x.dtype.element_ty), mask=inside)
            p_x += step * s_t
        u = u_1
        u_1 = u_2


def norm_scan(
    u: Tensor,
    A: Tensor,
    weight: Tensor,
    bias: Tensor,
    s0: Tensor | None,
    reset: Tensor | None,
    eps: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op ``ssm_fast::norm_scan``: s, n, rstd; the last two are empty unless ``save``."""
    s = empty_states(u)
    n = empty_states(u) if save else None
    rstd = u.new_empty(u.shape[:3]) if save else None
    launch("forward", u, None, A, weight, bias, n, rstd, s0, reset, s, None, eps)
    if n is None or rstd is None:
        return s, u.new_empty(0), u.new_empty(0)
    return s, n, rstd


def norm_scan_tangent(
    a: Tensor,
    c: Tensor | None,
    A: Tensor,
    weight: Tensor,
    n: Tensor,
    rstd: Tensor,
    s0: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The op ``ssm_fast::norm_scan_tangent``: s, z."""
    s, z = empty_states(n), empty_states(n)
    launch("tangent", a, c, A, weight, None, n, rstd, s0, reset, s, z)
    return s, z


def norm_scan_adjoint(
    g: Tensor,
    q: Tensor | None,
    A: Tensor,
    weight: Tensor,
    n: Tensor,
    rstd: Tensor,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The op ``ssm_fast::norm_scan_adjoint``: z, s."""
    z, s = empty_states(n), empty_states(n)
    launch("adjoint", g, q, A.mT, weight, None, n, rstd, None, reset, z, s)
    return z, s


def norm_scan_gradients(
    g: Tensor,
    q: Tensor | None,
    A: Tensor,
    weight: Tensor,
    n: Tensor,
    rstd: Tensor,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op ``ssm_fast::norm_scan_gradients``: z, and the gradients of the norm's weights."""
    z, s = norm_scan_adjoint(g, q, A, weight, n, rstd, reset)
    return z, (s * n).sum((1, 2)), s.sum((1, 2))


def launch(
    sweep: str,
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
) -> None:
    """One launch of the kernel."""
    G, B, T, N = u.shape
    if s.numel() == 0:
        return
    chosen = plan("norm_scan", G * B, N, u.dtype == torch.float64)
    if sweep != "forward" and n is not None and rstd is not None:
        n, rstd = last_contiguous(n), rstd.contiguous()
    u, weight, A = last_contiguous(u), last_contiguous(weight), matrix_of(A, chosen)
    c, bias, s0 = (y if y is None else last_contiguous(y) for y in (c, bias, s0))
    kernel[(G * triton.cdiv(B, chosen.rows),)](
        u, c, A, weight, bias, n, rstd, s0, flags_of(reset), s, x,
        *strides(u, 3), *strides(c, 3), *strides(A, 3), *strides(weight, 1), *strides(bias, 1),
        *strides(n, 3), *strides(s0, 2), *strides(reset, 3), *strides(s, 3), B, T,
        eps=eps, N=N, BN=chosen.states, BB=chosen.rows, SWEEP=sweep, PRODUCT=chosen.product,
        ACC=accumulator(u.dtype), num_warps=chosen.warps, **OPTIONS,
    )  # fmt: skip
