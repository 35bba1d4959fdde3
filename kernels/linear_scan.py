"""linear_scan on a GPU. Maths in docs/ops/linear_scan.md."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm_fast.kernels.recurrence import OPTIONS, accumulator, chunk_length, only_if, strides, wide

STEPS = 8  # that `steps_of` reads at once
MANY_COLUMNS = 1 << 14  # from here on there are enough of them: programs are wide, time is not cut
CHUNKED_STEPS = 512
LARGEST_GROWTH = 64  # of a chunk's products; beyond it the sum of two parts may cancel

_SIZES = (
    "a_m", "a_t", "a_c", "b_m", "b_t", "b_c", "h0_m", "h0_c", "h_m", "h_t", "h_c",
    "M", "T", "C", "L", "ends",
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


@triton.jit
def multiply_add(a, a_i, h, h_i, b, b_i, COMPLEX: tl.constexpr):
    """The real and the imaginary part of ``a h + b``."""
    if COMPLEX:
        return a * h - a_i * h_i + b, a * h_i + a_i * h + b_i
    else:  # noqa: RET505 - the branches are chosen while compiling
        return a * h + b, h_i


# What enters a chunk is a short scan over the ends of those before it. Where that gives a state that
# is not finite, or is marked as not to be trusted, the chunk that found it takes the rest of time and
# those behind it none; the columns of a program share the decision.
@triton.jit
def enter(
    p_carry, column, columns, mask, i_c, ends, first, last, T,
    BT: tl.constexpr, BC: tl.constexpr, COMPLEX: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The state that enters chunk ``i_c``, as two parts, and the step before which to stop."""
    plane = ends * columns
    p_e = p_carry + column
    p_P = p_e + plane
    h = tl.zeros((BC,), ACC)
    h_i = tl.zeros((BC,), ACC)
    before = tl.full((BC,), 1, tl.int32)
    behind = tl.full((BC,), 1, tl.int32)
    for i in range(0, i_c + 1, BT):
        e = steps_of(p_e, columns, i, 0, ends, mask)
        P = steps_of(p_P, columns, i, 0, ends, mask)
        e_i, P_i = e, P
        if COMPLEX:
            e_i = steps_of(p_e + 2 * plane, columns, i, 0, ends, mask)
            P_i = steps_of(p_P + 2 * plane, columns, i, 0, ends, mask)
        for j in tl.static_range(BT):
            x, x_i = multiply_add(P[j], P_i[j], h, h_i, e[j], e_i[j], COMPLEX)
            finite = (tl.abs(x) < float("inf")) & (tl.abs(x_i) < float("inf"))
            before = tl.where(finite | (i + j >= i_c), before, 0)
            behind = tl.where(finite | (i + j != i_c), behind, 0)
            h = tl.where(i + j < i_c, x, h)
            h_i = tl.where(i + j < i_c, x_i, h_i)
        p_e += BT * columns
        p_P += BT * columns
    last = tl.where(tl.min(behind, axis=0) == 0, T, last)
    return h, h_i, tl.where(tl.min(before, axis=0) == 0, first, last)


