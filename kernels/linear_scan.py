"""linear_scan on a GPU. Maths in docs/ops/linear_scan.md."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm_fast.kernels.recurrence import OPTIONS, accumulator

STEPS = 16  # of a tile
MANY_COLUMNS = 1 << 14  # from here on programs are wide: there are enough of them

_SIZES = (
    "a_m", "a_t", "a_c", "b_m", "b_t", "b_c", "h0_m", "h0_c", "h_m", "h_t", "h_c", "M", "T", "C",
)  # fmt: skip


@triton.jit
def then(a_1, b_1, a_2, b_2):
    """The step h -> a_1 h + b_1 and then h -> a_2 h + b_2."""
    return a_1 * a_2, a_2 * b_1 + b_2


@triton.jit
def then_complex(a_1, a_i_1, b_1, b_i_1, a_2, a_i_2, b_2, b_i_2):
    """The same with imaginary parts."""
    return (
        a_1 * a_2 - a_i_1 * a_i_2,
        a_1 * a_i_2 + a_i_1 * a_2,
        a_2 * b_1 - a_i_2 * b_i_1 + b_2,
        a_2 * b_i_1 + a_i_2 * b_1 + b_i_2,
    )


# A program advances BC columns by tiles of BT steps. The lanes lie along the columns and a thread
# holds all steps of a column: the scan of a tile is the recurrence itself, step after step.
@triton.jit(do_not_specialize=_SIZES)
def kernel(
    p_a, p_b, p_h0, p_h, a_m, a_t, a_c, b_m, b_t, b_c, h0_m, h0_c, h_m, h_t, h_c, M, T, C,
    BT: tl.constexpr, BC: tl.constexpr, REVERSE: tl.constexpr, SHIFT: tl.constexpr,
    COMPLEX: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0).to(tl.int64) * BC + tl.arange(0, BC)
    in_columns = column < M.to(tl.int64) * C
    m, c = column // C, column % C
    i = tl.arange(0, BT)[:, None]  # the step in sweep order; t is where it stands
    t = (T - 1 - i if REVERSE else i).to(tl.int64)
    step: tl.constexpr = -BT if REVERSE else BT
    lag: tl.constexpr = (1 if REVERSE else -1) if SHIFT else 0  # where a step's coefficient stands
    # Nothing enters the first step, so that it takes no coefficient, unless there is an h0.
    skipped: tl.constexpr = 1 if SHIFT or p_h0 is None else 0
    p_a += (m * a_m + c * a_c)[None, :] + (t + lag) * a_t
    p_b += (m * b_m + c * b_c)[None, :] + t * b_t
    p_h += (m * h_m + c * h_c)[None, :] + t * h_t

    entering = tl.zeros((1, BC), ACC)
    entering_i = tl.zeros((1, BC), ACC)
    if p_h0 is not None:
        if not SHIFT:
            p_h0 += (m * h0_m + c * h0_c)[None, :]
            entering += tl.load(p_h0, mask=in_columns[None, :], other=0.0).to(ACC)
            if COMPLEX:
                entering_i += tl.load(p_h0 + 1, mask=in_columns[None, :], other=0.0).to(ACC)

    inside = (i < T) & in_columns[None, :]
    a = tl.load(p_a, mask=inside & (i >= skipped), other=0.0)
    b = tl.load(p_b, mask=inside, other=0.0)
    if COMPLEX:
        a_i = tl.load(p_a + 1, mask=inside & (i >= skipped), other=0.0)
        b_i = tl.load(p_b + 1, mask=inside, other=0.0)
    for first in range(0, T, BT):
        ahead = (i + first + BT < T) & in_columns[None, :]
        p_a += step * a_t
        p_b += step * b_t
        next_a = tl.load(p_a, mask=ahead, other=0.0)
        next_b = tl.load(p_b, mask=ahead, other=0.0)
        if COMPLEX:
            next_a_i = tl.load(p_a + 1, mask=ahead, other=0.0)
            next_b_i = tl.load(p_b + 1, mask=ahead, other=0.0)
        inside = (i + first < T) & in_columns[None, :]
        if COMPLEX:
            from_before = a * entering - a_i * entering_i
            from_before_i = a * entering_i + a_i * entering
            b = tl.where(i == 0, b + from_before, b)
            b_i = tl.where(i == 0, b_i + from_before_i, b_i)
            _, _, h, h_i = tl.associative_scan((a, a_i, b, b_i), 0, then_complex)
            tl.store(p_h, h, mask=inside)
            tl.store(p_h + 1, h_i, mask=inside)
            entering_i = tl.sum(tl.where(i == BT - 1, h_i, 0.0), axis=0)[None, :]
            a_i = next_a_i
            b_i = next_b_i
        else:
            first_b = b.to(ACC) + a.to(ACC) * entering
            source = tl.where(i == 0, first_b, b.to(ACC))
            _, h = tl.associative_scan((a.to(ACC), source), 0, then)
            tl.store(p_h, h.to(p_h.dtype.element_ty), mask=inside)
        entering = tl.sum(tl.where(i == BT - 1, h, 0.0), axis=0)[None, :]
        a = next_a
        b = next_b
        p_h += step * h_t


def linear_scan(a: Tensor, b: Tensor, h0: Tensor | None, reverse: bool, shift: bool) -> Tensor:
    """The op ``ssm_fast::linear_scan``: [M, T, C]."""
    h = torch.empty_like(b)
    if h.numel() == 0:
        return h
    M, T, C = b.shape
    x_a, x_b, x_h = real(a), real(b), real(h)
    x_h0 = None if h0 is None else real(h0)
    columns, warps = (128, 4) if M * C >= MANY_COLUMNS else (32, 1)
    kernel[(triton.cdiv(M * C, columns),)](
        x_a, x_b, x_h0, x_h, *x_a.stride()[:3], *x_b.stride()[:3],
        *((0, 0) if x_h0 is None else x_h0.stride()[:2]), *x_h.stride()[:3], M, T, C,
        BT=STEPS, BC=columns, REVERSE=reverse, SHIFT=shift, COMPLEX=b.is_complex(),
        ACC=accumulator(x_b.dtype), num_warps=warps, **OPTIONS,
    )  # fmt: skip
    return h


def real(x: Tensor) -> Tensor:
    """``x``, complex numbers as two reals side by side."""
    if not x.is_complex():
        return x.resolve_neg()
    return torch.view_as_real(x.resolve_conj().resolve_neg())
