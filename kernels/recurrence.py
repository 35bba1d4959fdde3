"""What the kernels of the recurrences with a full state matrix share: the plan and the product."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_STATES = 256
MANY_ROWS = 256  # from here on the processors are busy: throughput counts, not the latency of a row

# Contraction to fused multiply-add is asked for, not left to Triton's default, which is changing.
OPTIONS = {"enable_fp_fusion": True}


class Plan(NamedTuple):
    """How a launch is cut into programs.

    Attributes:
        states: the state size, padded to a power of two.
        rows: batch rows of a program.
        product: "sum" (A in registers, one multiply-add after the other), "stream" (the same with A
            read from the cache in every step, where it is too large for registers), or a precision
            of `tl.dot`, "ieee" or "tf32x3".
        warps: warps of a program.
    """

    states: int
    rows: int
    product: str
    warps: int


@lru_cache(maxsize=1024)
def plan(op: str, rows: int, N: int, double: bool) -> Plan:
    """The plan for ``rows`` batch rows over all groups.

    It depends on the batch only through "few rows or many", so that a new batch size compiles
    nothing new, and not on time.

    Raises:
        ValueError: the state does not fit.
    """
    if N > MAX_STATES:
        raise ValueError(
            f"{op} on a GPU takes at most N = {MAX_STATES} states, got {N}; pass impl='reference'"
        )
    states = max(16, triton.next_power_of_2(N))
    many = rows >= MANY_ROWS
    if states > (64 if double else 128):
        return Plan(states, 4 if many and not double else 1, "stream", 8)
    if states == 128:
        return Plan(states, 4 if many else 1, "sum", 8)
    if double:
        return Plan(states, 1, "sum", 4)
    # A lane a state: sums over k stay in a thread. Two warps halve the latency of a step for 64
    # states, one takes fewer instructions a row.
    return Plan(states, 1, "sum", 1 if many or states < 64 else 2)


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """The type of state and sums in a kernel, `wide`."""
    return tl.float64 if wide(dtype) == torch.float64 else tl.float32


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type of state and sums: float64 for itself, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def chunk_length(T: int) -> int:
    """The power of two that about minimises the dependent steps, ``2 L + T / L``."""
    return 1 << (max(1, T // 2).bit_length() // 2)


def matrix_of(A: Tensor, chosen: Plan) -> Tensor:
    """``A`` in the layout that its product reads: streamed, neighbours must lie side by side."""
    return A.mT.contiguous().mT if chosen.product == "stream" else A


def flags_of(reset: Tensor | None) -> Tensor | None:
    """Booleans as bytes."""
    return None if reset is None else reset.view(torch.uint8)


def strides(x: Tensor | None, count: int) -> tuple[int, ...]:
    """The first ``count`` strides, zeros for a tensor that is left out."""
    return (0,) * count if x is None else x.stride()[:count]


@triton.jit
def only_if(condition, mask):
    """``mask`` under a scalar condition; `mask & condition` loses its type in the interpreter."""
    return tl.where(condition, mask, False)


@triton.jit
def tile_of_matrix(
    p_A, A_row, A_col, k, N: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """Rows ``k`` of W = A^T, [K, BN]: W[k, n] = A[n, k], zero outside.

    The strides are unknown to the compiler: it spreads n over the lanes and keeps k in a thread,
    which turns the sum over k into a chain of multiply-adds without shuffles.
    """
    n = tl.arange(0, BN)
    inside = (k < N)[:, None] & (n < N)[None, :]
    o_A = n.to(tl.int64)[None, :] * A_row + k.to(tl.int64)[:, None] * A_col
    return tl.load(p_A + o_A, mask=inside, other=0.0).to(ACC)


@triton.jit
def resident_matrix(
    p_A, A_row, A_col, N: tl.constexpr, BN: tl.constexpr, PRODUCT: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """A^T, to be kept in registers for all of time; next to nothing where it is streamed."""
    if PRODUCT == "stream":
        return tl.zeros((1, 1), ACC)
    else:  # noqa: RET505 - the branches are chosen while compiling
        return tile_of_matrix(p_A, A_row, A_col, tl.arange(0, BN), N, BN, ACC)


@triton.jit
def multiply(
    h, W, p_A, A_row, A_col,
    N: tl.constexpr, BN: tl.constexpr, BB: tl.constexpr, PRODUCT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A h for each row of ``h``, [BB, BN]."""
    if PRODUCT == "sum":
        return tl.sum(W[None, :, :] * h[:, :, None], axis=1)
    elif PRODUCT == "stream":  # noqa: RET505
        BK: tl.constexpr = 32
        parts = tl.reshape(h, (BB, BN // BK, BK))
        index = tl.arange(0, BN // BK)[None, :, None]
        total = tl.zeros((BB, BN), ACC)
        for j in range(BN // BK):
            part = tl.sum(tl.where(index == j, parts, 0.0), axis=1)  # [BB, BK], h from j BK on
            tile = tile_of_matrix(p_A, A_row, A_col, j * BK + tl.arange(0, BK), N, BN, ACC)
            total += tl.sum(tile[None, :, :] * part[:, :, None], axis=1)
        return total
    else:
        return tl.dot(h, W, input_precision=PRODUCT)
