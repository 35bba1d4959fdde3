"""dense_scan on a GPU. Maths and algorithm in docs/ops/dense_scan.md."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm_fast.kernels.recurrence import (
    OPTIONS,
    Plan,
    accumulator,
    chunk_length,
    flags_of,
    matrix_of,
    multiply,
    only_if,
    plan,
    resident_matrix,
    strides,
    wide,
)
from ssm_fast.ops.layout import empty_states, last_contiguous

CHUNKED_ROWS = 64  # up to here rows leave processors idle, and time is cut into chunks
CHUNKED_STEPS = 256
LARGEST_POWER = 2.0**20  # of an element of A^L; beyond, a state is not carried over a chunk at once

_SIZES = (
    "u_g", "u_b", "u_t", "A_g", "A_row", "A_col", "s0_g", "s0_b", "reset_g", "reset_b", "reset_t",
    "s_g", "s_b", "s_t", "B", "T", "L", "ends",
)  # fmt: skip


# PASS "whole": all of time, s is written. The chunked form runs "ends" (each chunk from zero, the
# first from s0; only its last state is written, and whether a reset cuts it off from its first),
# "whole" over these ends with A^L, and "fix" (each chunk again, from the state it starts with).
@triton.jit(do_not_specialize=_SIZES)
def kernel(
    p_u, p_A, p_s0, p_reset, p_s, p_ends, p_cut, p_safe,
    u_g, u_b, u_t, A_g, A_row, A_col, s0_g, s0_b, reset_g, reset_b, reset_t, s_g, s_b, s_t,
    B, T, L, ends,
    N: tl.constexpr, BN: tl.constexpr, BB: tl.constexpr,
    REVERSE: tl.constexpr, PASS: tl.constexpr, PRODUCT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(B, BB)
    i_g = (tl.program_id(0) // blocks).to(tl.int64)
    i_c = tl.program_id(1)
    b = (tl.program_id(0) % blocks) * BB + tl.arange(0, BB)
    n = tl.arange(0, BN)
    in_batch = b < B
    inside = in_batch[:, None] & (n < N)[None, :]
    b = b.to(tl.int64)
    p_A += i_g * A_g
    W = resident_matrix(p_A, A_row, A_col, N, BN, PRODUCT, ACC)

    first = i_c * L
    last = tl.minimum(first + L, T)
    if PASS == "fix":
        if tl.load(p_safe + i_g) == 0:  # the first chunk takes all of time, the others none
            last = tl.where(i_c == 0, T, first)

    h = tl.zeros((BB, BN), ACC)
    if p_s0 is not None:
        o_s0 = i_g * s0_g + b[:, None] * s0_b + n[None, :]
        h += tl.load(p_s0 + o_s0, mask=only_if(i_c == 0, inside), other=0.0).to(ACC)
    row = (i_g * B + b) * ends  # of this row's first chunk end
    if PASS == "fix":
        o_start = (row + i_c - 1)[:, None] * N + n[None, :]
        h += tl.load(p_ends + o_start, mask=only_if(i_c > 0, inside), other=0.0).to(ACC)

    t = T - 1 - first if REVERSE else first
    step: tl.constexpr = -1 if REVERSE else 1
    p_u += i_g * u_g + b[:, None] * u_b + t.to(tl.int64) * u_t + n[None, :]
    u = tl.load(p_u, mask=only_if(first < last, inside), other=0.0)
    p_u += step * u_t
    u_1 = tl.load(p_u, mask=only_if(first + 1 < last, inside), other=0.0)
    if p_reset is not None:
        gate = t + 1 if REVERSE else t  # the step whose reset cuts the incoming state
        p_reset += i_g * reset_g + b * reset_b + gate.to(tl.int64) * reset_t
        enters = only_if(first > 0, in_batch) if REVERSE else in_batch
        cut = tl.load(p_reset, mask=only_if(first < last, enters), other=0)
        p_reset += step * reset_t
        cut_1 = tl.load(p_reset, mask=only_if(first + 1 < last, in_batch), other=0)
        any_cut = tl.zeros((BB,), tl.uint8)
    if PASS != "ends":
        p_s += i_g * s_g + b[:, None] * s_b + t.to(tl.int64) * s_t + n[None, :]

    for i in range(first, last):
        p_u += step * u_t
        u_2 = tl.load(p_u, mask=only_if(i + 2 < last, inside), other=0.0)
        if p_reset is not None:
            p_reset += step * reset_t
            cut_2 = tl.load(p_reset, mask=only_if(i + 2 < last, in_batch), other=0)
            h = tl.where((cut != 0)[:, None], 0.0, h)
            any_cut = any_cut | cut
            cut = cut_1
            cut_1 = cut_2
        h = multiply(h, W, p_A, A_row, A_col, N, BN, BB, PRODUCT, ACC) + u.to(ACC)
        if N < BN:  # an infinite state makes NaN of the zeros beside it, which would come back
            h = tl.where(inside, h, 0.0)
        if PASS != "ends":
            tl.store(p_s, h.to(p_s.dtype.element_ty), mask=inside)
            p_s += step * s_t
        u = u_1
        u_1 = u_2

    if PASS == "ends":
        tl.store(p_ends + (row + i_c)[:, None] * N + n[None, :], h, mask=inside)
        if p_reset is not None:
            tl.store(p_cut + row + i_c, any_cut, mask=in_batch)


def dense_scan(
    u: Tensor, A: Tensor, s0: Tensor | None, reset: Tensor | None, reverse: bool
) -> Tensor:
    """The op ``ssm_fast::dense_scan``: [G, B, T, N]."""
    G, B, T, N = u.shape
    s = empty_states(u)
    if s.numel() == 0:
        return s
    u = last_contiguous(u)
    s0 = None if s0 is None else last_contiguous(s0)
    chosen = plan("dense_scan", G * B, N, u.dtype == torch.float64)
    if G * B <= CHUNKED_ROWS and T >= CHUNKED_STEPS:
        chunked(u, A, s0, reset, reverse, s, chunk_length(T), chosen)
    else:
        launch("whole", u, A, s0, reset, reverse, s, chosen)
    return s


def chunked(
    u: Tensor,
    A: Tensor,
    s0: Tensor | None,
    reset: Tensor | None,
    reverse: bool,
    s: Tensor,
    L: int,
    chosen: Plan,
) -> None:
    """Write the states to ``s`` in chunks of ``L`` steps that run at the same time.

    Where A^L is too large to carry a state over a chunk, the last launch runs through all of time
    instead; it reads that from memory, so the host need not wait to know.
    """
    G, B, T, N = u.shape
    ends = triton.cdiv(T, L) - 1  # the last chunk hands nothing on
    if ends == 0:
        launch("whole", u, A, s0, reset, reverse, s, chosen)
        return
    power = torch.linalg.matrix_power(A.double(), L)
    safe = (power.abs().amax((1, 2)) <= LARGEST_POWER).view(torch.uint8)  # [G], not of NaN
    state = wide(u.dtype)
    e = u.new_empty(G, B, ends, N, dtype=state)
    starts = torch.empty_like(e)
    cut = None if reset is None else reset.new_empty(G, B, ends)
    launch("ends", u, A, s0, reset, reverse, None, chosen, L, e, cut)
    launch("whole", e, power.to(state), None, cut, False, starts, chosen)
    launch("fix", u, A, s0, reset, reverse, s, chosen, L, starts, None, safe)


def launch(
    pass_: str,
    u: Tensor,
    A: Tensor,
    s0: Tensor | None,
    reset: Tensor | None,
    reverse: bool,
    s: Tensor | None,
    chosen: Plan,
    L: int | None = None,
    ends: Tensor | None = None,
    cut: Tensor | None = None,
    safe: Tensor | None = None,
) -> None:
    """One launch of the kernel."""
    G, B, T, N = u.shape
    A = matrix_of(A, chosen)
    if L is None:
        L = T
    chunks = triton.cdiv(T, L) - (pass_ == "ends")
    grid = (G * triton.cdiv(B, chosen.rows), chunks)
    kernel[grid](
        u, A, s0, flags_of(reset), s, ends, flags_of(cut), safe,
        *strides(u, 3), *strides(A, 3), *strides(s0, 2), *strides(reset, 3), *strides(s, 3),
        B, T, L, 0 if ends is None else ends.shape[2],
        N=N, BN=chosen.states, BB=chosen.rows, REVERSE=reverse, PASS=pass_,
        PRODUCT=chosen.product, ACC=accumulator(u.dtype), num_warps=chosen.warps, **OPTIONS,
    )  # fmt: skip
