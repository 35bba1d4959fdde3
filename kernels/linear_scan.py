"""linear_scan on a GPU. Maths in docs/ops/linear_scan.md."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm_fast.kernels.recurrence import OPTIONS, accumulator, only_if

STEPS = 8  # that `steps_of` reads at once
MANY_COLUMNS = 1 << 14  # from here on programs are wide: there are enough of them

_SIZES = (
    "a_m", "a_t", "a_c", "b_m", "b_t", "b_c", "h0_m", "h0_c", "h_m", "h_t", "h_c", "M", "T", "C",
)  # fmt: skip


@triton.jit
def step_of(p, stride, i, begin, end, mask, j: tl.constexpr):
    """What step ``i + j`` reads, zeros unless it lies in [begin, end)."""
    inside = only_if((i + j >= begin) & (i + j < end), mask)
    return tl.load(p + j * stride, mask=inside, other=0)


@triton.jit
def steps_of(p, stride, i, begin, end, mask):
    """What eight steps from ``i`` on read, each in a vector: no layout can spread time over lanes."""
    return (
        step_of(p, stride, i, begin, end, mask, 0),
        step_of(p, stride, i, begin, end, mask, 1),
        step_of(p, stride, i, begin, end, mask, 2),
        step_of(p, stride, i, begin, end, mask, 3),
        step_of(p, stride, i, begin, end, mask, 4),
        step_of(p, stride, i, begin, end, mask, 5),
        step_of(p, stride, i, begin, end, mask, 6),
        step_of(p, stride, i, begin, end, mask, 7),
    )


# A program advances BC columns, a lane each, and asks for eight steps while it computes the eight
# before them.
@triton.jit(do_not_specialize=_SIZES)
def kernel(
    p_a, p_b, p_h0, p_h, a_m, a_t, a_c, b_m, b_t, b_c, h0_m, h0_c, h_m, h_t, h_c, M, T, C,
    BT: tl.constexpr, BC: tl.constexpr, REVERSE: tl.constexpr, SHIFT: tl.constexpr,
    COMPLEX: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0).to(tl.int64) * BC + tl.arange(0, BC)
    mask = column < M.to(tl.int64) * C
    m, c = column // C, column % C
    direction: tl.constexpr = -1 if REVERSE else 1
    t = ((T - 1) * (1 if REVERSE else 0)).to(tl.int64)
    lag: tl.constexpr = -direction if SHIFT else 0  # where a step's coefficient stands
    # Nothing enters the first step, so that it takes no coefficient, unless there is an h0.
    begin: tl.constexpr = 1 if SHIFT or p_h0 is None else 0
    p_a += m * a_m + c * a_c + (t + lag) * a_t
    p_b += m * b_m + c * b_c + t * b_t
    p_h += m * h_m + c * h_c + t * h_t
    a_t = direction * a_t.to(tl.int64)
    b_t = direction * b_t.to(tl.int64)
    h_t = direction * h_t.to(tl.int64)

    h = tl.zeros((BC,), ACC)
    h_i = tl.zeros((BC,), ACC)
    if p_h0 is not None:
        if not SHIFT:
            p_h0 += m * h0_m + c * h0_c
            h += tl.load(p_h0, mask=mask, other=0.0).to(ACC)
            if COMPLEX:
                h_i += tl.load(p_h0 + 1, mask=mask, other=0.0).to(ACC)

    a = steps_of(p_a, a_t, 0, begin, T, mask)
    b = steps_of(p_b, b_t, 0, 0, T, mask)
    if COMPLEX:
        a_i = steps_of(p_a + 1, a_t, 0, begin, T, mask)
        b_i = steps_of(p_b + 1, b_t, 0, 0, T, mask)
    for i in range(0, T, BT):
        p_a += BT * a_t
        p_b += BT * b_t
        next_a = steps_of(p_a, a_t, i + BT, 0, T, mask)
        next_b = steps_of(p_b, b_t, i + BT, 0, T, mask)
        if COMPLEX:
            next_a_i = steps_of(p_a + 1, a_t, i + BT, 0, T, mask)
            next_b_i = steps_of(p_b + 1, b_t, i + BT, 0, T, mask)
        for j in tl.static_range(BT):
            inside = only_if(i + j < T, mask)
            if COMPLEX:
                before = h
                h = a[j] * before - a_i[j] * h_i + b[j]
                h_i = a[j] * h_i + a_i[j] * before + b_i[j]
                tl.store(p_h + 1, h_i, mask=inside)
            else:
                h = a[j].to(ACC) * h + b[j].to(ACC)
            tl.store(p_h, h.to(p_h.dtype.element_ty), mask=inside)
            p_h += h_t
        a = next_a
        b = next_b
        if COMPLEX:
            a_i = next_a_i
            b_i = next_b_i


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
