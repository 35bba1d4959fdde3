"""gae and discounted_returns on a GPU. Maths in docs/ops/gae.md."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm_fast.kernels.linear_scan import MANY_COLUMNS
from ssm_fast.kernels.recurrence import OPTIONS, accumulator

STEPS = 8  # of a tile: all that its steps read has to fit the registers

_SIZES = ("stride_m", "stride_t", "stride_c", "M", "T", "C")


@triton.jit
def then(a_1, b_1, a_2, b_2):
    """The step x -> a_1 x + b_1 and then x -> a_2 x + b_2, where zero cuts off what came before."""
    return a_1 * a_2, tl.where(a_2 == 0.0, b_2, a_2 * b_1 + b_2)


@triton.jit
def scan_tile(coefficient, source, later, i):
    """Scan a tile behind ``later``, [1, BC]; its last row is what enters the next tile."""
    entered = tl.where(coefficient == 0.0, source, coefficient * later + source)
    _, x = tl.associative_scan((coefficient, tl.where(i == 0, entered, source)), 0, then)
    return x, tl.sum(tl.where(i == x.shape[0] - 1, x, 0.0), axis=0)[None, :]


# Time runs backwards: step i in sweep order stands at T - 1 - i. A value that is not used may be
# anything, NaN included, so it is left out rather than multiplied by zero.
@triton.jit(do_not_specialize=_SIZES)
def gae_kernel(
    p_rewards, p_values, p_next_values, p_terminated, p_truncated, p_advantages, p_returns,
    stride_m, stride_t, stride_c, M, T, C,
    gamma: tl.constexpr, gae_lambda: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0).to(tl.int64) * BC + tl.arange(0, BC)
    in_columns = (column < M.to(tl.int64) * C)[None, :]
    i = tl.arange(0, BT)[:, None]
    o = (column // C * stride_m + column % C * stride_c)[None, :] + (T - 1 - i).to(
        tl.int64
    ) * stride_t
    later = tl.zeros((1, BC), ACC)
    for first in range(0, T, BT):
        inside = (i + first < T) & in_columns
        reward = tl.load(p_rewards + o, mask=inside, other=0.0).to(ACC)
        value = tl.load(p_values + o, mask=inside, other=0.0).to(ACC)
        next_value = tl.load(p_next_values + o, mask=inside, other=0.0).to(ACC)
        terminated = tl.load(p_terminated + o, mask=inside, other=0) != 0
        truncated = tl.load(p_truncated + o, mask=inside, other=0) != 0
        source = reward + gamma * tl.where(terminated, 0.0, next_value) - value
        ones = tl.full((BT, BC), 1.0, ACC)
        coefficient = tl.where(terminated | truncated, 0.0, ones * gamma * gae_lambda)
        advantage, later = scan_tile(coefficient, source, later, i)
        tl.store(p_advantages + o, advantage.to(p_advantages.dtype.element_ty), mask=inside)
        tl.store(p_returns + o, (advantage + value).to(p_returns.dtype.element_ty), mask=inside)
        o -= BT * stride_t


@triton.jit(do_not_specialize=_SIZES)
def returns_kernel(
    p_rewards, p_next_values, p_terminated, p_truncated, p_returns,
    stride_m, stride_t, stride_c, M, T, C,
    gamma: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0).to(tl.int64) * BC + tl.arange(0, BC)
    in_columns = (column < M.to(tl.int64) * C)[None, :]
    i = tl.arange(0, BT)[:, None]
    o = (column // C * stride_m + column % C * stride_c)[None, :] + (T - 1 - i).to(
        tl.int64
    ) * stride_t
    later = tl.zeros((1, BC), ACC)
    for first in range(0, T, BT):
        inside = (i + first < T) & in_columns
        reward = tl.load(p_rewards + o, mask=inside, other=0.0).to(ACC)
        next_value = tl.load(p_next_values + o, mask=inside, other=0.0).to(ACC)
        terminated = tl.load(p_terminated + o, mask=inside, other=0) != 0
        ends = (tl.load(p_truncated + o, mask=inside, other=0) != 0) | (i + first == 0)
        bootstrap = tl.where(terminated, 0.0, tl.where(ends, next_value, 0.0))
        coefficient = tl.where(ends | terminated, 0.0, tl.full((BT, BC), 1.0, ACC) * gamma)
        x, later = scan_tile(coefficient, reward + gamma * bootstrap, later, i)
        tl.store(p_returns + o, x.to(p_returns.dtype.element_ty), mask=inside)
        o -= BT * stride_t


def gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: float,
    gae_lambda: float,
) -> tuple[Tensor, Tensor]:
    """The op ``ssm_fast::gae``: advantages and returns, [M, T, C]."""
    inputs = (rewards, values, next_values, terminated, truncated)
    advantages, returns = torch.empty_like(rewards), torch.empty_like(rewards)
    launch(gae_kernel, inputs, (advantages, returns), gamma=gamma, gae_lambda=gae_lambda)
    return advantages, returns


def discounted_returns(
    rewards: Tensor, next_values: Tensor, terminated: Tensor, truncated: Tensor, gamma: float
) -> Tensor:
    """The op ``ssm_fast::discounted_returns``: [M, T, C]."""
    returns = torch.empty_like(rewards)
    inputs = (rewards, next_values, terminated, truncated)
    launch(returns_kernel, inputs, (returns,), gamma=gamma)
    return returns


def launch(
    kernel: triton.runtime.JITFunction,
    inputs: tuple[Tensor, ...],
    outputs: tuple[Tensor, ...],
    **discounts: float,
) -> None:
    """One launch, all tensors in the layout of the outputs."""
    like = outputs[0]
    M, T, C = like.shape
    if like.numel() == 0:
        return
    laid_out = [
        x if x.stride() == like.stride() else torch.empty_like(like, dtype=x.dtype).copy_(x)
        for x in inputs
    ]
    columns, warps = (128, 4) if M * C >= MANY_COLUMNS else (32, 1)
    kernel[(triton.cdiv(M * C, columns),)](
        *(x.view(torch.uint8) if x.dtype == torch.bool else x for x in laid_out), *outputs,
        *like.stride(), M, T, C, **discounts,
        BT=STEPS, BC=columns, ACC=accumulator(like.dtype), num_warps=warps, **OPTIONS,
    )  # fmt: skip