# A program advances BC columns, a lane each, and asks for eight steps while it computes the eight
# before them. PASS "whole": all of time. The chunked form runs "ends" (each chunk from zero, the first
# from h0; only its last state and the product of its coefficients are written, NaN where one of the
# products is too large) and "fix" (each chunk again, from the state that enters it).
@triton.jit(do_not_specialize=_SIZES)
def kernel(
    p_a, p_b, p_h0, p_h, p_carry,
    a_m, a_t, a_c, b_m, b_t, b_c, h0_m, h0_c, h_m, h_t, h_c, M, T, C, L, ends,
    BT: tl.constexpr, BC: tl.constexpr, REVERSE: tl.constexpr, SHIFT: tl.constexpr,
    COMPLEX: tl.constexpr, PASS: tl.constexpr, LARGEST: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0).to(tl.int64) * BC + tl.arange(0, BC)
    columns = M.to(tl.int64) * C
    mask = column < columns
    m, c = column // C, column % C
    i_c = T * 0
    last = T
    if PASS != "whole":
        i_c = tl.program_id(1)
        last = tl.minimum(i_c * L + L, T)
    first = i_c * L
    direction: tl.constexpr = -1 if REVERSE else 1
    t = (T - 1 - first if REVERSE else first).to(tl.int64)
    lag: tl.constexpr = -direction if SHIFT else 0  # where a step's coefficient stands
    # Nothing enters the first step, so that it takes no coefficient, unless there is an h0.
    begin: tl.constexpr = 1 if SHIFT or p_h0 is None else 0
    p_a += m * a_m + c * a_c + (t + lag) * a_t
    p_b += m * b_m + c * b_c + t * b_t
    a_t = direction * a_t.to(tl.int64)
    b_t = direction * b_t.to(tl.int64)

    if PASS == "fix":
        h, h_i, last = enter(
            p_carry, column, columns, mask, i_c, ends, first, last, T, BT, BC, COMPLEX, ACC
        )
    else:
        h = tl.zeros((BC,), ACC)
        h_i = tl.zeros((BC,), ACC)
    if p_h0 is not None:
        if not SHIFT:
            p_h0 += m * h0_m + c * h0_c
            starts = only_if(i_c == 0, mask)
            h += tl.load(p_h0, mask=starts, other=0.0).to(ACC)
            if COMPLEX:
                h_i += tl.load(p_h0 + 1, mask=starts, other=0.0).to(ACC)
    if PASS == "ends":
        P = tl.full((BC,), 1.0, ACC)
        P_i = tl.zeros((BC,), ACC)
        growth = tl.zeros((BC,), ACC)  # of the product of the last steps that has grown the most
    else:
        p_h += m * h_m + c * h_c + t * h_t
        h_t = direction * h_t.to(tl.int64)

    a = steps_of(p_a, a_t, first, begin, last, mask)
    b = steps_of(p_b, b_t, first, 0, last, mask)
    if COMPLEX:
        a_i = steps_of(p_a + 1, a_t, first, begin, last, mask)
        b_i = steps_of(p_b + 1, b_t, first, 0, last, mask)
    for i in range(first, last, BT):
        p_a += BT * a_t
        p_b += BT * b_t
        next_a = steps_of(p_a, a_t, i + BT, 0, last, mask)
        next_b = steps_of(p_b, b_t, i + BT, 0, last, mask)
        if COMPLEX:
            next_a_i = steps_of(p_a + 1, a_t, i + BT, 0, last, mask)
            next_b_i = steps_of(p_b + 1, b_t, i + BT, 0, last, mask)
        for j in tl.static_range(BT):
            x = a[j].to(ACC)
            x_i = a_i[j] if COMPLEX else x
            y_i = b_i[j] if COMPLEX else x
            h, h_i = multiply_add(x, x_i, h, h_i, b[j].to(ACC), y_i, COMPLEX)
            if PASS == "ends":  # of whole chunks: every step counts
                P, P_i = multiply_add(x, x_i, P, P_i, 0.0, 0.0, COMPLEX)
                size = tl.sqrt(x * x + x_i * x_i) if COMPLEX else tl.abs(x)
                growth = size * tl.maximum(growth, 1.0)
            else:
                inside = only_if(i + j < last, mask)
                tl.store(p_h, h.to(p_h.dtype.element_ty), mask=inside)
                if COMPLEX:
                    tl.store(p_h + 1, h_i, mask=inside)
                p_h += h_t
        a = next_a
        b = next_b
        if COMPLEX:
            a_i = next_a_i
            b_i = next_b_i

    if PASS == "ends":
        P = tl.where(growth <= LARGEST, P, float("nan"))
        P = tl.where(i_c == 0, 0.0, P)  # nothing comes before the first chunk
        P_i = tl.where(i_c == 0, 0.0, P_i)
        p_carry += i_c * columns + column
        plane = ends * columns
        tl.store(p_carry, h, mask=mask)
        tl.store(p_carry + plane, P, mask=mask)
        if COMPLEX:
            tl.store(p_carry + 2 * plane, h_i, mask=mask)
            tl.store(p_carry + 3 * plane, P_i, mask=mask)


def linear_scan(a: Tensor, b: Tensor, h0: Tensor | None, reverse: bool, shift: bool) -> Tensor:
    """The op ``ssm_fast::linear_scan``: [M, T, C]."""
    h = torch.empty_like(b)
    if h.numel() == 0:
        return h
    M, T, C = b.shape
    tensors = real(a), real(b), None if h0 is None else real(h0), real(h)
    L = chunk_length(T)
    if M * C >= MANY_COLUMNS or T < CHUNKED_STEPS or L >= T:
        launch("whole", *tensors, None, T, 1, reverse, shift)
        return h
    chunks = triton.cdiv(T, L)
    planes = 4 if b.is_complex() else 2
    state = wide(tensors[1].dtype)
    carry = tensors[1].new_empty(planes, chunks - 1, M * C, dtype=state)
    launch("ends", *tensors[:3], None, carry, L, chunks - 1, reverse, shift)
    launch("fix", *tensors, carry, L, chunks, reverse, shift)
    return h


def launch(
    pass_: str,
    a: Tensor,
    b: Tensor,
    h0: Tensor | None,
    h: Tensor | None,
    carry: Tensor | None,
    L: int,
    chunks: int,
    reverse: bool,
    shift: bool,
) -> None:
    """One launch of the kernel, over ``chunks`` of ``L`` steps; complex numbers as two reals."""
    M, T, C = b.shape[:3]
    columns, warps = (128, 4) if M * C >= MANY_COLUMNS else (32, 1)
    kernel[(triton.cdiv(M * C, columns), chunks)](
        a, b, h0, h, carry,
        *strides(a, 3), *strides(b, 3), *strides(h0, 2), *strides(h, 3), M, T, C, L,
        0 if carry is None else carry.shape[1],
        BT=STEPS, BC=columns, REVERSE=reverse, SHIFT=shift, COMPLEX=b.dim() == 4, PASS=pass_,
        LARGEST=LARGEST_GROWTH, ACC=accumulator(b.dtype), num_warps=warps, **OPTIONS,
    )  # fmt: skip


def real(x: Tensor) -> Tensor:
    """``x``, complex numbers as two reals side by side."""
    if not x.is_complex():
        return x.resolve_neg()
    return torch.view_as_real(x.resolve_conj().resolve_neg())
